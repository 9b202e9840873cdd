"""The figures as PNG and PDF in a style fit for a paper, and their numbers as CSV: the data of the page, drawn by
matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from sapo.errors import ConfigError
from sapo.report.figure import Figure, Panel, Trace
from sapo.utils.files import unwritable
from sapo.utils.text import visible

PALETTE = ("#0b62b0", "#c9550a", "#0a7d5c", "#8a3f9e", "#9a7400", "#2f87b3", "#b5305c", "#5b6470", "#5c771c", "#7a4b2a")
"""The colours of the page in its light theme."""

STYLE: dict[str, Any] = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral", "Times New Roman", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: conferences refuse type 3
    "savefig.dpi": 200,
}

PANEL = (3.25, 2.2)
"""Width and height in inches: one column of a paper in two."""

ROW = 0.26
"""Height of a named row in inches."""

MOST_IN_LEGEND = 10


def check_images() -> None:
    """Refuse to write images without the library that draws them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (imported to see whether it can be)
    except ImportError as error:
        raise ConfigError("--png needs matplotlib, which is not installed; pip install matplotlib") from error


def write_images(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Write KEY.png, KEY.pdf and KEY.csv for every figure that was measured.

    Raises:
        ConfigError: matplotlib is not installed, or no directory can be written under that name.
        StorageError: the disk is full or cannot be written to.
    """
    check_images()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(cast(Any, STYLE)):
            for figure in figures:
                if figure.missing:
                    continue
                drawn = draw(figure)
                for ending in ("png", "pdf"):
                    file = directory / f"{figure.key}.{ending}"
                    # Without a date the same figure gives the same file.
                    drawn.savefig(file, metadata={"CreationDate": None} if ending == "pdf" else None)
                    written.append(file)
                plt.close(drawn)
                file = directory / f"{figure.key}.csv"
                file.write_text(figure.to_csv(), encoding="utf-8")
                written.append(file)
    except OSError as error:
        raise unwritable(directory, "--png", error) from error
    return written


def draw(figure: Figure) -> Any:
    """Draw a figure by matplotlib: its panels in one row, four of them in two."""
    import matplotlib.pyplot as plt

    columns = figure.columns or (2 if len(figure.panels) == 4 else min(len(figure.panels), 3))
    rows = -(-len(figure.panels) // columns)
    width, height = PANEL[0] * (0.75 if columns > 3 else 1.0), PANEL[1]
    if named := max(len(panel.y_names) for panel in figure.panels):
        height = 0.7 + ROW * named
    drawn, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for panel, place in zip(figure.panels, axes.flat, strict=False):
        _draw_panel(panel, place)
    for place in list(axes.flat)[len(figure.panels) :]:
        place.set_axis_off()
    handles = _legend(figure, axes)
    # Names of rows, or titles of panels, have the names already.
    said = all(p.y_names or {t.name for t in p.traces} == {p.title} for p in figure.panels)
    if len(handles) > 1 and not said:
        per_row = max(1, min(len(handles), 2 * columns))
        drawn.legend(
            list(handles.values()), [_plain(n) for n in handles], loc="outside upper center", ncols=per_row,
            handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip
    _keep_ticks_apart(drawn)
    return drawn


MOST_THINNINGS = 4


def _keep_ticks_apart(drawn: Any) -> None:
    """Take labels from axes until no two of one axis overlap: minor ones first, then every second."""
    for _ in range(MOST_THINNINGS):
        drawn.canvas.draw()
        crowded = [axis for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis) if has_overlap(tick_boxes(axis))]
        if not crowded:
            return
        for axis in crowded:
            _thin(axis)


def tick_boxes(axis: Any) -> list[Any]:
    """Return the boxes, in pixels, of the labels that an axis shows, in the order of its ticks."""
    ends = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [
        (tick.get_loc(), label)
        for tick in ticks
        for label in (tick.label1, tick.label2)
        if label.get_visible() and label.get_text() and ends[0] <= tick.get_loc() <= ends[1]
    ]
    return [label.get_window_extent() for _, label in sorted(shown, key=lambda found: found[0])]


def has_overlap(boxes: Sequence[Any]) -> bool:
    """Return whether a box overlaps the next."""
    return any(one.overlaps(other) for one, other in pairwise(boxes))


def _thin(axis: Any) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter

    if axis.get_minorticklabels() and any(label.get_text() for label in axis.get_minorticklabels()):
        axis.set_minor_formatter(NullFormatter())
        return
    texts = [label.get_text() for label in axis.get_majorticklabels()]
    if (
        axis.get_scale() == "linear"
        and not isinstance(axis.get_major_formatter(), FixedFormatter)
        and axis.units is None
    ):
        axis.set_major_locator(MaxNLocator(nbins=max(2, len(texts) // 2)))
        return
    places = axis.get_majorticklocs()
    axis.set_major_locator(FixedLocator(places[::2]))
    axis.set_major_formatter(FixedFormatter(texts[::2]))


def _legend(figure: Figure, axes: Any) -> dict[str, Any]:
    """Return name -> artist of the legend: the first strong line of that name, else whatever has it."""
    from matplotlib.lines import Line2D

    handles: dict[str, Any] = {}
    strong: set[str] = set()
    for panel, place in zip(figure.panels, axes.flat, strict=False):
        drawn = getattr(place, "sapo_traces", [])
        for trace, artist in zip(panel.traces, drawn, strict=True):
            weak = trace.faint or trace.kind == "band"
            if trace.name and (trace.name not in handles or (trace.name not in strong and not weak)):
                handles[trace.name] = artist
                if not weak:
                    strong.add(trace.name)
    colors: dict[str, set[int]] = {}
    for trace in (t for panel in figure.panels for t in panel.traces):
        colors.setdefault(trace.name, set()).add(trace.color)
    for name, artist in handles.items():
        # A dash that stands for lines of several colours is drawn in grey.
        if len(colors[name]) > 1 and hasattr(artist, "get_linestyle"):
            handles[name] = Line2D([], [], color="0.35", linestyle=artist.get_linestyle(), linewidth=1.2)
    return dict(list(handles.items())[:MOST_IN_LEGEND])


def _draw_panel(panel: Panel, axes: Any) -> None:
    right = axes.twinx() if panel.second else None
    floors: dict[Any, np.ndarray] = {}
    axes.sapo_traces = [
        _draw_trace(t, right if t.second and right is not None else axes, floors, panel) for t in panel.traces
    ]
    axes.set_xlabel(_math(panel.x))
    axes.set_ylabel(_math(panel.y))
    axes.set_title(_math(panel.title), loc="left")
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log")
    if panel.x_range:
        axes.set_xlim(*panel.x_range)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    if panel.y_names:
        axes.set_yticks(range(len(panel.y_names)), [_plain(name) for name in panel.y_names])
        axes.set_ylim(len(panel.y_names) - 0.5, -0.6)
    if right is not None:
        for own in (axes, right):
            own.margins(x=0)  # a gate reaches to the end of the axis
        right.set_ylabel(_math(panel.second))
        right.set_ylim(0, right.get_ylim()[1] * 1.02)
        right.grid(False)
        right.spines["right"].set_visible(True)
    for mark in panel.marks:
        line = axes.axvline if mark.axis == "x" else axes.axhline
        line(mark.at, color="0.4", linewidth=0.7, linestyle=":")
    if panel.stacked and len({x for t in panel.traces for x in t.x}) > 3:
        axes.tick_params(axis="x", rotation=40)


def _draw_trace(trace: Trace, axes: Any, floors: dict[Any, np.ndarray], panel: Panel) -> Any:
    color = "0.35" if trace.color < 0 else _shaded(PALETTE[trace.color % len(PALETTE)], trace.shade)
    style = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}[trace.dash]
    y = np.array([np.nan if v is None else v for v in trace.y], dtype=float)
    if trace.kind == "band":
        return axes.fill_between(trace.x, trace.low, trace.high, color=color, alpha=0.18, linewidth=0)
    if trace.kind == "bars":
        floor = floors.setdefault("bars", np.zeros(len(y))) if panel.stacked else np.zeros(len(y))
        bars = axes.bar([_plain(str(x)) for x in trace.x], np.nan_to_num(y), bottom=floor, color=color, width=0.6)
        floor += np.nan_to_num(y)
        return bars
    if trace.kind == "steps":
        return axes.plot(trace.x, y, color=color, linestyle=style, linewidth=1.0)[0]
    if trace.kind == "intervals":
        x = np.array(trace.x, dtype=float)
        ends = np.array([x - np.array(trace.low), np.array(trace.high) - x])
        return axes.errorbar(x, y, xerr=ends, fmt="D", color=color, markersize=3.5, linewidth=1.2, capsize=2)
    if trace.kind == "points" and panel.y_names:
        return axes.plot(
            trace.x, y, "x" if trace.crossed else "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0.8
        )[0]
    if trace.kind == "points":
        return axes.plot(trace.x, y, ".", color=color, markersize=2.5, alpha=0.6, rasterized=True)[0]
    width, alpha = (0.5, 0.5) if trace.faint else (1.2, 1.0)
    marker = "o" if trace.markers else None
    return axes.plot(
        trace.x, y, color=color, linestyle=style, linewidth=width, alpha=alpha, marker=marker, markersize=2.5
    )[0]


def _shaded(color: str, shade: int) -> str:
    """Return a colour mixed with white, as the page does in its light theme.

    >>> _shaded("#000000", 0), _shaded("#000000", 1)
    ('#000000', '#555555')
    """
    share = 1 - (2 / 3) ** shade
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part * (1 - share) + 255 * share):02x}" for part in parts)


def _plain(text: str) -> str:
    """Escape a name for matplotlib: $ begins a formula there, and a leading _ hides a legend."""
    return visible(text).replace("$", r"\$").lstrip("_") or "-"


def _math(text: str) -> str:
    """Return an axis label as a formula where it is one of ours, else as text."""
    known = {"Var_i": r"$\mathrm{Var}_i$", "D_i": "$D_i$", "r": "$r$", "value f(r)": "value $f(r)$"}
    known["weight f'(r)"] = "weight $f'(r)$"
    known["A > 0"], known["A ≤ 0"] = "$A > 0$", r"$A \leq 0$"
    return known.get(text, _plain(text) if text else "")
