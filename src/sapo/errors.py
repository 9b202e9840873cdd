"""Every error a caller may want to catch. Imports nothing.

`UserError` is a mistake in what was asked: the command line prints one line and exits with code 2. `RunFailure` is a
run that stopped itself: one line and exit code 1. Everything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a recipe, a model, a task or a file; the message gives the rule, the value and the way out."""


class ConfigError(UserError):
    """A recipe or an option that cannot be run as it is; the message names the key."""


class TaskError(UserError):
    """A task or a verifier that cannot be built as asked."""


class ModelError(UserError):
    """A model that cannot be used as it is; the message says what is missing."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: a file is missing, cut short or changed, or it is of another model."""


class RunFailure(RuntimeError):  # noqa: N818 (the word of the field for what ends a run)
    """A run that could not go on; the message names step and cause, and the checkpoint to resume from."""


class NonFiniteError(RunFailure):
    """A loss or gradient that is not finite; nothing was updated."""


class CollapseError(RunFailure):
    """A run that stopped itself because its policy has collapsed."""


class ColdStartError(RunFailure):
    """A cold start that did not reach its target within max_updates."""


class RankError(RunFailure):
    """A rank of a training group that died; the message says which, and where its log is."""


class ParityError(RunFailure):
    """A run whose engine samples with other weights than the policy's."""


class RunProcessError(RunFailure):
    """The process of one run of a comparison ended without a result."""


class Interrupted(Exception):  # noqa: N818 (a request to stop, not an error)
    """A request to stop was honoured between two steps of work; nothing was lost."""
