"""The protocol between a run and one engine elsewhere: a call is a message there and a message back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sapo.data.messages import Message


class ChannelError(Exception):
    """The other side is gone, or has not answered in time; the message says which, and what is known of it."""


class Channel(Protocol):
    """A way to one `EngineWorker`. It carries one call at a time."""

    def call(self, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> Message:
        """Have the worker handle a message, and return its answer.

        Args:
            timeout: seconds; a worker that takes longer is given up.
            should_stop: asked while the answer is waited for. The worker is then told to leave its work.

        Raises:
            ChannelError: the worker is gone, or too slow. Nothing can be sent before `restart`.
            Interrupted: when `should_stop` says so; the worker is ready for the next call.
        """
        ...

    def restart(self) -> None:
        """End the worker, if it lives, and start another in its place, which knows nothing yet.

        Raises:
            ChannelError: none can be started.
        """
        ...

    def log_to(self, directory: Path) -> None:
        """Have what the worker prints go to a directory: engines/ of the run, once it is there."""
        ...

    def close(self) -> None:
        """End the worker for good."""
        ...
