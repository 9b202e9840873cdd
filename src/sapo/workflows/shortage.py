"""Say in one line where a run was given no more room, on the disk or in memory: what is safe, and how to go on."""

from __future__ import annotations

from sapo.errors import MemoryShortage, RunFailure, StorageError
from sapo.run.loop import TrainingRun
from sapo.training.checkpoint import list_checkpoints
from sapo.utils.faults import memory_failure
from sapo.utils.files import storage_failure


def shortage(training: TrainingRun, error: Exception) -> RunFailure | None:
    """Return what to raise where a disk or the memory has ended a run; None where something else did."""
    if (reason := storage_failure(error)) is not None:
        return StorageError(_storage_line(training, reason))
    if (reason := memory_failure(error)) is not None:
        return MemoryShortage(_memory_line(training, reason))
    return None


def _storage_line(training: TrainingRun, reason: str) -> str:
    """Say what could not be written, what is safe, and how to go on."""
    run = training.directory.path
    way_out = (
        f"make room or mend the disk, then `sapo resume {run}` goes on"
        if (run / "config.yaml").is_file()
        else f"the run directory {run} is gone; start the run again"
    )
    return (
        f"step {training.state.step + 1}: a file of the run cannot be written or read: {reason}; {_safe(training)}; "
        f"{way_out}"
    )


def _memory_line(training: TrainingRun, reason: str) -> str:
    """Say what asked for more memory than there is, what is safe, and what makes the run smaller."""
    tokens = training.config.train.tokens_per_microbatch
    return (
        f"step {training.state.step + 1}: there was not enough memory: {reason}; {_safe(training)}; free memory, or "
        f"`sapo resume {training.directory.path} train.tokens_per_microbatch=N` with less than {tokens} takes less for "
        "an update; a new run with a lower rollout.max_rows takes less for drawing"
    )


def _safe(training: TrainingRun) -> str:
    found = list_checkpoints(training.directory.checkpoints)
    return f"the checkpoint of {found[0].label} is safe" if found else "there is no checkpoint yet"
