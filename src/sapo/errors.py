"""Every error a caller may want to catch. Imports nothing of the package.

`UserError` is a mistake in what was asked: the command line prints one line and exits with code 2. `RunFailure` is a
run that stopped itself: one line and exit code 1. Everything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in a recipe, a model, a task or a file; the message gives the rule, the value and the way out."""


class ConfigError(UserError):
    """A recipe or an option that cannot be run as it is; the message names the key."""


class TaskError(UserError):
    """A task or a verifier that cannot be built as asked."""


class PictureError(TaskError):
    """A picture that cannot be used: it cannot be read, is too large, or lies where it may not be taken from."""


class ModelError(UserError):
    """A model that cannot be used as it is; the message says what is missing."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: a file is missing, cut short or changed, or it is of another model."""


class ClusterError(UserError):
    """A cluster that does not answer, or has no room for the processes of a run."""


class RunFailure(RuntimeError):  # noqa: N818 (the word of the field for what ends a run)
    """A run that could not go on; the message names step and cause, and the checkpoint to resume from."""


class NonFiniteError(RunFailure):
    """A loss or gradient that is not finite; nothing was updated."""


class CollapseError(RunFailure):
    """A run that stopped itself because its policy has collapsed."""


class RewardError(RunFailure):
    """A run whose verifier or reward function failed on every completion of a step.

    Likewise one whose environments failed in more episodes of a step than the recipe allows.
    """


class ColdStartError(RunFailure):
    """A cold start that did not reach its target within max_updates."""


class StorageError(RunFailure):
    """A run that could not write or read one of its files: a full disk, or a directory that was removed."""


class MemoryShortage(RunFailure):
    """A run that was given no more memory, of the machine or of a GPU; the message says what makes it smaller."""


class RankError(RunFailure):
    """A rank of a training group that died; the message says which, and where its log is."""

    def __init__(self, message: str | None, table: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.table = tuple(table)
        """Lines: the last sign of life of every rank."""


class EngineError(RunFailure):
    """An engine in a process of its own, or all vLLM servers, that died or did not answer; the message says which."""


class SelfCheckError(RunFailure):
    """A run whose self-check chose a source of log pi_old that the run cannot have."""


class ParityError(RunFailure):
    """A run whose engine samples with other weights than the policy's."""


class RunProcessError(RunFailure):
    """The process of one run of a comparison ended without a result."""


class Interrupted(Exception):  # noqa: N818 (a request to stop, not an error)
    """A request to stop was honoured between two steps of work; nothing was lost."""
