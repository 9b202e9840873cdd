"""A comparison from its plan to its results: one cold start, runs side by side, what they come to.

Killed or stopped at any moment, the same call goes on: runs that have ended are kept, the others go on from their
newest checkpoints, and the results are those of a comparison that never was.
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
from sapo.run.loggers.all import check_loggers
from sapo.run.machine import resolve_device
from sapo.run.preflight import load_tasks
from sapo.run.trainers import check_optimizer
from sapo.workflows.coldstart import ColdStartProgress, coldstart_path, ensure_coldstart
from sapo.workflows.comparing.directory import ComparisonDirectory, check_directory
from sapo.workflows.comparing.outcomes import Outcome
from sapo.workflows.comparing.plan import ComparisonPlan, PlannedRun
from sapo.workflows.comparing.processes import Event, Places, run_side_by_side
from sapo.workflows.comparing.results import ComparisonResults
from sapo.workflows.comparing.table import as_markdown


class ComparisonListener(Protocol):
    """Who is told of a comparison's progress."""

    def coldstart(self, progress: ColdStartProgress) -> None:
        """An evaluation while a starting model is made."""

    def runs(self, outcomes: Sequence[Outcome], places: Places) -> None:
        """The runs begin, or go on; what there is of them already."""

    def event(self, event: Event) -> None:
        """Something happened to a run."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Quiet:
    """A listener that says nothing."""

    def coldstart(self, progress: ColdStartProgress) -> None: ...

    def runs(self, outcomes: Sequence[Outcome], places: Places) -> None: ...

    def event(self, event: Event) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class ComparedRuns:
    """What `compare` returns."""

    directory: Path
    results: ComparisonResults

    @property
    def unfinished(self) -> list[str]:
        """Runs that have not ended: it was stopped."""
        return [o.name for o in self.results.outcomes if not o.ended]


def compare(
    plan: ComparisonPlan,
    directory: str | Path | None = None,
    *,
    jobs: int | None = None,
    listener: ComparisonListener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ComparedRuns:
    """Make the runs of a comparison and set their results beside each other.

    Of one whose runs have all ended nothing is run: its results are counted again, by the rules of this version.

    Args:
        plan: from `load_comparison`.
        directory: where it is kept; comparisons/<name of the recipe> when None. That of the same comparison goes on.
        jobs: runs at a time; as many as there are GPUs, else as the cores bear, when None.
        listener: told of progress.
        should_stop: when it says so, runs at work are saved and left; what has ended is counted.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be run, or the directory holds something else.
        ColdStartError: a starting model missed its target.
        RunProcessError: the process of a run ended as none should; the others were saved.
        Interrupted: stopped while a starting model was made.
    """
    listener = listener or Quiet()
    path = Path("comparisons") / plan.name if directory is None else Path(directory)
    check_directory(path, plan)
    runs = plan.runs(path)
    # A comparison that is over is counted again even where its device or its data are gone.
    places = None if all(Outcome.of(run).ended for run in runs) else find_places(plan.base, jobs)
    if places is not None:
        _check_runs(runs)
    kept = ComparisonDirectory.open(path, plan)
    try:
        kept.wait_for_runs(should_stop, listener.note)
        if places is None:
            listener.note(f"all {len(runs)} runs have ended: nothing is run, the figures are counted again")
        else:
            _make_starts(runs, listener, should_stop)
            _carry_out(runs, kept, places, listener, should_stop)
        results = ComparisonResults.of(plan, [Outcome.of(run) for run in runs])
        kept.write_results(results.to_json(), as_markdown(results))
        return ComparedRuns(path, results)
    finally:
        kept.close()


def find_places(base: RunConfig, jobs: int | None = None) -> Places:
    """How many runs go side by side, and on which GPUs.

    Raises:
        ConfigError: jobs below 1, or a device that is not there.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more; got {jobs}")
    device = resolve_device(base.device)
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Places(jobs or max(1, cores // (base.threads or 1)))
    if device != "cuda":  # one GPU was named: all runs are on it
        return Places(jobs or 1)
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return Places(jobs or len(gpus), tuple(gpus))


def _check_runs(runs: Sequence[PlannedRun]) -> None:
    """Find the mistakes that would stop the first run of each arm, before anything is written."""
    for run in {run.arm: run for run in runs}.values():
        check_loggers(run.config)
        check_optimizer(run.config)
    load_tasks(runs[0].config)


def _make_starts(runs: Sequence[PlannedRun], listener: ComparisonListener, should_stop: Callable[[], bool]) -> None:
    """The cold start of all runs, made once: one for each model, where arms have models of their own."""
    torch.set_num_threads(runs[0].config.threads or 1)  # another count is another rounding, and another cold start
    waiting = [run.config for run in runs if not Outcome.of(run).ended and run.config.model.coldstart is not None]
    for config in {coldstart_path(config): config for config in waiting}.values():
        ensure_coldstart(config, listener.coldstart, should_stop)


def _carry_out(
    runs: Sequence[PlannedRun],
    kept: ComparisonDirectory,
    places: Places,
    listener: ComparisonListener,
    should_stop: Callable[[], bool],
) -> None:
    """All runs that have not ended, side by side.

    Raises:
        ConfigError: a run was refused; the others were saved.
    """
    outcomes = [Outcome.of(run) for run in runs]
    listener.runs(outcomes, places)
    refused: list[str] = []

    def hear(event: Event) -> None:
        if event.kind == "refused":
            refused.append(f"{event.run}: {event.fields['message']}")
        listener.event(event)

    waiting = [run for run, outcome in zip(runs, outcomes, strict=True) if not outcome.ended]
    assert kept.runs_lock is not None
    run_side_by_side(waiting, places, kept.path / "logs", kept.runs_lock, hear, should_stop)
    if refused:
        raise ConfigError(refused[0])
