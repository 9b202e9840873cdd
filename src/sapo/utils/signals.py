"""The signals by which a run is stopped, and what its other processes do about them.

A cluster sends them to every process of a job, and not to the run's own process alone. Whether the run stops is for the
run to say: what works for it goes on until it is told, and ends with it in any case.
"""

from __future__ import annotations

import os
import signal

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a command to save and stop: Ctrl-C, an end by the system, a terminal that closes, and what clusters
send before they take a machine back."""

ANNOUNCING = tuple(number for number in STOPPING if number not in (signal.SIGINT, signal.SIGTERM))
"""Those of them that no program ends its own children by."""


def ignore(*numbers: int) -> None:
    """Ignore signals in this process, and in all that it starts."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def outlive(*numbers: int) -> None:
    """Ignore signals in this process alone: those that it starts or forks can still be ended by them."""
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if hasattr(os, "register_at_fork"):  # a program that is executed has the system's handlers anyway
        os.register_at_fork(after_in_child=restore)
