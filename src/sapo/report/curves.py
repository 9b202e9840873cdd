"""Figures over the steps of runs: reward, pass@1, entropy, gates by sign of the advantage, groups that teach nothing.

An arm of several seeds is a line, the mean, in a band from the lowest to the highest seed; each seed is a thin line of
its own. A single run is one line. Points are what metrics.jsonl holds, unless a caption says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sapo.report.arms import Arm
from sapo.report.figure import Dash, Figure, Panel, Trace
from sapo.report.runs import MOST_POINTS, Run, thinned

Series = tuple[tuple[int, ...], tuple[float, ...]]
Reader = Callable[[Run], Series]

SEEDS = "Several seeds of an arm: the mean in a band from the lowest to the highest, each seed a thin line."


def arm_traces(arm: Arm, read: Reader, *, color: int, name: str = "", dash: Dash = "solid") -> list[Trace]:
    """The line of an arm, with band and seeds where it has several runs that measured the metric; or nothing."""
    name = name or arm.label
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
    # Where a seed is not yet, a mean would be that of other seeds: the line ends with the slowest.
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


def step_panel(arms: Sequence[Arm], metric: str, y: str, title: str = "") -> Panel | None:
    """A metric of kind "step" for every arm that has it."""
    traces = [t for i, arm in enumerate(arms) for t in arm_traces(arm, lambda r: r.series(metric), color=i)]
    return Panel("step", y, tuple(traces), title=title) if traces else None


def evaluated(run: Run, metric: str, task: str | None = None) -> Series:
    """A metric of the evaluations of a task; of the first when None."""
    records = [r for r in run.of_kind("eval") if metric in r]
    task = task or (records[0]["task"] if records else None)
    return thinned([(r["step"], r[metric]) for r in records if r["task"] == task])


def pass_at_1(run: Run, task: str | None = None) -> Series:
    """Held-out pass@1 by step, under whichever name the evaluation gives it."""
    found = evaluated(run, "pass@1", task)
    if found[0]:
        return found
    names = [k for r in run.of_kind("eval")[:1] for k in r if k.startswith("mean@")]
    return evaluated(run, names[0], task) if names else ((), ())


def pass_panel(arms: Sequence[Arm], task: str | None = None, title: str = "") -> Panel | None:
    """Held-out pass@1; a single run lies in the band of its own 95% interval over problems."""
    traces: list[Trace] = []
    for i, arm in enumerate(arms):
        lines = arm_traces(arm, lambda run: pass_at_1(run, task), color=i)
        if len(lines) == 1 and (interval := _interval_of(arm.runs, task, i, arm.label)) is not None:
            lines.insert(0, interval)
        traces += [_with_markers(t) for t in lines]
    return Panel("step", "pass@1", tuple(traces), title=title) if traces else None


def _interval_of(runs: Sequence[Run], task: str | None, color: int, name: str) -> Trace | None:
    [run] = [r for r in runs if pass_at_1(r, task)[0]]
    x, low = evaluated(run, "pass@1/low", task)
    _, high = evaluated(run, "pass@1/high", task)
    return Trace("band", x, low=low, high=high, name=name, color=color) if x else None


def _with_markers(trace: Trace) -> Trace:
    return replace(trace, markers=True) if trace.kind == "line" and not trace.faint else trace


def single(key: str, title: str, panel: Panel | None, *, caption: str = "", missing: str) -> Figure:
    """A figure of one panel, or why there is none."""
    if panel is None:
        return Figure(key, title, missing=f"Not measured: {missing}")
    return Figure(key, title, caption, (panel,))


def learning_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Reward, pass@1, entropy and the share of groups that teach nothing."""
    long = any(len(run.of_kind("step")) > MOST_POINTS for arm in arms for run in arm.runs)
    note = f" Of the longest runs every n-th step is drawn, {MOST_POINTS} points at most." if long else ""
    several = f" {SEEDS}" if any(len(arm.runs) > 1 for arm in arms) else ""
    entropy = [t for i, arm in enumerate(arms) for t in arm_traces(arm, lambda r: r.series("update/entropy"), color=i)]
    return [
        single(
            "reward",
            "Training reward",
            step_panel(arms, "reward/mean", "mean reward"),
            caption="Mean reward of all that a step sampled." + several + note,
            missing="no step is done yet.",
        ),
        single(
            "pass1",
            "Held-out pass@1",
            pass_panel(arms),
            caption="Mean over held-out problems of the share of right completions. A single run: with its 95% "
            "bootstrap interval over problems." + several,
            missing="no evaluation was made; eval.every=N evaluates every N steps.",
        ),
        single(
            "entropy",
            "Entropy",
            Panel("step", "nats per token", tuple(entropy)) if entropy else None,
            caption="Entropy of the policy at response tokens that carried a gradient, mean over the step's updates."
            + several,
            missing="entropy was not asked for; train.entropy=true logs it.",
        ),
        single(
            "zero_variance",
            "Groups that teach nothing",
            step_panel(arms, "groups/zero_variance", "share of groups"),
            caption="Share of the prompts whose samples all have the same reward: every advantage is 0." + several,
            missing="no step is done yet.",
        ),
    ]


LAST_UPDATE = "Values of each step's last update, the farthest off policy, as logged."


def gate_figures(arms: Sequence[Arm]) -> list[Figure]:
    """EUR and the lower end of the gate weights, positive and negative advantages apart."""
    eur = _by_sign(arms, {"pos": "gate/eur_pos", "neg": "gate/eur_neg"})
    if eur is not None:
        caption = (
            "EUR, the mean gate weight of tokens of positive (solid) and of negative (dashed) advantage; for a hard "
            f"clip it is the share of tokens that are not clipped. {LAST_UPDATE}"
        )
        figures = [Figure("eur", "Effective update ratio by sign", caption, (eur,))]
    else:
        figures = [Figure("eur", "Effective update ratio by sign", missing="Not measured: no update is done yet.")]
    return [*figures, _low_weights(arms), _counterfactuals(arms)]


NO_COUNTERFACTUALS = (
    "Not measured: no update was asked what other gates would have weighed its tokens; "
    "diagnostics.counterfactuals_every=N asks every N steps."
)


def _counterfactuals(arms: Sequence[Arm]) -> Figure:
    """EUR that other gates would have had on the same tokens: a line for each gate, for the first arm that asked."""
    title, prefix, ending = "What other gates would have kept", "counterfactual/", "/eur"
    for arm in arms:
        logged = dict.fromkeys(k for run in arm.runs for r in run.last_updates for k in r if k.startswith(prefix))
        names = [k.removeprefix(prefix).removesuffix(ending) for k in logged if k.endswith(ending)]
        traces: list[Trace] = []
        for color, name in enumerate(names):
            read = partial(_of_last_updates, metric=f"{prefix}{name}{ending}")
            traces += arm_traces(arm, read, color=color, name=name)
        if traces:
            whose = f" Of {arm.label}." if len(arms) > 1 else ""
            caption = (
                "EUR of other gates on the tokens and ratios of this run's updates: what each would have left of them."
                f"{whose} {LAST_UPDATE}"
            )
            return Figure("counterfactual", title, caption, (Panel("step", "EUR", tuple(traces)),))
    return Figure("counterfactual", title, missing=NO_COUNTERFACTUALS)


def _of_last_updates(run: Run, metric: str) -> Series:
    return thinned([(r["step"], r[metric]) for r in run.last_updates if metric in r])


def _by_sign(arms: Sequence[Arm], names: dict[str, str], y: str = "EUR") -> Panel | None:
    dashes: dict[str, Dash] = {"pos": "solid", "neg": "dash"}
    traces: list[Trace] = []
    for i, arm in enumerate(arms):
        for side, metric in names.items():
            words = "A > 0" if side == "pos" else "A ≤ 0"
            name = arm.label if len(arms) > 1 else words
            color = i if len(arms) > 1 else (0 if side == "pos" else 1)
            read = partial(_of_last_updates, metric=metric)
            traces += arm_traces(arm, read, color=color, name=name, dash=dashes[side])
    return Panel("step", y, tuple(traces)) if traces else None


# Names under which a low quantile of the gate weights is logged by sign, the preferred first.
LOW_QUANTILES = (("gate/p01_pos", "gate/p01_neg", "1% quantile of the weight"),)


def _low_weights(arms: Sequence[Arm]) -> Figure:
    """How low the gate goes: by sign where that was logged, else the smallest weight of all tokens."""
    title = "The gate's lowest weights"
    for pos, neg, words in LOW_QUANTILES:
        panel = _by_sign(arms, {"pos": pos, "neg": neg}, words)
        if panel is not None:
            caption = f"Positive (solid) and negative (dashed) advantages. {LAST_UPDATE}"
            return Figure("low_weights", title, caption, (panel,))
    traces: list[Trace] = []
    for i, arm in enumerate(arms):
        traces += arm_traces(arm, partial(_of_last_updates, metric="gate/min"), color=i)
    if not traces:
        return Figure("low_weights", title, missing="Not measured: no update is done yet.")
    panel = Panel("step", "smallest gate weight", tuple(traces))
    caption = f"The smallest gate weight of any token; quantiles by sign were not logged. {LAST_UPDATE}"
    return Figure("low_weights", title, caption, (panel,))
