"""The figures of a comparison: each arm at each learning rate over its seeds, and against the baseline.

Runs of one seed share their prompts, and all runs their held-out problems, so arms are compared pair by pair: the
difference of two pass rates, or of two mean rewards where rewards are graded, on the same problem with the same seed.
Intervals resample seeds and problems independently (`bootstrap_crossed`). A run that failed has no model at its last
step: its final pass@1 counts as 0, so that failures do not improve an arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapo.evaluation.estimates import Estimate, bootstrap_crossed
from sapo.workflows.comparing.alarms import Alarms
from sapo.workflows.comparing.outcomes import RunOutcome, figure_name
from sapo.workflows.comparing.plan import ComparisonPlan

SCHEMA = "sapo.comparison_of_runs/1"


@dataclass(frozen=True)
class Cell:
    """An arm at a learning rate on one task, over the seeds that have ended.

    >>> half = Estimate(0.5, 0.4, 0.6)
    >>> Cell("add4", "sapo", 1e-4, (0,), (), half, half, half, None, 0, {"generated": 10}, {}).final.value
    0.5
    """

    task: str
    arm: str
    learning_rate: float
    seeds: tuple[int, ...]
    """Seeds of runs that have ended, failed ones included."""
    failed: tuple[int, ...]
    """Seeds of runs that failed; they count as 0 in `final` and `difference`."""
    start: Estimate
    final: Estimate
    best: Estimate
    """Mean over the best evaluation of each run. A maximum is biased upwards."""
    difference: Estimate | None
    """Final minus that of the baseline at the same learning rate, seed by seed; None for the baseline, or where no seed
    of both has ended."""
    collapsed: int
    """Runs that collapsed or failed."""
    tokens: dict[str, float]
    """Mean over finished runs."""
    seconds: dict[str, float]
    """Mean over finished runs."""

    def to_json(self) -> dict[str, Any]:
        """Return the value in results.json; the clock is in "timing" alone."""
        return {
            "task": self.task,
            "arm": self.arm,
            "learning_rate": self.learning_rate,
            "seeds": list(self.seeds),
            "failed": list(self.failed),
            "start": self.start.to_json(),
            "final": self.final.to_json(),
            "best": self.best.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
            "collapsed": self.collapsed,
            "tokens": self.tokens,
            "timing": {"seconds": self.seconds},
        }


@dataclass(frozen=True)
class Tuned:
    """An arm at the learning rate of its highest mean final pass@1: chosen on the problems it is judged by.

    >>> Tuned("add4", "grpo", 2e-4, Estimate(0.5, 0.4, 0.6), Estimate(-0.1, -0.2, 0.0)).difference.value
    -0.1
    """

    task: str
    arm: str
    learning_rate: float
    final: Estimate
    difference: Estimate | None
    """Final minus that of the baseline at its own best learning rate."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "task": self.task,
            "arm": self.arm,
            "learning_rate": self.learning_rate,
            "final": self.final.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
        }


@dataclass(frozen=True)
class ComparisonResults:
    """All runs of a comparison with the figures over them.

    `ComparisonResults.of(plan, outcomes).cells[0].final` is the first arm's pass@1 at the first learning rate.
    """

    plan: ComparisonPlan
    outcomes: tuple[RunOutcome, ...]
    cells: tuple[Cell, ...]
    tuned: tuple[Tuned, ...]

    @classmethod
    def of(cls, plan: ComparisonPlan, outcomes: Sequence[RunOutcome]) -> ComparisonResults:
        """Compute the figures of the runs that have ended; the others are named and left out of every figure."""
        tasks = list(dict.fromkeys(task for o in outcomes if o.ended for task in o.curves))
        cells = [
            cell
            for task in tasks
            for rate in plan.learning_rates
            for arm in plan.arms
            if (cell := _cell(plan, outcomes, task, arm, rate)) is not None
        ]
        return cls(
            plan, tuple(outcomes), tuple(cells), tuple(t for task in tasks for t in _tuned(plan, outcomes, task))
        )

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that have figures."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def figure_of(self, task: str) -> str:
        """Return the name of a task's figure: its mean reward where some run saw rewards other than 0 and 1."""
        return figure_name(any(o.curves[task].graded for o in self.outcomes if task in o.curves))

    def alarms(self, task: str) -> Alarms:
        """Return how early warnings agree with collapses on a task."""
        return Alarms.of(self.outcomes, task)

    def to_json(self) -> dict[str, Any]:
        """Return results.json; the clock is in "timing" alone."""
        base = self.plan.base
        return {
            "schema": SCHEMA,
            "baseline": self.plan.baseline,
            "arms": {arm: dict(settings) for arm, settings in self.plan.arms.items()},
            "learning_rates": list(self.plan.learning_rates),
            "seeds": list(self.plan.seeds),
            "budget": {
                "steps": base.train.steps,
                "prompts_per_step": base.rollout.prompts_per_step,
                "samples_per_prompt": base.rollout.samples_per_prompt,
                "minibatches": base.train.minibatches,
            },
            "figures": {task: self.figure_of(task) for task in self.tasks},
            "cells": [cell.to_json() for cell in self.cells],
            "tuned": [tuned.to_json() for tuned in self.tuned],
            "warnings": {task: self.alarms(task).to_json() for task in self.tasks},
            "runs": [outcome.to_json() for outcome in self.outcomes],
        }


def _cell(
    plan: ComparisonPlan, outcomes: Sequence[RunOutcome], task: str, arm: str, learning_rate: float
) -> Cell | None:
    runs = _ended(outcomes, task, arm, learning_rate)
    if not runs:
        return None
    finished = [r for r in runs if r.state == "finished"]
    against = [] if arm == plan.baseline else _ended(outcomes, task, plan.baseline, learning_rate)
    return Cell(
        task=task,
        arm=arm,
        learning_rate=learning_rate,
        seeds=tuple(r.seed for r in runs),
        failed=tuple(r.seed for r in runs if r.state == "failed"),
        start=bootstrap_crossed(np.array([r.curves[task].start.rates_P for r in runs])),
        final=bootstrap_crossed(np.array([r.final_rates_P(task) for r in runs])),
        best=bootstrap_crossed(np.array([r.curves[task].best.rates_P for r in runs])),
        difference=_difference(runs, against, task),
        collapsed=sum(r.collapsed(task) for r in runs),
        tokens=_means([r.tokens for r in finished]),
        seconds=_means([r.seconds for r in finished]),
    )


def _tuned(plan: ComparisonPlan, outcomes: Sequence[RunOutcome], task: str) -> list[Tuned]:
    best: dict[str, list[RunOutcome]] = {}
    for arm in plan.arms:
        tried = [runs for rate in plan.learning_rates if (runs := _ended(outcomes, task, arm, rate))]
        if tried:
            best[arm] = max(tried, key=lambda runs: np.nanmean([r.final_rates_P(task) for r in runs]))
    baseline = best.get(plan.baseline, [])
    return [
        Tuned(
            task,
            arm,
            runs[0].learning_rate,
            bootstrap_crossed(np.array([r.final_rates_P(task) for r in runs])),
            None if arm == plan.baseline else _difference(runs, baseline, task),
        )
        for arm, runs in best.items()
    ]


def _ended(outcomes: Sequence[RunOutcome], task: str, arm: str, learning_rate: float) -> list[RunOutcome]:
    return [o for o in outcomes if o.ended and o.arm == arm and o.learning_rate == learning_rate and task in o.curves]


def _difference(runs: Sequence[RunOutcome], against: Sequence[RunOutcome], task: str) -> Estimate | None:
    """Estimate final less final, over the seeds that have ended in both."""
    other = {o.seed: o for o in against}
    pairs = [(r, other[r.seed]) for r in runs if r.seed in other]
    if not pairs:
        return None
    return bootstrap_crossed(np.array([a.final_rates_P(task) - b.final_rates_P(task) for a, b in pairs]))


def _means(figures: Sequence[Any]) -> dict[str, float]:
    """Average each figure that all have."""
    names = [name for name in figures[0] if all(name in f for f in figures)] if figures else []
    return {name: float(np.mean([f[name] for f in figures])) for name in names}
