"""The time that an environment has to reply: what is left of it, and what is not on it.

An episode is played in one task, whose context has its clock. Elsewhere, as in tests of an environment alone, time is
without end.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol

TOOLS_SHARE = 0.8
"""Share of the time to reply that the calls of one turn may take, all together. The rest is for what surrounds them."""


class Clock(Protocol):
    """The clock of one episode."""

    most: float
    """Seconds that its environment has between two turns."""

    def seconds(self) -> float:
        """Return how many of them are spent."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Leave out the time that passes inside."""
        ...


CLOCK: ContextVar[Clock | None] = ContextVar("CLOCK", default=None)
"""Set by whoever plays the episode."""


def tool_seconds() -> float:
    """Return the seconds that are left for the calls of this turn; infinite where nothing counts them.

    >>> tool_seconds()
    inf
    """
    clock = CLOCK.get()
    return math.inf if clock is None else TOOLS_SHARE * clock.most - clock.seconds()


def off_the_clock() -> AbstractContextManager[None]:
    """Leave out of the time to reply what passes inside: waiting for a place that others have, and is ours to give."""
    clock = CLOCK.get()
    return nullcontext() if clock is None else clock.paused()
