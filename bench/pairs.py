"""Interleaved pairs: A B A B ..., ratios pair by pair, so that a machine whose speed drifts does not decide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """Seconds per unit of work of each run of two alternatives, paired."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times longer the peer took, pair by pair."""
        return [p / o for o, p in zip(self.ours, self.peer, strict=True)]

    def row(self) -> dict[str, float]:
        """Medians, and the ratio with its range."""
        return {
            "ours": statistics.median(self.ours),
            "theirs": statistics.median(self.peer),
            "ratio": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
        }


def measure_pairs(ours: Callable[[], float], peer: Callable[[], float], pairs: int = 5) -> Pairs:
    """Time two functions in turn, after one run of each that is not counted.

    Args:
        ours, peer: each returns how many units of work it did.
    """
    ours()
    peer()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for function, record in ((ours, times[0]), (peer, times[1])):
            started = time.perf_counter()
            work = function()
            record.append((time.perf_counter() - started) / work)
    return Pairs(*times)
