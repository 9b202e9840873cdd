"""Figures 1 to 6 of the paper from the runs at hand; a figure that they cannot give says which runs would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm, flatten, objective_of
from sapo.report.curves import SEEDS, Series, arm_traces, held_out, held_out_title, pass_panels, step_panels
from sapo.report.figure import Figure, Panel, Trace
from sapo.report.gates import gates_figure
from sapo.report.runs import ReportedRun
from sapo.report.spread import MISSING, Spread, notes_of, source_of, spread_panels


def paper_figures(arms: Sequence[Arm], spreads: Sequence[Spread | None]) -> list[Figure]:
    """Make figures 1 to 6."""
    return [
        gates_figure(),
        *_spread_figures(arms, spreads),
        _learning("fig4", "Fig. 4: objectives", arms, _objectives(arms), NO_OBJECTIVES, objective_name),
        _learning(
            "fig5",
            "Fig. 5: the temperature of negative advantages",
            arms,
            _temperatures(arms),
            NO_TEMPERATURES,
            _temperature_name,
        ),
        _tasks(arms),
    ]


def _spread_figures(arms: Sequence[Arm], spreads: Sequence[Spread | None]) -> list[Figure]:
    figures = []
    for key, title, experts in (("fig2", "Fig. 2: mixture of experts", True), ("fig3", "Fig. 3: dense", False)):
        of_kind = [
            (arm, s) for arm, s in zip(arms, spreads, strict=True) if arm.runs[0].is_mixture_of_experts == experts
        ]
        measured = [(arm, s) for arm, s in of_kind if s is not None]
        if not of_kind:
            lacking = (
                "no run of a mixture of experts; `sapo train moe_quickstart` makes one."
                if experts
                else "no run of a dense model; `sapo train quickstart` makes one."
            )
            figures.append(Figure(key, title, missing=f"Not measured: there is {lacking}", wide=True))
        elif not measured:
            figures.append(Figure(key, title, missing=MISSING, wide=True))
        else:
            caption = (
                "Ratios of off-policy tokens with the gate weight (right axis), Var_i of responses, and D_i with its "
                f"bound. {source_of([s for _, s in measured])}{notes_of(measured)}"
            )
            panels = [panel for row in zip(*spread_panels(measured), strict=True) for panel in row]
            figures.append(Figure(key, title, caption, tuple(panels), wide=True, columns=3))
    return figures


NO_OBJECTIVES = (
    "Not measured: these runs train by one objective. `sapo compare RECIPE --objectives sapo,gspo,grpo`, or runs with "
    "objective.name=... beside this one, give the curves."
)
NO_TEMPERATURES = (
    "Not measured: no two of these runs are SAPO at different objective.tau_neg; runs with objective.tau_neg=0.95 and "
    "objective.tau_neg=1.0 beside this one give the curves."
)
NO_TASKS = (
    "Not measured: these runs have one task each. A recipe with several, as `sapo train mixture`, gives the curves."
)


SHARED = ("model.", "tasks.", "experiments.", "rollout.sampler_", "rollout.staleness", "objective.tis")
"""Settings that the arms of one figure share: another sampler, or a correction for it, is another experiment."""


def _objectives(arms: Sequence[Arm]) -> list[int]:
    """Return the places of arms that train the same model on the same tasks with the same sampler by several
    objectives: the largest such family."""
    families: dict[Any, list[int]] = {}
    for place, arm in enumerate(arms):
        flat = flatten(arm.runs[0].settings)
        # Routing replay goes with an objective: GRPO-R2 is GRPO with it.
        same = {k: v for k, v in flat.items() if k.startswith(SHARED) and k != "model.routing_replay"}
        families.setdefault(repr(sorted(same.items())), []).append(place)
    return _largest(families, lambda place: arms[place].objective.get("name"))


def _temperatures(arms: Sequence[Arm]) -> list[int]:
    """Return the places of SAPO arms that differ in tau_neg alone: the largest such family."""
    families: dict[Any, list[int]] = {}
    for place, arm in enumerate(arms):
        if arm.objective.get("name") == "sapo" and "tau_neg" in arm.objective:
            flat = flatten(arm.runs[0].settings)
            same = {k: v for k, v in flat.items() if k != "objective.tau_neg"}
            families.setdefault(repr(sorted(same.items())), []).append(place)
    return _largest(families, lambda place: arms[place].objective["tau_neg"])


def _largest(families: dict[Any, list[int]], value: Callable[[int], Any]) -> list[int]:
    """Return the largest family in which a value is not the same everywhere; empty where there is none."""
    several = [f for f in families.values() if len({value(place) for place in f}) > 1]
    return max(several, key=len, default=[])


def _learning(
    key: str, title: str, arms: Sequence[Arm], places: Sequence[int], missing: str, name: Callable[[Arm], str]
) -> Figure:
    """Draw mean reward and held-out pass@1 of some arms, in the colours they have elsewhere.

    Args:
        name: gives an arm the name that the paper would use.
    """
    if not places:
        return Figure(key, title, missing=missing, wide=True)
    own = _named([arms[place] for place in places], name)
    rewards, passes = step_panels(own, "reward/mean"), pass_panels(own)
    panels = (*rewards, *passes)
    if not panels:
        return Figure(key, title, missing="Not measured: no step is done yet.", wide=True)
    columns = 2 if len(rewards) < 2 else min(len(rewards), 3)  # learning rates side by side, pass@1 below reward
    caption = f"Mean reward and held-out pass@1. {SEEDS}"
    return Figure(key, title, caption, panels, wide=True, columns=columns)


def objective_name(arm: Arm) -> str:
    """Return the objective as the paper writes it, with its routing replay: SAPO, GSPO, GRPO-R2."""
    return objective_of(arm.runs[0])


def _temperature_name(arm: Arm) -> str:
    return f"τ_neg = {arm.objective['tau_neg']:g}"


def _named(arms: Sequence[Arm], name: Callable[[Arm], str]) -> list[Arm]:
    """Name arms as the paper would, where that tells them apart on each pair of axes; else they keep their names."""
    names = [(arm.rate, name(arm)) for arm in arms]
    if len(set(names)) < len(names):
        return list(arms)
    return [replace(arm, legend=new) for arm, (_, new) in zip(arms, names, strict=True)]


def _tasks(arms: Sequence[Arm]) -> Figure:
    """Draw reward and pass@1 by task, a panel for each arm."""
    title, panels = "Fig. 6: by task", []
    for arm in arms:
        names = task_names(arm)
        if len(names) < 2:
            continue
        for y, read in (
            (metric_title("step", "reward/mean").label, reward_of),
            (held_out_title([arm]).label, held_out),
        ):
            traces: list[Trace] = []
            for color, name in enumerate(names):
                traces += arm_traces(arm, partial(read, task=name), color=color, name=name)
            if traces:
                panels.append(Panel("step", y, tuple(traces), title=arm.label))
    if not panels:
        return Figure("fig6", title, missing=NO_TASKS, wide=True)
    return Figure(
        "fig6",
        title,
        f"Mean reward and held-out pass@1 of each task of a mixture. {SEEDS}",
        tuple(panels),
        wide=True,
    )


def reward_of(run: ReportedRun, task: str) -> Series:
    """Return the mean reward of one task by step."""
    return run.series(f"task/{task}/reward/mean")


def task_names(arm: Arm) -> list[str]:
    """Return the tasks that were evaluated or trained on, in the order in which they were first logged."""
    names: dict[str, None] = {}
    for run in arm.runs:
        names |= dict.fromkeys(r["task"] for r in run.of_kind("eval"))
        for record in run.of_kind("step")[:1]:
            ending = "/reward/mean"
            found = [k for k in record if k.startswith("task/") and k.endswith(ending)]
            names |= dict.fromkeys(k.removeprefix("task/").removesuffix(ending) for k in found)
    return list(names)
