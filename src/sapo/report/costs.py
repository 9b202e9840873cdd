"""Where the time went, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence

from sapo.report.figure import Figure, Panel, Trace
from sapo.report.runs import Run

PHASES = ("generate", "score", "old_logprobs", "reference", "update", "diagnose", "evaluate", "checkpoint")


def phase_seconds(run: Run) -> dict[str, float]:
    """Seconds by phase: the summary's, or the sum over the steps and evaluations that were logged so far.

    Parts of a phase, which a profile has beside it as "update/backward", are in it already.
    """
    if run.summary is not None and isinstance(run.summary.get("seconds"), dict):
        return {k: v for k, v in run.summary["seconds"].items() if k != "total" and "/" not in k}
    seconds: dict[str, float] = {}
    for record in run.of_kind("step"):
        for phase, value in record.get("timing", {}).items():
            if phase not in ("seconds", "tokens_per_second") and "/" not in phase:
                seconds[phase] = seconds.get(phase, 0.0) + value
    # What a step's line does not know yet: the evaluations since.
    logged = sum(r.get("timing", {}).get("seconds", 0.0) for r in run.of_kind("eval"))
    if logged > seconds.get("evaluate", 0.0):
        seconds["evaluate"] = logged
    return seconds


def timing_figure(runs: Sequence[Run]) -> Figure:
    """Stacked bars, one for each run."""
    by_run = {run.name: phase_seconds(run) for run in runs}
    found = {phase for seconds in by_run.values() for phase in seconds}
    phases = [*(p for p in PHASES if p in found), *sorted(found - set(PHASES))]
    if not phases:
        return Figure("timings", "Where the time went", missing="Not measured: no step is done yet.")
    traces = [
        Trace("bars", tuple(by_run), tuple(s.get(phase) for s in by_run.values()), name=phase, color=i)
        for i, phase in enumerate(phases)
    ]
    panel = Panel("run", "seconds", tuple(traces), stacked=True)
    return Figure("timings", "Where the time went", "Seconds of each phase, by the clock of the machine.", (panel,))
