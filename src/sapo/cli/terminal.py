"""The two consoles that the commands share, and a stop that is asked for by a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from sapo.utils.text import visible

# Without emoji: rich would print the ":b:" of a path or of a model's text as a picture.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def say(text: str) -> None:
    """Print a line as plain text: no markup or emoji, nothing cut, control characters escaped."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


class StopSignal:
    """Is true once Ctrl-C or a termination signal has come; a second signal stops at once."""

    last: int = signal.SIGINT
    """The signal that came; the exit code names it."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, _: Any) -> None:
        """Handle either signal."""
        if self.received is not None:
            os._exit(128 + number)  # asked twice: the newest checkpoint on disk is kept
        self.received = number
        StopSignal.last = number
        errors.print("stopping at the next safe point; once more stops at once", markup=False)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch Ctrl-C and termination signals for the duration of the block; what is given says whether one came."""
    stop = StopSignal()
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
