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
"""A run has collapsed if its last pass@1 is below this share of its best one."""


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation of a run on one task.

    >>> EvaluationPoint(step=10, samples=4, correct=(4, 0, 2)).pass_at_1
    0.5
    """

    step: int
    samples: int
    correct: tuple[int, ...]
    """Right samples of each held-out problem, in order."""
    judged: tuple[int, ...] | None = None
    """Samples of each that were judged; None: all of them."""

    @property
    def rates_P(self) -> np.ndarray:
        """Return the pass rate of each problem, (P,); NaN where no sample was judged."""
        if self.judged is None:
            return np.array(self.correct) / self.samples
        judged = np.array(self.judged)
        return np.where(judged > 0, np.array(self.correct) / np.maximum(judged, 1), np.nan)

    @property
    def pass_at_1(self) -> float:
        """Return the mean pass rate, mean@n."""
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
        """Return the evaluation of the highest pass@1, the first of equals. A maximum over evaluations is biased
        upwards."""
        return max(self.points, key=lambda point: point.pass_at_1)

    @property
    def collapsed(self) -> bool:
        """Tell whether the last pass@1 is below half of the best, or below the start by more than its problems explain.

        The latter: the 95% interval of the mean of final less start over problems lies below 0.
        """
        if self.final.pass_at_1 < COLLAPSED_BELOW * self.best.pass_at_1:
            return True
        changes_P = self.final.rates_P - self.start.rates_P
        changes_P = changes_P[~np.isnan(changes_P)]
        return bool(changes_P.size) and bootstrap(changes_P).high < 0

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

    `RunOutcome.of(planned).curves["add4"].final.pass_at_1` is the pass@1 of its last evaluation.
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
        """Return the final pass rate of each problem, (P,): 0 of a run that failed, which has no model at its last
        step."""
        rates = self.curves[task].final.rates_P
        return np.zeros_like(rates) if self.state == "failed" else rates

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
                    "start": curve.start.pass_at_1,
                    "final": curve.final.pass_at_1 if self.state == "finished" else None,
                    "best": curve.best.pass_at_1,
                    "best_step": curve.best.step,
                    "collapsed": self.collapsed(task) if self.ended else None,
                    "pass@1": [[point.step, point.pass_at_1] for point in curve.points],
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


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    points: dict[str, list[EvaluationPoint]] = {}
    for record in records:
        judged = record.get("judged")
        if record["kind"] == "eval" and "correct" in record and (judged is None or any(judged)):
            counts = None if judged is None else tuple(judged)
            point = EvaluationPoint(record["step"], record["samples"], tuple(record["correct"]), counts)
            points.setdefault(record["task"], []).append(point)
    return {task: Curve(tuple(of_task)) for task, of_task in points.items()}


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    return read_json(file, "what a run writes", way_out=f"move {file.parent} away to make it again")
