"""Compare rewards as what they are: numbers that may have been rounded to float32 on their way."""

from __future__ import annotations

from collections.abc import Sequence

ROUNDING = 2.0**-20
"""Share of the larger |reward| by which two rewards may differ and still be equal. Sums of a few float32 differ by
less. Divided by its own deviation, such a difference would be a full advantage."""


def all_equal(rewards: Sequence[float]) -> bool:
    """Tell whether rewards are equal but for rounding.

    >>> all_equal([0.1 + 0.2, 0.3, 0.3]), all_equal([0.3, 0.30001])
    (True, False)
    """
    return max(rewards) - min(rewards) <= ROUNDING * max(map(abs, rewards))


def is_right(reward: float, threshold: float = 1.0) -> bool:
    """Tell whether a reward reaches the threshold but for rounding.

    >>> is_right(0.1 * 3 + 0.7), is_right(0.99999994), is_right(0.999)
    (True, True, False)
    """
    return reward >= threshold - ROUNDING * abs(threshold)
