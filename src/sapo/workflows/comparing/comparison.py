"""A comparison from its plan to its results: one cold start, runs side by side, figures over all of them.

A comparison that was killed or stopped is resumed by the same call: runs that have ended are kept, the others resume
from their newest checkpoints, and the results are those of a comparison that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.rollout.registry import check_engine
from sapo.run.loggers.all import check_loggers
from sapo.run.machine import resolve_device
from sapo.run.preflight import check_objectives, load_tasks
from sapo.run.trainers import check_optimizer
from sapo.workflows.coldstart import ColdStartProgress, coldstart_path, ensure_coldstart
from sapo.workflows.comparing.directory import ComparisonDirectory, check_directory
from sapo.workflows.comparing.outcomes import RunOutcome
from sapo.workflows.comparing.plan import ComparisonPlan, PlannedRun
from sapo.workflows.comparing.processes import Event, RunSlots, run_side_by_side
from sapo.workflows.comparing.results import ComparisonResults
from sapo.workflows.comparing.table import as_markdown


class ComparisonListener(Protocol):
    """Receives the progress of a comparison."""

    def coldstart(self, progress: ColdStartProgress) -> None:
        """Receive an evaluation while a starting model is made."""

    def runs(self, outcomes: Sequence[RunOutcome], slots: RunSlots) -> None:
        """Receive the outcomes so far, when the runs begin or resume."""

    def event(self, event: Event) -> None:
        """Receive an event of a run."""

    def note(self, text: str) -> None:
        """Receive a note for the user."""


class Quiet:
    """A listener that does nothing."""

    def coldstart(self, progress: ColdStartProgress) -> None:
        """Do nothing."""

    def runs(self, outcomes: Sequence[RunOutcome], slots: RunSlots) -> None:
        """Do nothing."""

    def event(self, event: Event) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class ComparedRuns:
    """What `compare` returns."""

    directory: Path
    results: ComparisonResults

    @property
    def unfinished(self) -> list[str]:
        """Return the runs that have not ended, because the comparison was stopped."""
        return [o.name for o in self.results.outcomes if not o.ended]


def compare(
    plan: ComparisonPlan,
    directory: str | Path | None = None,
    *,
    jobs: int | None = None,
    listener: ComparisonListener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ComparedRuns:
    """Make the runs of a comparison and compute its figures.

    Where all runs have ended nothing is run: the figures are computed again, by the rules of this version.

    Args:
        plan: from `load_comparison`.
        directory: where it is kept; comparisons/<name of the recipe> when None. The same comparison there is resumed.
        jobs: runs at a time; when None one for each GPU, else as many as the cores allow.
        listener: receives the progress.
        should_stop: when it returns true, active runs are saved and stopped; the figures are of those that have ended.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be run, or the directory holds something else.
        ColdStartError: a starting model missed its target.
        RunProcessError: the process of a run ended without a result; the others were saved.
        Interrupted: stopped while a starting model was made.
    """
    listener = listener or Quiet()
    path = Path("comparisons") / plan.name if directory is None else Path(directory)
    check_directory(path, plan)
    runs = plan.runs(path)
    # Figures of a finished comparison can be computed where its device or its data are gone.
    slots = None if all(RunOutcome.of(run).ended for run in runs) else find_slots(plan.base, jobs)
    if slots is not None:
        _check_runs(runs)
    kept = ComparisonDirectory.open(path, plan)
    try:
        kept.wait_for_runs(should_stop, listener.note)
        if slots is None:
            listener.note(f"all {len(runs)} runs have ended: nothing is run, the figures are computed again")
        else:
            _make_starts(runs, listener, should_stop)
            _execute_runs(runs, kept, slots, listener, should_stop)
        results = ComparisonResults.of(plan, [RunOutcome.of(run) for run in runs])
        kept.write_results(results.to_json(), as_markdown(results))
        return ComparedRuns(path, results)
    finally:
        kept.close()


def find_slots(base: RunConfig, jobs: int | None = None) -> RunSlots:
    """Decide how many runs go side by side, and on which GPUs.

    Raises:
        ConfigError: jobs below 1, or a device that is not there.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more; got {jobs}")
    device = resolve_device(base.device)
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return RunSlots(jobs or max(1, cores // (base.threads or 1)))
    if device != "cuda":  # one GPU was named: all runs are on it
        return RunSlots(jobs or 1)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return RunSlots(jobs or len(gpus), tuple(gpus))


def _check_runs(runs: Sequence[PlannedRun]) -> None:
    """Find the mistakes that would stop the first run of each arm, before anything is written."""
    for run in {run.arm: run for run in runs}.values():
        check_loggers(run.config)
        check_engine(run.config)
        check_optimizer(run.config)
        check_objectives(run.config)
    load_tasks(runs[0].config)


def _make_starts(runs: Sequence[PlannedRun], listener: ComparisonListener, should_stop: Callable[[], bool]) -> None:
    """Make the cold starts of all runs, one for each model."""
    torch.set_num_threads(runs[0].config.threads or 1)  # another count is another rounding, and another cold start
    waiting = [run.config for run in runs if not RunOutcome.of(run).ended and run.config.model.coldstart is not None]
    for config in {coldstart_path(config): config for config in waiting}.values():
        ensure_coldstart(config, listener.coldstart, should_stop)


def _execute_runs(
    runs: Sequence[PlannedRun],
    kept: ComparisonDirectory,
    slots: RunSlots,
    listener: ComparisonListener,
    should_stop: Callable[[], bool],
) -> None:
    """Execute all runs that have not ended, side by side.

    Raises:
        ConfigError: a run was refused; the others were saved.
    """
    outcomes = [RunOutcome.of(run) for run in runs]
    listener.runs(outcomes, slots)
    refused: list[str] = []

    def hear(event: Event) -> None:
        if event.kind == "refused":
            refused.append(f"{event.run}: {event.fields['message']}")
        listener.event(event)

    waiting = [run for run, outcome in zip(runs, outcomes, strict=True) if not outcome.ended]
    assert kept.runs_lock is not None
    run_side_by_side(waiting, slots, kept.path / "logs", kept.runs_lock, hear, should_stop)
    if refused:
        raise ConfigError(refused[0])
