"""The data of a figure, before anyone draws it: numbers, names and axes.

The page hands these to Plotly and `images` hands them to matplotlib, so that both show the same numbers. Numbers that
stand in metrics.jsonl arrive here as they are there, never rounded.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Kind = Literal["line", "band", "steps", "points", "bars", "intervals"]
Dash = Literal["solid", "dash", "dot", "dashdot"]
DASHES: tuple[Dash, ...] = ("solid", "dash", "dot", "dashdot")
"""Dashes of learning rates that share axes, in their order."""


@dataclass(frozen=True)
class Trace:
    """One line, band, outline of a histogram (`outline`), cloud of points, row of bars or column of intervals.

    >>> Trace("line", (1, 2), (0.5, 0.75), name="sapo").to_json()
    {'kind': 'line', 'x': [1, 2], 'y': [0.5, 0.75], 'name': 'sapo'}
    """

    kind: Kind
    x: tuple[Any, ...]
    """Steps, ratios, or names where bars stand beside each other. For a band: where its edges are."""
    y: tuple[float | None, ...] = ()
    """None leaves a gap. A band has `low` and `high` instead."""
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    """Edges of a band, or the ends of intervals, which lie along x."""
    name: str = ""
    """Traces of one name are shown and hidden together; the legend has each name once."""
    color: int = 0
    """Index into the palette; -1 is the colour of text."""
    shade: int = 0
    """How often the colour is mixed with the page's, by a third each time: for more learning rates than dashes."""
    dash: Dash = "solid"
    faint: bool = False
    """A line in the background: one seed of several."""
    markers: bool = False
    second: bool = False
    """On the axis at the right."""
    hover: str = ""
    """Text that a point shows beside its numbers."""
    hovers: tuple[str, ...] = ()
    """Text of each point, where the points differ."""
    crossed: bool = False
    """True for points that stand for no measurement: they are drawn as crosses."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value without the fields that have their defaults."""
        return _compact(self)


@dataclass(frozen=True)
class Mark:
    """A line through a whole panel: an edge or a threshold.

    >>> Mark("x", 0.02, "A2: Var < 0.02").to_json()
    {'axis': 'x', 'at': 0.02, 'text': 'A2: Var < 0.02'}
    """

    axis: Literal["x", "y"]
    at: float
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return _compact(self)


@dataclass(frozen=True)
class Panel:
    """A pair of axes with their traces.

    >>> Panel("step", "reward", (Trace("line", (1,), (0.5,)),)).to_json()["x"]
    'step'
    """

    x: str
    y: str
    traces: tuple[Trace, ...]
    title: str = ""
    second: str = ""
    """Name of the axis at the right, where there is one. The axis goes from 0 to a little above its largest value."""
    x_log: bool = False
    y_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    y_names: tuple[str, ...] = ()
    """Names at y = 0, 1, ... from the top down, in place of numbers."""
    marks: tuple[Mark, ...] = ()
    stacked: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        own = _compact(self)
        own["traces"] = [t.to_json() for t in self.traces]
        if self.marks:
            own["marks"] = [m.to_json() for m in self.marks]
        return own


@dataclass(frozen=True)
class Figure:
    """Panels with a title and a caption, or the reason why there are none.

    >>> Figure("entropy", "Entropy", missing="not measured: train.entropy=true logs it").to_json()["missing"]
    'not measured: train.entropy=true logs it'
    """

    key: str
    title: str
    caption: str = ""
    panels: tuple[Panel, ...] = ()
    missing: str = ""
    """Why there is nothing to show, and how to measure it; empty where there are panels."""
    wide: bool = False
    """True if it takes the whole width of the page."""
    columns: int = 0
    """Panels beside each other; 0 leaves the choice to the page or the image."""
    same_as: tuple[str, ...] = ()
    """Keys of figures that show the same lines: a page names them and does not draw them again."""

    def __post_init__(self) -> None:
        assert bool(self.panels) != bool(self.missing), f"{self.key} has panels or says why not"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        own = _compact(self)
        if self.same_as:
            own.pop("panels", None)
        elif self.panels:
            own["panels"] = [p.to_json() for p in self.panels]
        return own

    def to_csv(self) -> str:
        """Return the numbers of all traces as CSV, a point to a row; what is missing is empty.

        >>> panel = Panel("step", "reward", (Trace("line", (1,), (0.5,), name="a"),))
        >>> print(Figure("f", "F", panels=(panel,)).to_csv())
        panel,trace,kind,note,x_name,x,y_name,y,low,high
        ,a,line,,step,1,reward,0.5,,
        <BLANKLINE>
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for panel in self.panels:
            for trace in panel.traces:
                y_name = panel.second if trace.second else panel.y
                for i, x in enumerate(trace.x):
                    y, low, high = (v[i] if i < len(v) else None for v in (trace.y, trace.low, trace.high))
                    if y is None and low is None:
                        continue  # a gap
                    note = trace.hovers[i] if trace.hovers else trace.hover
                    writer.writerow((panel.title, trace.name, trace.kind, note, panel.x, x, y_name, y, low, high))
        return out.getvalue()


CSV_COLUMNS = ("panel", "trace", "kind", "note", "x_name", "x", "y_name", "y", "low", "high")


def mark_repeats(figures: Sequence[Figure], drawn: Sequence[Figure]) -> list[Figure]:
    """Return figures with `same_as` where all of their panels are drawn already.

    Names of traces and titles of panels do not count: a figure of the paper has its own.
    """
    known = {_content(panel): figure.key for figure in drawn for panel in figure.panels}
    found = []
    for figure in figures:
        keys = [known.get(_content(panel)) for panel in figure.panels]
        repeats = tuple(dict.fromkeys(key for key in keys if key is not None))
        found.append(replace(figure, same_as=repeats) if keys and None not in keys else figure)
    return found


def _content(panel: Panel) -> tuple[Any, ...]:
    traces = tuple(replace(trace, name="", hover="", hovers=()) for trace in panel.traces)
    return panel.x, panel.y, panel.x_log, panel.y_log, traces


def outline(
    edges: Sequence[float], values: Sequence[float], *, to_zero: bool = False
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Return x and y of a histogram's outline: each bin that is not empty is a line of its width.

    Args:
        edges: (K + 1,) of the bins.
        values: (K,), 0 where a bin is empty.
        to_zero: whether the outline stands on y = 0, empty bins too. Otherwise an empty bin is a gap: a log axis has
            no 0.

    >>> outline([1, 2, 3, 4], [0.5, 0.0, 0.25])
    ((1, 2, 2, 3, 4), (0.5, 0.5, None, 0.25, 0.25))
    >>> outline([1, 2, 3], [0.5, 0.0], to_zero=True)
    ((1, 1, 2, 2, 3, 3), (0.0, 0.5, 0.5, 0.0, 0.0, 0.0))
    """
    x: list[float] = []
    y: list[float | None] = []
    for left, right, value in zip(edges[:-1], edges[1:], values, strict=True):
        if value > 0 or to_zero:
            x += (left, right)
            y += (value, value)
        elif y and y[-1] is not None:
            x.append(left)
            y.append(None)
    if y and y[-1] is None:
        x, y = x[:-1], y[:-1]
    if to_zero and x:
        return (x[0], *x, x[-1]), (0.0, *y, 0.0)
    return tuple(x), tuple(y)


def share_axis(panels: Sequence[Panel], axis: Literal["x", "y"] = "y") -> list[Panel]:
    """Give panels one range of an axis, so that they can be compared by eye.

    >>> low, high = (Panel("step", "y", (Trace("line", (1, 2), y),)) for y in ((0.0, 1.0), (0.0, 2.0)))
    >>> [panel.y_range for panel in share_axis([low, high])]
    [(-0.08, 2.08), (-0.08, 2.08)]
    """
    if len(panels) < 2:
        return list(panels)
    along = {"x": "intervals", "y": "band"}[axis]
    log = all(panel.y_log if axis == "y" else panel.x_log for panel in panels)
    ends = [
        value
        for trace in (t for panel in panels for t in panel.traces)
        for value in (*getattr(trace, axis), *(trace.low + trace.high if trace.kind == along else ()))
        if value is not None and not (log and value <= 0)
    ]
    if not ends:
        return list(panels)
    low, high = (math.log10(end) if log else end for end in (min(ends), max(ends)))
    margin = 0.04 * (high - low or 1.0)
    both = (low - margin, high + margin)
    if log:
        both = (10 ** both[0], 10 ** both[1])
    return [replace(p, x_range=both) if axis == "x" else replace(p, y_range=both) for p in panels]


def _compact(value: Any) -> dict[str, Any]:
    """Return the fields that differ from their defaults; panels and figures add their parts themselves."""
    found: dict[str, Any] = {}
    for field in fields(value):
        own = getattr(value, field.name)
        if own != field.default:
            found[field.name] = list(own) if isinstance(own, tuple) else own
    return found
