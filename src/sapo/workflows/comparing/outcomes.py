"""The outcome of one run of a comparison, read from its directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sapo.diagnostics.warnings import OF_THE_SET_UP
from sapo.evaluation.estimates import bootstrap
from sapo.run.directory import FAILURE_FILE
from sapo.utils.reading import interpreting, is_whole, read_json
from sapo.workflows.comparing.plan import PlannedRun

COLLAPSED_BELOW = 0.5
"""A run has collapsed if its last pass@1 is below this share of its best one; of graded rewards, if it has kept less
than this share of what its best evaluation was above its first."""


def figure_name(graded: bool) -> str:
    """Return what the figure of an evaluation is called, by whether rewards other than 0 and 1 were seen."""
    return "mean reward" if graded else "pass@1"


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation of a run on one task.

    Its figure is pass@1, or the mean reward where rewards are graded, which is not only 0 and 1. The two are the same
    number where all rewards are 0 or 1.

    >>> EvaluationPoint(step=10, samples=4, correct=(4, 0, 2)).figure
    0.5
    >>> EvaluationPoint(step=10, samples=4, correct=(0, 0, 0), rewards=(0.2, -0.1, 0.8)).figure
    0.3
    """

    step: int
    samples: int
    correct: tuple[int, ...]
    """Right samples of each held-out problem, in order."""
    judged: tuple[int, ...] | None = None
    """Samples of each that were judged; None: all of them."""
    rewards: tuple[float | None, ...] | None = None
    """Mean reward of each problem, where rewards are graded."""

    @property
    def rates_P(self) -> np.ndarray:
        """Return the pass rate of each problem, or its mean reward, (P,); NaN where no sample was judged."""
        if self.rewards is not None:
            return np.array(self.rewards, dtype=np.float64)
        if self.judged is None:
            return np.array(self.correct) / self.samples
        judged = np.array(self.judged)
        return np.where(judged > 0, np.array(self.correct) / np.maximum(judged, 1), np.nan)

    @property
    def figure(self) -> float:
        """Return the mean over problems: mean@n, or the mean reward."""
        return float(np.nanmean(self.rates_P))


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run on one task, from the start on.

    >>> points = [EvaluationPoint(step, 1, right) for step, right in ((0, (1, 0, 0)), (10, (1, 1, 1)), (20, (1, 0, 0)))]
    >>> curve = Curve(tuple(points))
    >>> curve.best.step, curve.collapsed
    (10, True)
    """

    points: tuple[EvaluationPoint, ...]

    @property
    def start(self) -> EvaluationPoint:
        """Return the evaluation before the first step."""
        return self.points[0]

    @property
    def final(self) -> EvaluationPoint:
        """Return the last evaluation."""
        return self.points[-1]

    @property
    def best(self) -> EvaluationPoint:
        """Return the evaluation of the highest figure, the first of equals. A maximum over evaluations is biased
        upwards."""
        return max(self.points, key=lambda point: point.figure)

    @property
    def graded(self) -> bool:
        """Tell whether rewards other than 0 and 1 were seen, so that its figures are mean rewards."""
        return any(point.rewards is not None for point in self.points)

    @property
    def collapsed(self) -> bool:
        """Tell whether the last pass@1 is below half of the best, or below the start by more than its problems explain.

        The latter: the 95% interval of the mean of final less start over problems lies below 0. Graded rewards have no
        natural zero: in place of half of the best, less than half of the gain over the start is left, and the interval
        of final less best lies below 0.
        """
        if _is_below(self.final, self.start):
            return True
        if not self.graded:
            return self.final.figure < COLLAPSED_BELOW * self.best.figure
        left, gain = self.final.figure - self.start.figure, self.best.figure - self.start.figure
        return left < COLLAPSED_BELOW * gain and _is_below(self.final, self.best)

    @property
    def collapsed_since(self) -> int | None:
        """Return the step from which on every evaluation was collapsed; None unless the last one is."""
        since = None
        for count in range(len(self.points), 0, -1):
            if not Curve(self.points[:count]).collapsed:
                break
            since = self.points[count - 1].step
        return since


@dataclass(frozen=True)
class RunOutcome:
    """One run: how it ended, and its curve on each task.

    `RunOutcome.of(planned).curves["add4"].final.figure` is the pass@1 of its last evaluation.
    """

    name: str
    arm: str
    learning_rate: float
    seed: int
    state: Literal["finished", "failed", "unfinished"]
    """failed: the run stopped itself, for a loss that is not finite or a collapse (`warnings.on_collapse: stop`)."""
    reason: str | None
    """Why it failed."""
    steps: int
    """Whole steps done."""
    curves: Mapping[str, Curve]
    """Curves by task; none before the first evaluation."""
    tokens: Mapping[str, int]
    """Tokens generated and trained; of a run that failed they are not known and left out."""
    warnings: tuple[Mapping[str, Any], ...]
    """Alarms: step, cause, and whether the warning is of a collapse itself."""
    set_up: Mapping[str, int]
    """Warnings about the set-up: cause -> count."""
    last_step: int
    """Step of the last line written. After a rollback, lines of later steps stand before it."""
    seconds: Mapping[str, float] = field(compare=False)
    """Seconds by phase of a finished run."""

    @classmethod
    def of(cls, run: PlannedRun) -> RunOutcome:
        """Read a run, as far as it has come.

        Raises:
            ConfigError: its files are not those of a run.
        """
        records = read_metrics(run.directory)
        summary, failure = (_json(run.directory / name) for name in ("summary.json", FAILURE_FILE))
        with interpreting(run.directory, "the directory of a run", way_out="move it away to make it again"):
            finished = summary is not None and summary["steps"] >= run.config.train.steps
            state: Any = "finished" if finished else "failed" if failure is not None else "unfinished"
            return cls(
                name=run.name,
                arm=run.arm,
                learning_rate=run.learning_rate,
                seed=run.seed,
                state=state,
                reason=failure["reason"] if failure is not None and state == "failed" else None,
                steps=max((r["step"] for r in records if r["kind"] == "step"), default=0),
                curves=_curves(records),
                tokens=summary["tokens"] if summary is not None and finished else {},
                warnings=early_warnings(records),
                set_up=set_up_warnings(records),
                last_step=records[-1]["step"] if records else 0,
                seconds=summary["seconds"] if summary is not None and finished else {},
            )

    @property
    def ended(self) -> bool:
        """Tell whether the run has finished or failed."""
        return self.state != "unfinished"

    def collapsed(self, task: str) -> bool:
        """Tell whether its curve collapsed or the run failed."""
        return self.state == "failed" or self.curves[task].collapsed

    def collapse_visible(self, task: str) -> int:
        """Return the whole steps after which a collapse showed: in an evaluation, else in the failure."""
        since = self.curves[task].collapsed_since
        return self.last_step if since is None else since

    def final_rates_P(self, task: str) -> np.ndarray:
        """Return the final pass rate or mean reward of each problem, (P,).

        A run that failed has no model at its last step: it counts as 0, or as its lowest evaluation where rewards are
        graded and that is below 0, so that a failure improves no arm.
        """
        curve = self.curves[task]
        if self.state != "failed":
            return curve.final.rates_P
        lowest = min(curve.points, key=lambda point: point.figure)
        return lowest.rates_P if lowest.figure < 0 else np.zeros_like(lowest.rates_P)

    def to_json(self) -> dict[str, Any]:
        """Return the value in results.json; the clock is in "timing" alone."""
        return {
            "name": self.name,
            "arm": self.arm,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "state": self.state,
            **({"reason": self.reason} if self.reason is not None else {}),
            "steps": self.steps,
            "tasks": {
                task: {
                    "start": curve.start.figure,
                    "final": curve.final.figure if self.state == "finished" else None,
                    **({"counts_as": float(np.nanmean(self.final_rates_P(task)))} if self.state == "failed" else {}),
                    "best": curve.best.figure,
                    "best_step": curve.best.step,
                    "collapsed": self.collapsed(task) if self.ended else None,
                    figure_name(curve.graded): [[point.step, point.figure] for point in curve.points],
                }
                for task, curve in self.curves.items()
            },
            "tokens": dict(self.tokens),
            "warnings": [dict(w) for w in self.warnings],
            "set_up_warnings": dict(self.set_up),
            "timing": {"seconds": dict(self.seconds)},
        }


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the whole lines of metrics.jsonl; none of a run that has not begun.

    Raises:
        ConfigError: a line that no run wrote.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    with interpreting(file, "the metrics of a run", way_out=f"move {run} away to make it again"):
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a kill may have cut the last one
        records = [json.loads(line) for line in whole.splitlines()]
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or type(record.get("kind")) is not str or not is_whole(record.get("step")):
                raise ValueError(f"line {number}, which has no kind and step")
        return records


def early_warnings(records: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Return the alarms that the run gave, under its own thresholds; those before a rollback too."""
    return tuple(
        {key: record[key] for key in ("step", "cause", "collapse")}
        for record in records
        if record["kind"] == "warning" and record["cause"] not in OF_THE_SET_UP
    )


def set_up_warnings(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the warnings about the set-up, which predict no collapse, by cause."""
    causes = [r["cause"] for r in records if r["kind"] == "warning" and r["cause"] in OF_THE_SET_UP]
    return dict(sorted(Counter(causes).items()))


def _is_below(point: EvaluationPoint, other: EvaluationPoint) -> bool:
    """Tell whether the 95% interval of the mean difference over problems lies below 0."""
    changes_P = point.rates_P - other.rates_P
    changes_P = changes_P[~np.isnan(changes_P)]
    return bool(changes_P.size) and bootstrap(changes_P).high < 0


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    points: dict[str, list[EvaluationPoint]] = {}
    for record in records:
        judged = record.get("judged")
        if record["kind"] == "eval" and "correct" in record and (judged is None or any(judged)):
            point = EvaluationPoint(
                record["step"],
                record["samples"],
                tuple(record["correct"]),
                None if judged is None else tuple(judged),
                tuple(record["rewards"]) if "rewards" in record else None,
            )
            points.setdefault(record["task"], []).append(point)
    return {task: Curve(tuple(of_task)) for task, of_task in points.items()}


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    return read_json(file, "what a run writes", way_out=f"move {file.parent} away to make it again")
