"""The two consoles that the commands share, and a stop that is asked for by a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from sapo.utils.signals import STOPPING
from sapo.utils.text import visible

# Without emoji: rich would print the ":b:" of a path or of a model's text as a picture.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)


def say(text: str) -> None:
    """Print a line as plain text: no markup or emoji, nothing cut, control characters escaped."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


class StopSignal:
    """Is true once one of STOPPING has come; Ctrl-C after it, or SIGTERM twice, stops at once.

    SIGHUP and SIGUSR1 may come twice, and SIGTERM after them: a shell and the kernel each send a SIGHUP, and a cluster
    warns before it ends a job. What is being saved then is saved to its end.
    """

    last: int = signal.SIGINT
    """The signal that came; the exit code names it."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, _: Any) -> None:
        """Handle a signal."""
        if self.received is not None:
            asked_before = self.received in (signal.SIGINT, signal.SIGTERM)
            if number == signal.SIGINT or (number == signal.SIGTERM and asked_before):
                os._exit(128 + number)  # asked twice: the newest checkpoint on disk is kept
            return
        self.received = number
        StopSignal.last = number
        try:
            errors.print("stopping at the next safe point; Ctrl-C stops at once", markup=False)
        except OSError:  # the terminal is gone; writing to it would end the run before it is saved
            _write_nowhere()


def _write_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch STOPPING for the duration of the block; what is given says whether one came.

    A signal that was ignored when the command was started, as nohup ignores SIGHUP, stays ignored.
    """
    stop = StopSignal()
    caught = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop.handle) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
