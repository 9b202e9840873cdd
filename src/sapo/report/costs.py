"""Where the time went, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence

from sapo.report.arms import Arm
from sapo.report.figure import Figure, Panel, Trace
from sapo.report.runs import ReportedRun

PHASES = (
    "generate",
    "score",
    "copy",
    "wait",
    "old_logprobs",
    "reference",
    "update",
    "diagnose",
    "evaluate",
    "checkpoint",
)

MOST_BARS = 12
"""Largest number of runs with a bar each: the names of more bars cannot be read."""


def phase_seconds(run: ReportedRun) -> dict[str, float]:
    """Return seconds by phase: the summary's, or the sum over the steps and evaluations that were logged so far.

    The parts of a phase that a profile adds, such as "update/backward", are in the phase already.
    """
    if run.summary is not None and isinstance(run.summary.get("seconds"), dict):
        return {k: v for k, v in run.summary["seconds"].items() if k != "total" and "/" not in k}
    seconds: dict[str, float] = {}
    for record in run.of_kind("step"):
        for phase, value in record.get("timing", {}).items():
            if phase not in ("seconds", "tokens_per_second") and "/" not in phase:
                seconds[phase] = seconds.get(phase, 0.0) + value
    # Evaluations since the last step's line are not in it yet.
    logged = sum(r.get("timing", {}).get("seconds", 0.0) for r in run.of_kind("eval"))
    if logged > seconds.get("evaluate", 0.0):
        seconds["evaluate"] = logged
    return seconds


def timing_figure(arms: Sequence[Arm]) -> Figure:
    """Draw stacked bars of the phases: one for each run, or one for each arm where there are many runs."""
    runs = [run for arm in arms for run in arm.runs]
    by_run = {run.name: seconds for run in runs if (seconds := phase_seconds(run))}
    found = {phase for seconds in by_run.values() for phase in seconds}
    phases = [*(p for p in PHASES if p in found), *sorted(found - set(PHASES))]
    if not phases:
        return Figure("timings", "Where the time went", missing="Not measured: no step is done yet.")
    bars, caption, x = by_run, "Seconds of each phase, by the clock of the machine.", "run"
    if len(runs) > MOST_BARS:
        bars = {arm.label: means for arm in arms if (means := _means([by_run.get(run.name, {}) for run in arm.runs]))}
        caption += " Of so many runs a bar is the mean over an arm's; the table of runs has each one's total."
        x = "arm"
    traces = [
        Trace("bars", tuple(bars), tuple(s.get(phase) for s in bars.values()), name=phase, color=i)
        for i, phase in enumerate(phases)
    ]
    panel = Panel(x, "seconds", tuple(traces), stacked=True)
    return Figure("timings", "Where the time went", caption, (panel,), wide=True)


def _means(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average each phase over the runs that have begun; a run without the phase counts as 0 s."""
    begun = [seconds for seconds in runs if seconds]
    phases = dict.fromkeys(phase for seconds in begun for phase in seconds)
    return {phase: sum(s.get(phase, 0.0) for s in begun) / len(begun) for phase in phases}
