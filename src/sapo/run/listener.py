"""The interface of whoever is told of a run's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sapo.config import RunConfig
from sapo.training.checkpoint import Checkpoint


class Listener(Protocol):
    """Who is told of a run's progress."""

    def started(self, config: RunConfig) -> None:
        """Hear that the loop begins, or goes on."""

    def record(self, record: dict[str, Any]) -> None:
        """Hear that a line of metrics.jsonl was written."""

    def warning(self, text: str) -> None:
        """Hear of something the user should know and may ignore."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Hear that a checkpoint was written."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Hear that the run resumes from a checkpoint."""


def note(listener: Listener, text: str) -> None:
    """Tell a listener what is neither progress nor a warning, if it has a method `note` for that."""
    tell = getattr(listener, "note", None)
    if tell is not None:
        tell(text)


def tell_samples(listener: Listener, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Show a listener some sampled completions, if it has a method `samples` for that.

    Args:
        samples: of `sampled_completions`.
    """
    tell = getattr(listener, "samples", None)
    if tell is not None:
        tell(step, samples)


def tell_phase(listener: Listener, step: int, name: str) -> None:
    """Tell a listener which phase of a step begins, if it has a method `phase` for that."""
    tell = getattr(listener, "phase", None)
    if tell is not None:
        tell(step, name)


class Silent:
    """A listener that says nothing."""

    def started(self, config: RunConfig) -> None:
        """Say nothing."""

    def record(self, record: dict[str, Any]) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Say nothing."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Say nothing."""
