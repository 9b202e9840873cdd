"""The figures of a comparison: final pass@1 and paired differences with intervals and every seed, and curves by arm.

Where rewards are graded, the mean reward stands in place of pass@1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm, arm_in_comparison
from sapo.report.compared import ReportedComparison
from sapo.report.curves import MOST_BANDS, arm_traces, held_out_title, pass_traces
from sapo.report.figure import Figure, Mark, Panel, Trace, share_axis
from sapo.workflows.comparing.plan import format_rate

SEED_ABOVE = -0.22
"""How far the points of seeds lie above their arm's interval, as a share of a row."""

MOST_COLUMNS = 4


def comparison_figures(comparison: ReportedComparison, arms: Sequence[Arm], prefix: str = "compared") -> list[Figure]:
    """Make the figures of one comparison.

    Args:
        arms: those of its runs.
        prefix: of the figures' keys.
    """
    several = len(comparison.tasks) > 1
    colors = {arm_in_comparison(arm): arm.color for arm in arms}
    panels = partial(_panels, comparison, colors=colors)
    figures = []
    for place, task in enumerate(comparison.tasks, 1):
        key, of = (f"{prefix}-task{place}", f", {task}") if several else (prefix, "")
        figure = comparison.figure_of(task)
        final = panels(task, _final, f"final {figure}")
        figures.append(_figure(f"{key}-final", f"Final {figure}{of}", FINAL, final))
        baseline = comparison.results["baseline"]
        differences = panels(task, _difference, f"final {figure} less that of {baseline}")
        if differences:
            figures.append(_figure(f"{key}-difference", f"Difference from {baseline}{of}", DIFFERENCE, differences))
        title = held_out_title(arms, task)
        curves = _curves(arms, title.label, partial(pass_traces, task=task))
        figures += _by_arm(f"{key}-pass1", f"{title.heading} by arm{of}", curves)
    reward = metric_title("step", "reward/mean")
    rewards = _curves(arms, reward.label, _reward_traces)
    return [*figures, *_by_arm(f"{prefix}-reward", f"{reward.heading} by arm", rewards)]


FINAL = (
    "Last evaluation: a point for each seed, under them the mean with its 95% bootstrap interval over seeds and "
    "problems. The dotted line is where the arms start on average. A cross is a run that failed: it counts as 0, or as "
    "its lowest evaluation below 0."
)
DIFFERENCE = (
    "Paired: the same seeds at the same learning rate, on the same problems; 95% bootstrap intervals over both. Points "
    "are single seeds. An interval that touches the dotted line at 0 shows no difference."
)


BY_ARM = (
    "The same axes for every arm; learning rates differ by dash. Several seeds: the mean in a band from the lowest to "
    "the highest, each seed a thin line."
)


def _figure(key: str, title: str, caption: str, panels: Sequence[Panel]) -> Figure:
    return Figure(key, title, caption, tuple(panels), wide=len(panels) > 1, columns=min(len(panels), 3))


Draw = Callable[[ReportedComparison, str, float, Sequence[str]], tuple[list[Trace], float]]
"""Returns the traces at one learning rate, and the place of the dotted line."""


def _panels(comparison: ReportedComparison, task: str, draw: Draw, x: str, *, colors: Mapping[str, int]) -> list[Panel]:
    """Draw a panel for each learning rate, with a row for each arm."""
    names, rates = list(comparison.results["arms"]), comparison.results["learning_rates"]
    panels = []
    for rate in rates:
        traces, mark = draw(comparison, task, rate, names)
        traces = [replace(trace, color=colors.get(trace.name, trace.color)) for trace in traces]
        if traces:
            title = f"lr {format_rate(rate)}" if len(rates) > 1 else ""
            panels.append(Panel(x, "", tuple(traces), title, marks=(Mark("x", mark),), y_names=tuple(names)))
    return share_axis(panels, "x")


def _final(comparison: ReportedComparison, task: str, rate: float, names: Sequence[str]) -> tuple[list[Trace], float]:
    traces: list[Trace] = []
    cells = [c for c in comparison.cells(task) if c["learning_rate"] == rate]
    for cell in cells:
        row = names.index(cell["arm"])
        ended = [r for r in _runs(comparison, cell["arm"], rate) if r["state"] != "unfinished" and task in r["tasks"]]
        for failed in (False, True):
            own = [r for r in ended if (r["state"] == "failed") == failed]
            values = [_final_of(r, task) or 0.0 for r in own]
            hovers = [
                f"seed {r['seed']}" + f": failed, counts as {v:g}" * failed for r, v in zip(own, values, strict=True)
            ]
            traces += _seeds(cell["arm"], row, values, hovers, crossed=failed)
        traces.append(_interval(cell["arm"], row, cell["final"], f"mean of {len(cell['seeds'])} seeds"))
    starts = [c["start"]["value"] for c in cells]
    return traces, sum(starts) / len(starts) if starts else 0.0


def _difference(
    comparison: ReportedComparison, task: str, rate: float, names: Sequence[str]
) -> tuple[list[Trace], float]:
    traces: list[Trace] = []
    baseline = {
        r["seed"]: final
        for r in _runs(comparison, comparison.results["baseline"], rate)
        if (final := _final_of(r, task)) is not None
    }
    for cell in comparison.cells(task):
        if cell["learning_rate"] == rate and cell["difference"] is not None:
            row = names.index(cell["arm"])
            pairs = {
                r["seed"]: final - baseline[r["seed"]]
                for r in _runs(comparison, cell["arm"], rate)
                if r["seed"] in baseline and (final := _final_of(r, task)) is not None
            }
            traces += _seeds(cell["arm"], row, list(pairs.values()), [f"seed {seed}" for seed in pairs])
            traces.append(_interval(cell["arm"], row, cell["difference"], f"mean of {len(pairs)} pairs"))
    return traces, 0.0


def _runs(comparison: ReportedComparison, arm: str, rate: float) -> list[Any]:
    return [r for r in comparison.results["runs"] if r["arm"] == arm and r["learning_rate"] == rate]


def _final_of(run: Any, task: str) -> float | None:
    """Return the final figure that counts, of a run that failed too; None of one that has not ended."""
    if run["state"] == "unfinished" or task not in run["tasks"]:
        return None
    of_task = run["tasks"][task]
    return float(of_task.get("counts_as", 0.0) if run["state"] == "failed" else of_task["final"])


def _seeds(arm: str, row: int, values: Sequence[float], hovers: Sequence[str], crossed: bool = False) -> list[Trace]:
    if not values:
        return []
    rows = (row + SEED_ABOVE,) * len(values)
    return [Trace("points", tuple(values), rows, name=arm, color=row, hovers=tuple(hovers), crossed=crossed)]


def _interval(arm: str, row: int, estimate: Any, hover: str) -> Trace:
    return Trace(
        "intervals", (estimate["value"],), (float(row),), (estimate["low"],), (estimate["high"],), name=arm, color=row,
        hover=hover,
    )  # fmt: skip


def _reward_traces(arm: Arm, *, name: str = "", place: int | None = None) -> list[Trace]:
    return arm_traces(arm, lambda run: run.series("reward/mean"), name=name, place=place)


def _curves(arms: Sequence[Arm], y: str, draw: Callable[..., list[Trace]]) -> list[Panel]:
    """Draw axes for each arm, in its colour; several learning rates have a dash each.

    Nothing where the axes of the story, which have every arm at one learning rate, show the same lines and few of them.
    """
    rates = list(dict.fromkeys(arm.rate for arm in arms))
    if len(rates) == 1 and len(arms) <= MOST_BANDS:
        return []
    panels = []
    for name in dict.fromkeys(arm.name for arm in arms):
        traces: list[Trace] = []
        for arm in arms:
            if arm.name == name:
                traces += draw(arm, name=arm.rate, place=rates.index(arm.rate)) if arm.rate else draw(arm)
        if traces:
            panels.append(Panel("step", y, tuple(traces), title=name))
    return share_axis(share_axis(panels), "x")


def _by_arm(key: str, title: str, panels: Sequence[Panel]) -> list[Figure]:
    if not panels:
        return []
    columns = min(len(panels), MOST_COLUMNS)
    return [Figure(key, title, BY_ARM, tuple(panels), wide=True, columns=columns)]
