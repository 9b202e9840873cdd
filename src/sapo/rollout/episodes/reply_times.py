"""How long environments took to reply, and how long nothing was drawn because of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np


class ReplyTimes:
    """Collects the times of waves of episodes, of any thread, until they are taken.

    >>> times = ReplyTimes()
    >>> times.add([0.25, 0.75], waited=0.75, drawn=0.25)
    >>> times.take()
    {'environment/seconds_mean': 0.5, 'environment/seconds_p95': 0.725, 'wave/idle_share': 0.75}
    >>> times.take()
    {}
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._replies: list[float] = []
        self._waited = self._drawn = 0.0

    def add(self, replies: Sequence[float], *, waited: float, drawn: float) -> None:
        """Add the waves of one call.

        Args:
            replies: seconds of each reply of an environment, as its episode's clock has them.
            waited: seconds in which environments were waited for, and nothing was drawn.
            drawn: seconds in which the engine drew.
        """
        with self._lock:
            self._replies += replies
            self._waited += waited
            self._drawn += drawn

    def take(self) -> dict[str, float]:
        """Return the figures of what was added since the last call; none where no environment has replied."""
        with self._lock:
            replies, waited, drawn = self._replies, self._waited, self._drawn
            self._clear()
        if not replies or waited + drawn <= 0:
            return {}
        return {
            "environment/seconds_mean": float(np.mean(replies)),
            "environment/seconds_p95": float(np.percentile(replies, 95)),
            "wave/idle_share": waited / (waited + drawn),
        }
