"""The story in words: what each arm did from start to end, every run in a table, and all warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sapo.diagnostics.titles import metric_title
from sapo.report.arms import Arm
from sapo.report.costs import phase_seconds
from sapo.report.runs import ReportedRun
from sapo.utils.text import visible


@dataclass(frozen=True)
class PassEstimate:
    """A held-out pass@1 with its interval, at a step; the mean reward where rewards are others than 0 and 1.

    >>> PassEstimate("add4", 0, 0.25, 0.2, 0.3).words
    '0.250 [0.200, 0.300]'
    """

    task: str
    step: int
    value: float
    low: float | None
    high: float | None
    graded: bool = False
    """Whether it is the mean reward."""

    @property
    def words(self) -> str:
        """Return the value and, where it was logged, its interval."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class RunLine:
    """A row of the table of runs. None and an empty list mean: not measured.

    >>> line = RunLine("q", "SAPO", 0, "done", 20, 20, (), (), 51200, 19.6, None, 0, "")
    >>> line.to_json()["tokens"]
    51200
    """

    name: str
    arm: str
    seed: int | None
    state: str
    steps: int
    planned: int | None
    start: tuple[PassEstimate, ...]
    final: tuple[PassEstimate, ...]
    tokens: int | None
    seconds: float | None
    reward: float | None
    """Mean reward of the last step."""
    warnings: int
    models: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return asdict(self)


def run_line(run: ReportedRun, arm: Arm) -> RunLine:
    """Make the row of a run."""
    steps = run.of_kind("step")
    tokens = (run.summary or {}).get("tokens", {}).get("generated")
    if tokens is None and steps:
        tokens = sum(r["tokens/generated"] for r in steps if "tokens/generated" in r)
    seconds = sum(phase_seconds(run).values())
    evaluations = _evaluations(run)
    return RunLine(
        name=run.name,
        arm=arm.label,
        seed=run.setting("seed"),
        state="done" if run.finished else "failed" if run.failure is not None else "not finished",
        steps=run.steps,
        planned=run.planned_steps,
        start=tuple(e[0] for e in evaluations.values()),
        final=tuple(e[-1] for e in evaluations.values() if len(e) > 1),
        tokens=tokens,
        seconds=seconds or None,
        reward=steps[-1].get("reward/mean") if steps else None,
        warnings=len(run.of_kind("warning")),
        models="mixture of experts" if run.is_mixture_of_experts else "dense",
    )


def _evaluations(run: ReportedRun) -> dict[str, list[PassEstimate]]:
    by_task: dict[str, list[PassEstimate]] = {}
    for record in run.of_kind("eval"):
        graded = not record.get("binary", True)
        names = ["reward/mean"] if graded else ["pass@1", *(k for k in record if k.startswith("mean@"))]
        name = next((n for n in names if n in record), None)
        if name is not None:
            low, high = record.get(f"{name}/low"), record.get(f"{name}/high")
            measured = PassEstimate(record["task"], record["step"], record[name], low, high, graded)
            by_task.setdefault(record["task"], []).append(measured)
    return by_task


def headline(arm: Arm, lines: Sequence[RunLine]) -> str:
    """Write what an arm did in one sentence, with the numbers of metrics.jsonl and summary.json."""
    single = len(lines) == 1
    steps = sorted({line.steps for line in lines})
    count = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    words = f"{arm.label}" + ("" if single else f", {len(lines)} seeds")
    words += f": {count} steps" + _ending(lines)
    passes = [_pass_words(lines, task) for task in dict.fromkeys(e.task for line in lines for e in line.start)]
    graded = any(e.graded for line in lines for e in (*line.start, *line.final))
    held_out = (
        f"held-out {metric_title('eval', 'reward/mean').title}" if graded else metric_title("eval", "pass@1").title
    )
    words += f"; {held_out} {', '.join(passes)}" if passes else f"; {held_out} not measured"
    tokens = [line.tokens for line in lines if line.tokens is not None]
    seconds = [line.seconds for line in lines if line.seconds is not None]
    each = "" if single else " each"
    if tokens:
        words += f"; {sum(tokens) / len(tokens):,.0f} {metric_title('step', 'tokens/generated').title}{each}"
    if seconds:
        words += f"; {sum(seconds) / len(seconds):,.1f} s{each}"
    return words + "."


def _ending(lines: Sequence[RunLine]) -> str:
    """Return how many steps were planned and what became of the runs that did not make them."""
    states = [line.state for line in lines]
    short = [f"{states.count(state)} {state}" for state in ("failed", "not finished") if state in states]
    if not short:
        return ""
    so_far, planned = " so far" * ("not finished" in states), lines[0].planned
    words = so_far + (f" of {planned:,}" if planned else "")
    if len(lines) > 1:
        return f"{words} ({', '.join(short)})"
    return words + ", then it failed" * ("failed" in states)


def _pass_words(lines: Sequence[RunLine], task: str) -> str:
    starts = [e for line in lines for e in line.start if e.task == task]
    # Where some have ended, the last evaluations of the others are of other steps.
    ended = [line for line in lines if line.state != "not finished"] or lines
    finals = [e for line in ended for e in line.final if e.task == task]
    if len(lines) == 1:
        end = f" → {finals[0].words} at step {finals[0].step}" if finals else " at the start"
        return f"{starts[0].words}{end} on {task}"
    start = sum(e.value for e in starts) / len(starts)
    if not finals:
        return f"{start:.3f} at the start on {task}"
    values = [e.value for e in finals]
    spread = f" (seeds {min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    of = f" of the {len(ended)} that have ended" if len(ended) < len(lines) else ""
    return f"{start:.3f} → {sum(values) / len(values):.3f}{spread}{of} on {task}"


def warnings_of(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """List every warning with its run, step and cause, the failed runs first. A rollback follows the warning that
    caused it."""
    broken = [
        {"run": run.name, "step": run.steps, "cause": "failed", "text": visible(run.failure)}
        for run in runs
        if run.failure
    ]
    return broken + [
        {"run": run.name, "step": r.get("step"), "cause": r.get("cause"), "text": visible(str(r.get("text", "")))}
        if r["kind"] == "warning"
        else {"run": run.name, "step": r["step"], "cause": "rollback", "text": _rollback_words(r)}
        for run in runs
        for r in run.records
        if r.get("kind") in ("warning", "rollback")
    ]


def _rollback_words(record: dict[str, Any]) -> str:
    scale = f"{record['learning_rate_scale']:g} times the learning rate"
    return f"step {record['step']}: rollback to step {record['to']}, continued at {scale}; see rolled-back/"
