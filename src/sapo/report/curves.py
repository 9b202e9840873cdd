"""Figures over the steps of runs: mean reward, pass@1, entropy, zero-variance groups, what routing replay changed.

An arm of several seeds is a line, the mean, in a band from the lowest to the highest seed; each seed is a thin line of
its own. A single run is one line. Points are what metrics.jsonl holds, unless a caption says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sapo.diagnostics.titles import MetricTitle, metric_title
from sapo.report.arms import Arm, by_rate
from sapo.report.figure import DASHES, Dash, Figure, Panel, Trace, share_axis
from sapo.report.runs import MOST_POINTS, ReportedRun, thinned

Series = tuple[tuple[int, ...], tuple[float, ...]]
Reader = Callable[[ReportedRun], Series]

MOST_BANDS = 5
"""Largest number of arms with bands on one pair of axes: more bands would hide each other. The seeds' lines stay."""

SEEDS = (
    "Several seeds of an arm: the mean in a band from the lowest to the highest, each seed a thin line"
    f" (no bands where more than {MOST_BANDS} arms share axes)."
)


def arm_traces(
    arm: Arm,
    read: Reader,
    *,
    color: int | None = None,
    name: str = "",
    dash: Dash | None = None,
    place: int | None = None,
) -> list[Trace]:
    """Draw the line of an arm, with band and seeds where several of its runs have the metric; nothing where none
    has.

    Args:
        color: in place of the arm's own.
        place: of its learning rate, in place of the arm's own; a dash or a shade tells it.
        dash: in place of that of the learning rate.
    """
    place = arm.place if place is None else place
    shade = 0 if dash is not None else place // len(DASHES)
    dash = DASHES[place % len(DASHES)] if dash is None else dash
    made = _arm_traces(arm, read, arm.color if color is None else color, name or arm.name, dash)
    return [replace(trace, shade=shade) for trace in made] if shade else made


def _arm_traces(arm: Arm, read: Reader, color: int, name: str, dash: Dash) -> list[Trace]:
    measured = [(run, *read(run)) for run in arm.runs]
    measured = [(run, x, y) for run, x, y in measured if x]
    if not measured:
        return []
    if len(measured) == 1:
        run, x, y = measured[0]
        return [Trace("line", x, y, name=name, color=color, dash=dash, hover=run.name, markers=len(x) < 3)]
    values: dict[int, list[float]] = {}
    for _, x, y in measured:
        for at, value in zip(x, y, strict=True):
            values.setdefault(at, []).append(value)
    # The mean ends with the slowest seed: beyond it, it would be a mean of other seeds.
    common = sorted(at for at, found in values.items() if len(found) == len(measured))
    low, high = (tuple(pick(values[at]) for at in common) for pick in (min, max))
    mean = tuple(sum(values[at]) / len(values[at]) for at in common)
    traces = [Trace("band", tuple(common), low=low, high=high, name=name, color=color)] if common else []
    for run, x, y in measured:
        hover = f"seed {run.setting('seed')}, {run.name}"
        traces.append(Trace("line", x, y, name=name, color=color, faint=True, dash=dash, hover=hover))
    if common:
        hover = f"mean of {len(measured)} seeds"
        traces.append(Trace("line", tuple(common), mean, name=name, color=color, dash=dash, hover=hover))
    return traces


def rate_panels(
    arms: Sequence[Arm], x: str, y: str, draw: Callable[[Arm], list[Trace]], title: str = ""
) -> list[Panel]:
    """Draw each arm by `draw`, on one pair of axes for each learning rate of a comparison; axes without a trace are
    left out."""
    panels = []
    for rate, own in by_rate(arms):
        traces = [trace for arm in own for trace in draw(arm)]
        if len(own) > MOST_BANDS:
            traces = [trace for trace in traces if trace.kind != "band"]
        if traces:
            panels.append(Panel(x, y, tuple(traces), title=", ".join(filter(None, (rate, title)))))
    return share_axis(share_axis(panels), "x")


def step_panels(arms: Sequence[Arm], metric: str) -> list[Panel]:
    """Draw a metric of kind "step" of every arm that has it."""
    label = metric_title("step", metric).label
    return rate_panels(arms, "step", label, lambda arm: arm_traces(arm, lambda run: run.series(metric)))


def evaluated(run: ReportedRun, metric: str, task: str | None = None) -> Series:
    """Return a metric of the evaluations of a task by step; of the first task when None."""
    records = [r for r in run.of_kind("eval") if metric in r]
    task = task or (records[0]["task"] if records else None)
    return thinned([(r["step"], r[metric]) for r in records if r["task"] == task])


def held_out_title(arms: Sequence[Arm], task: str | None = None) -> MetricTitle:
    """Return the title of what is drawn of held-out problems: pass@1, or the mean reward where some run saw rewards
    other than 0 and 1.

    Args:
        task: of this one; None: all tasks have to have graded rewards for the title to say so.
    """
    tasks = [task] if task is not None else _tasks_of(arms)
    graded = bool(tasks) and all(any(_is_graded(run, name) for arm in arms for run in arm.runs) for name in tasks)
    return MetricTitle("held-out mean reward") if graded else metric_title("eval", "pass@1")


def _tasks_of(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(r["task"] for arm in arms for run in arm.runs for r in run.of_kind("eval")))


def _is_graded(run: ReportedRun, task: str | None) -> bool:
    """Tell whether a task of a run, its first when None, had rewards other than 0 and 1."""
    records = run.of_kind("eval")
    return any(not r.get("binary", True) for r in records if r["task"] == (task or records[0]["task"]))


def held_out(run: ReportedRun, task: str | None = None) -> Series:
    """Return held-out pass@1 by step, from mean@n where the evaluation has no pass@1; the mean reward where rewards are
    graded."""
    if _is_graded(run, task):
        return evaluated(run, "reward/mean", task)
    found = evaluated(run, "pass@1", task)
    if found[0]:
        return found
    names = [k for r in run.of_kind("eval") for k in r if k.startswith("mean@")]
    return evaluated(run, names[0], task) if names else ((), ())


def pass_panels(arms: Sequence[Arm]) -> list[Panel]:
    """Draw held-out pass@1 or mean reward, on axes for each task; a single run has the band of its 95% interval over
    problems."""
    tasks = _tasks_of(arms)
    panels = [
        panel
        for task in tasks
        for panel in rate_panels(
            arms,
            "step",
            held_out_title(arms, task).label,
            partial(pass_traces, task=task),
            task if len(tasks) > 1 else "",
        )
    ]
    return share_axis(share_axis(panels), "x")


def pass_traces(
    arm: Arm, task: str | None = None, *, color: int | None = None, name: str = "", place: int | None = None
) -> list[Trace]:
    """Draw held-out pass@1 or mean reward of one arm."""
    lines = arm_traces(arm, lambda run: held_out(run, task), color=color, name=name, place=place)
    if len(lines) == 1 and not any(_is_graded(r, task) for r in arm.runs):
        [run] = [r for r in arm.runs if held_out(r, task)[0]]
        x, low = evaluated(run, "pass@1/low", task)
        _, high = evaluated(run, "pass@1/high", task)
        if x:
            lines.insert(0, Trace("band", x, low=low, high=high, name=lines[0].name, color=lines[0].color))
    return [_with_markers(t) for t in lines]


def _with_markers(trace: Trace) -> Trace:
    return replace(trace, markers=True) if trace.kind == "line" and not trace.faint else trace


def in_figure(key: str, title: str, panels: Sequence[Panel], *, caption: str = "", missing: str = "") -> Figure:
    """Make a figure of these panels, or a figure that says why there are none."""
    if not panels:
        return Figure(key, title, missing=f"Not measured: {missing}")
    columns = 3 if len(panels) % 3 == 0 else min(len(panels), 2)
    return Figure(key, title, caption, tuple(panels), wide=len(panels) > 1, columns=columns)


def learning_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Make the figures of mean reward, held-out pass@1, entropy and zero-variance groups."""
    long = any(len(run.of_kind("step")) > MOST_POINTS for arm in arms for run in arm.runs)
    note = f" Of the longest runs every n-th step is drawn, {MOST_POINTS} points at most." if long else ""
    several = f" {SEEDS}" if any(len(arm.runs) > 1 for arm in arms) else ""
    return [
        in_figure(
            "reward",
            metric_title("step", "reward/mean").heading,
            step_panels(arms, "reward/mean"),
            caption="Mean reward of all completions that a step sampled." + several + note,
            missing="no step is done yet.",
        ),
        in_figure(
            "pass1",
            held_out_title(arms).heading,
            pass_panels(arms),
            caption="Mean over held-out problems of the share of right completions, or of the reward where rewards are "
            "not 0 and 1. A single run: pass@1 with its 95% bootstrap interval over problems." + several,
            missing="no evaluation was made; eval.every=N evaluates every N steps.",
        ),
        in_figure(
            "entropy",
            metric_title("step", "update/entropy").heading,
            step_panels(arms, "update/entropy"),
            caption="Entropy of the policy at response tokens that carried a gradient, mean over the step's updates."
            + several,
            missing="entropy was not asked for; train.entropy=true logs it.",
        ),
        in_figure(
            "zero_variance",
            metric_title("step", "groups/zero_variance").heading,
            step_panels(arms, "groups/zero_variance"),
            caption="Share of the groups whose samples all have the same reward: every advantage is 0." + several,
            missing="no step is done yet.",
        ),
        *_routing(arms, several),
    ]


def _routing(arms: Sequence[Arm], several: str) -> list[Figure]:
    """Make the figure of what routing replay changed; no figure where no run replays."""
    metric = "update/routing/changed_share"
    panels = step_panels(arms, metric)
    if not panels:
        return []
    caption = (
        "Routing replay: the experts a batch was sampled with are those of all its updates. Share of these choices "
        "(token, layer, place) that the live router would not have made, mean over the step's updates." + several
    )
    return [in_figure("routing", metric_title("step", metric).heading, panels, caption=caption)]
