"""Figures over the steps of runs: reward, pass@1, entropy, gates by sign of the advantage, groups that teach nothing.

An arm of several seeds is a line, the mean, in a band from the lowest to the highest seed; each seed is a thin line of
its own. A single run is one line. Points are what metrics.jsonl holds, unless a caption says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sapo.report.arms import Arm, by_rate
from sapo.report.figure import Dash, Figure, Panel, Trace, share_axis
from sapo.report.runs import MOST_POINTS, Run, thinned

Series = tuple[tuple[int, ...], tuple[float, ...]]
Reader = Callable[[Run], Series]

MOST_BANDS = 5
"""Arms on one pair of axes that have bands: those of more would hide each other. The seeds' lines stay."""

SEEDS = (
    "Several seeds of an arm: the mean in a band from the lowest to the highest, each seed a thin line"
    f" (no bands where more than {MOST_BANDS} arms share axes)."
)


def arm_traces(
    arm: Arm, read: Reader, *, color: int | None = None, name: str = "", dash: Dash = "solid"
) -> list[Trace]:
    """The line of an arm, with band and seeds where it has several runs that measured the metric; or nothing."""
    name, color = name or arm.name, arm.color if color is None else color
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


def rate_panels(
    arms: Sequence[Arm], x: str, y: str, draw: Callable[[Arm], list[Trace]], title: str = ""
) -> list[Panel]:
    """What `draw` makes of each arm, on axes for each learning rate that a comparison has; none where it makes
    nothing."""
    panels = []
    for rate, own in by_rate(arms):
        traces = [trace for arm in own for trace in draw(arm)]
        if len(own) > MOST_BANDS:
            traces = [trace for trace in traces if trace.kind != "band"]
        if traces:
            panels.append(Panel(x, y, tuple(traces), title=", ".join(filter(None, (rate, title)))))
    return share_axis(share_axis(panels), "x")


def step_panels(arms: Sequence[Arm], metric: str, y: str) -> list[Panel]:
    """A metric of kind "step" for every arm that has it."""
    return rate_panels(arms, "step", y, lambda arm: arm_traces(arm, lambda run: run.series(metric)))


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


def pass_panels(arms: Sequence[Arm], task: str | None = None) -> list[Panel]:
    """Held-out pass@1; a single run lies in the band of its own 95% interval over problems."""
    return rate_panels(arms, "step", "pass@1", partial(pass_traces, task=task))


def pass_traces(arm: Arm, task: str | None = None, *, color: int | None = None, name: str = "") -> list[Trace]:
    """Held-out pass@1 of one arm."""
    lines = arm_traces(arm, lambda run: pass_at_1(run, task), color=color, name=name)
    if len(lines) == 1:
        [run] = [r for r in arm.runs if pass_at_1(r, task)[0]]
        x, low = evaluated(run, "pass@1/low", task)
        _, high = evaluated(run, "pass@1/high", task)
        if x:
            lines.insert(0, Trace("band", x, low=low, high=high, name=lines[0].name, color=lines[0].color))
    return [_with_markers(t) for t in lines]


def _with_markers(trace: Trace) -> Trace:
    return replace(trace, markers=True) if trace.kind == "line" and not trace.faint else trace


def in_figure(key: str, title: str, panels: Sequence[Panel], *, caption: str = "", missing: str) -> Figure:
    """A figure of these panels, or why there is none."""
    if not panels:
        return Figure(key, title, missing=f"Not measured: {missing}")
    columns = 3 if len(panels) % 3 == 0 else min(len(panels), 2)
    return Figure(key, title, caption, tuple(panels), wide=len(panels) > 1, columns=columns)


def learning_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Reward, pass@1, entropy and the share of groups that teach nothing."""
    long = any(len(run.of_kind("step")) > MOST_POINTS for arm in arms for run in arm.runs)
    note = f" Of the longest runs every n-th step is drawn, {MOST_POINTS} points at most." if long else ""
    several = f" {SEEDS}" if any(len(arm.runs) > 1 for arm in arms) else ""
    return [
        in_figure(
            "reward",
            "Training reward",
            step_panels(arms, "reward/mean", "mean reward"),
            caption="Mean reward of all that a step sampled." + several + note,
            missing="no step is done yet.",
        ),
        in_figure(
            "pass1",
            "Held-out pass@1",
            pass_panels(arms),
            caption="Mean over held-out problems of the share of right completions. A single run: with its 95% "
            "bootstrap interval over problems." + several,
            missing="no evaluation was made; eval.every=N evaluates every N steps.",
        ),
        in_figure(
            "entropy",
            "Entropy",
            step_panels(arms, "update/entropy", "nats per token"),
            caption="Entropy of the policy at response tokens that carried a gradient, mean over the step's updates."
            + several,
            missing="entropy was not asked for; train.entropy=true logs it.",
        ),
        in_figure(
            "zero_variance",
            "Groups that teach nothing",
            step_panels(arms, "groups/zero_variance", "share of groups"),
            caption="Share of the prompts whose samples all have the same reward: every advantage is 0." + several,
            missing="no step is done yet.",
        ),
    ]


LAST_UPDATE = "Values of each step's last update, the farthest off policy, as logged."


def gate_figures(arms: Sequence[Arm]) -> list[Figure]:
    """EUR and the lower end of the gate weights, positive and negative advantages apart."""
    eur = in_figure(
        "eur",
        "How much the gate lets through, by sign",
        _by_sign(arms, {"pos": "gate/eur_pos", "neg": "gate/eur_neg"}, "EUR"),
        caption="EUR, the mean gate weight of tokens of positive and of negative advantage: 1 lets everything "
        f"through. For a hard clip it is the share of tokens that are not clipped. {LAST_UPDATE}",
        missing="no update logged its gate weights by sign.",
    )
    return [eur, _low_weights(arms), _counterfactuals(arms)]


NO_COUNTERFACTUALS = (
    "Not measured: no update was asked what other gates would have weighed its tokens; "
    "diagnostics.counterfactuals_every=N asks every N steps."
)


def _counterfactuals(arms: Sequence[Arm]) -> Figure:
    """EUR that other gates would have had on the same tokens: a line for each gate, axes for each arm that asked."""
    key, title, prefix, ending = "counterfactual", "What other gates would have kept", "counterfactual/", "/eur"
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
                traces += arm_traces(arm, partial(_of_last_updates, metric=metric), color=color, name=name)
        if traces:
            panels.append(Panel("step", "EUR", tuple(traces), title=arm.label if len(arms) > 1 else ""))
    if not panels:
        return Figure(key, title, missing=NO_COUNTERFACTUALS)
    whose = "an arm's updates, which trained by its own gate" if len(arms) > 1 else "this run's updates"
    caption = (
        f"EUR of other gates on the tokens and ratios of {whose}: what each would have left of them. {LAST_UPDATE}"
    )
    panels = share_axis(share_axis(panels), "x")
    return Figure(key, title, caption, tuple(panels), wide=len(panels) > 1, columns=min(len(panels), 4))


def _of_last_updates(run: Run, metric: str) -> Series:
    return thinned([(r["step"], r[metric]) for r in run.last_updates if metric in r])


def _by_sign(arms: Sequence[Arm], names: dict[str, str], y: str) -> list[Panel]:
    """Of one arm both signs on the same axes; of several each sign on axes of its own."""
    if len(arms) == 1:
        signs: dict[str, tuple[int, Dash]] = {"A > 0": (0, "solid"), "A ≤ 0": (1, "dash")}
        traces: list[Trace] = []
        for metric, (words, (color, dash)) in zip(names.values(), signs.items(), strict=True):
            read = partial(_of_last_updates, metric=metric)
            traces += arm_traces(arms[0], read, color=color, name=words, dash=dash)
        return [Panel("step", y, tuple(traces))] if traces else []

    def panels(metric: str, words: str) -> list[Panel]:
        read = partial(_of_last_updates, metric=metric)
        return rate_panels(arms, "step", y, lambda arm: arm_traces(arm, read), words)

    return share_axis([*panels(names["pos"], "A > 0"), *panels(names["neg"], "A ≤ 0")])


def _low_weights(arms: Sequence[Arm]) -> Figure:
    """How low the gate goes: by sign where that was logged, else the smallest weight of all tokens."""
    key, title, missing = "low_weights", "The gate's lowest weights", "no update logged its gate weights."
    signs = _by_sign(arms, {"pos": "gate/p01_pos", "neg": "gate/p01_neg"}, "1% quantile of the weight")
    if signs:
        caption = f"One token in a hundred weighs less than this. {LAST_UPDATE}"
        return in_figure(key, title, signs, caption=caption, missing=missing)
    read = partial(_of_last_updates, metric="gate/min")
    panels = rate_panels(arms, "step", "smallest gate weight", lambda arm: arm_traces(arm, read))
    caption = f"The smallest gate weight of any token; quantiles by sign were not logged. {LAST_UPDATE}"
    return in_figure(key, title, panels, caption=caption, missing=missing)
