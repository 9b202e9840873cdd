"""The interface of whoever is told of a run's progress."""

from __future__ import annotations

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


class Silent:
    """A listener that says nothing."""

    def started(self, config: RunConfig) -> None: ...

    def record(self, record: dict[str, Any]) -> None: ...

    def warning(self, text: str) -> None: ...

    def checkpoint(self, checkpoint: Checkpoint) -> None: ...

    def resumed(self, checkpoint: Checkpoint) -> None: ...
