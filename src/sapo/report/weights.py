"""What the gate takes away: 1 - EUR by the sign of the advantage, the lowest weights, and what other gates would take.

1 - EUR is the share of the gradient's weight that is lost. Gates differ in it by powers of ten, so its axes are
logarithmic, over the six decades below the largest value. Smaller values and 0 are gaps, and the caption counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm
from sapo.report.curves import Series, arm_traces, in_figure, rate_panels
from sapo.report.figure import Dash, Figure, Panel, Trace, share_axis
from sapo.report.gates import gate_curve, objective_of
from sapo.report.runs import ReportedRun, thinned

LAST_UPDATE = "Values of each step's last update, the farthest off policy, as logged."

LOST = f"1 - {metric_title('update', 'gate/eur').label}"


def gate_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Make the figures of the weight that is lost and of the lowest gate weights, by sign, and of what other gates
    would have lost."""
    return [_lost(arms), _low_weights(arms), _counterfactuals(arms)]


def _lost(arms: Sequence[Arm]) -> Figure:
    names = {"pos": "gate/eur_pos", "neg": "gate/eur_neg"}
    panels, words = on_log_axes(_by_sign(arms, names, LOST, together=len(arms) == 1, lost=True))
    return in_figure(
        "eur",
        "Gradient weight lost to the gate, by sign",
        panels,
        caption="1 - EUR, the share of the gradient's weight that is lost: 1 less the mean gate weight of tokens of "
        "positive and of negative advantage. For a hard clip it is the share of tokens that are clipped. "
        f"{LAST_UPDATE}{words}",
        missing="no update logged its gate weights by sign.",
    )


NO_COUNTERFACTUALS = (
    "Not measured: no update computed the weights that other gates would have given its tokens; "
    "diagnostics.counterfactuals_every=N does so every N steps."
)


def _counterfactuals(arms: Sequence[Arm]) -> Figure:
    """Draw what other gates would have lost of the same tokens: a line for each gate, axes for each arm."""
    key, title, prefix, ending = (
        "counterfactual",
        "Gradient weight that other gates would have lost",
        "counterfactual/",
        "/eur",
    )
    asked = [
        (arm, dict.fromkeys(k for run in arm.runs for r in run.last_updates for k in r if k.startswith(prefix)))
        for arm in arms
    ]
    names = [k.removeprefix(prefix).removesuffix(ending) for _, own in asked for k in own if k.endswith(ending)]
    gates = list(dict.fromkeys(names))
    panels = []
    for arm, logged in asked:
        traces: list[Trace] = []
        for color, name in enumerate(gates):
            if (metric := f"{prefix}{name}{ending}") in logged:
                read = partial(_of_last_updates, metric=metric, lost=True)
                traces += arm_traces(arm, read, color=color, name=name)
        if traces:
            panels.append(Panel("step", LOST, tuple(traces), title=arm.label if len(arms) > 1 else ""))
    if not panels:
        return Figure(key, title, missing=NO_COUNTERFACTUALS)
    panels, words = on_log_axes(panels)
    whose = "an arm's updates, which trained by its own gate" if len(arms) > 1 else "this run's updates"
    caption = (
        f"1 - EUR of other gates on the tokens and ratios of {whose}: the share of the gradient's weight that each "
        f"would have lost. {LAST_UPDATE}{words}"
    )
    return Figure(key, title, caption, tuple(panels), wide=len(panels) > 1, columns=min(len(panels), 4))


DECADES = 6
"""Decades below the largest value that a figure shows: where all ratios are 1, the loss is rounding, near 1e-14."""


def on_log_axes(panels: Sequence[Panel]) -> tuple[list[Panel], str]:
    """Give panels one logarithmic range; return them with a sentence on the values that become gaps.

    A value alone between two gaps is a point. A band has a gap where it would reach below the range.
    """
    every = [v for p in panels for t in p.traces for v in (*t.y, *t.low, *t.high) if v is not None and v > 0]
    if not every:
        return list(panels), ""  # on linear axes, as they are
    least = max(every) / 10**DECADES
    floor = min(v for v in every if v >= least)
    made = []
    for panel in panels:
        found = [own for trace in panel.traces for own in _above(trace, floor)]
        found.sort(key=lambda trace: trace.kind == "points")  # points last, so that the lines keep their order
        if found:
            made.append(replace(panel, y_log=True, y_range=None, traces=tuple(found)))
    return share_axis(share_axis(made), "x"), _unseen(panels, floor)


def _unseen(panels: Sequence[Panel], floor: float) -> str:
    """Return how many logged values are gaps, and which lines are nothing but gaps."""
    lines = [(p, t) for p in panels for t in p.traces if t.kind == "line"]
    averaged = {(id(p), t.name) for p, t in lines if t.faint}
    logged = [(p, t) for p, t in lines if t.faint or (id(p), t.name) not in averaged]
    values = [v for _, t in logged for v in t.y if v is not None]
    small, below = sum(0 <= v < floor for v in values), sum(v < 0 for v in values)
    whole = {
        ": ".join(filter(None, (p.title, t.name))): None for p, t in logged if all(v is None or v < floor for v in t.y)
    }
    words = ""
    if small:
        words += (
            f" {small:,} of {len(values):,} values are 0 or less than a millionth of the largest: gaps, for a log axis "
            "has no 0."
        )
    if below:
        words += f" {below:,} of {len(values):,} values are below 0, of weights above 1: gaps."
    if whole:
        words += f" No value of {'; '.join(whole)} is drawn."
    return words


def _above(trace: Trace, floor: float) -> Iterator[Trace]:
    """Leave gaps where a line is below the floor, and make points of what stands alone; of a band keep what lies above
    the floor."""
    if trace.kind != "band":
        y = tuple(v if v is not None and v >= floor else None for v in trace.y)
        if any(v is not None for v in y):
            yield replace(trace, y=y)
            around = (None, *y, None)
            alone = [i for i, v in enumerate(y) if v is not None and around[i] is None and around[i + 2] is None]
            if alone:
                x, points = (tuple(values[i] for i in alone) for values in (trace.x, y))
                yield replace(trace, kind="points", x=x, y=points, faint=False, markers=False, dash="solid")
        return
    stretch: list[int] = []
    for place in range(len(trace.x) + 1):
        if place < len(trace.x) and trace.low[place] >= floor:
            stretch.append(place)
        elif stretch:
            x, high = (tuple(values[i] for i in stretch) for values in (trace.x, trace.high))
            yield replace(trace, x=x, low=tuple(trace.low[i] for i in stretch), high=high)
            stretch = []


def _of_last_updates(run: ReportedRun, metric: str, lost: bool = False) -> Series:
    """Return a metric of each step's last update, or with `lost` 1 less it."""
    return thinned([(r["step"], 1 - r[metric] if lost else r[metric]) for r in run.last_updates if metric in r])


def _by_sign(arms: Sequence[Arm], names: dict[str, str], y: str, *, together: bool, lost: bool = False) -> list[Panel]:
    """Draw each sign on axes of its own, or both together where one arm is shown alone."""
    if together:
        signs: dict[str, tuple[int, Dash]] = {"A > 0": (0, "solid"), "A ≤ 0": (1, "dash")}
        traces: list[Trace] = []
        for metric, (words, (color, dash)) in zip(names.values(), signs.items(), strict=True):
            read = partial(_of_last_updates, metric=metric, lost=lost)
            for arm in arms:
                traces += arm_traces(arm, read, color=color, name=words, dash=dash)
        return [Panel("step", y, tuple(traces))] if traces else []

    def panels(metric: str, words: str) -> list[Panel]:
        read = partial(_of_last_updates, metric=metric, lost=lost)
        return rate_panels(arms, "step", y, lambda arm: arm_traces(arm, read), words)

    return share_axis([*panels(names["pos"], "A > 0"), *panels(names["neg"], "A ≤ 0")])


_PROBED = np.exp(np.linspace(-6.0, 6.0, 241))
"""Ratios at which a gate is probed for weights between 0 and 1."""


def is_hard(arm: Arm) -> bool:
    """Tell whether the arm's gate is a clip: every weight is 1 or 0, and some are 0.

    >>> from pathlib import Path
    >>> is_hard(Arm("grpo", (ReportedRun("q", Path("q"), {"objective": {"name": "grpo"}}, (), None),)))
    True
    """
    objective = objective_of(arm.objective)
    if objective is None or objective.needs_old_logprob:
        return False
    weights = {float(w) for sign in (1, -1) for w in gate_curve(objective, _PROBED, sign)[1]}
    return weights == {0.0, 1.0}


def _low_weights(arms: Sequence[Arm]) -> Figure:
    """Draw how low the gate goes: quantiles by sign of a soft gate, or the smallest weight where these were not logged;
    of a hard clip, whose quantiles are 0 or 1, the share of clipped tokens."""
    key, title, missing = "low_weights", "The gate's lowest weights", "no update logged its gate weights."
    hard = [arm for arm in arms if is_hard(arm)]
    clips = {arm.label for arm in hard}
    soft = [arm for arm in arms if arm.label not in clips]
    panels, captions = [], []
    together = len(arms) == 1
    low, share = (metric_title("update", name).label for name in ("gate/p01_pos", "gate/below_half"))
    if own := _by_sign(soft, {"pos": "gate/p01_pos", "neg": "gate/p01_neg"}, low, together=together):
        captions.append("One token in a hundred weighs less than the 1% quantile.")
    elif own := _of_all(soft, "gate/min", metric_title("update", "gate/min").label):
        captions.append("The smallest gate weight of any token; quantiles by sign were not logged.")
    panels += own
    own = _by_sign(hard, {"pos": "gate/below_half_pos", "neg": "gate/below_half_neg"}, share, together=together)
    if own := own or _of_all(hard, "gate/below_half", share):
        whose = f" ({', '.join(dict.fromkeys(arm.name for arm in hard))})" if len(arms) > 1 else ""
        captions.append(
            f"A hard clip{whose} weighs a token 1 or 0, so that its quantiles are 1 or 0 too: the share of tokens that "
            "weigh less than a half is shown, which it clips."
        )
    panels += own
    return in_figure(key, title, panels, caption=" ".join([*captions, LAST_UPDATE]), missing=missing)


def _of_all(arms: Sequence[Arm], metric: str, y: str) -> list[Panel]:
    """Draw a metric over the tokens of both signs."""
    read = partial(_of_last_updates, metric=metric)
    return rate_panels(arms, "step", y, lambda arm: arm_traces(arm, read))
