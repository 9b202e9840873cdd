"""A tool and an environment as TRL's GRPOTrainer takes them. They import nothing of TRL, as those of its docs."""

from __future__ import annotations

import os
import time
from typing import Any


def add(k: int) -> int:
    """Add to three.

    Args:
        k: how much.
    """
    if k == 4:
        raise ValueError("four is too much")
    return 3 + k


class Counter:
    """Starts with a number of its row, and is to reach seven. The column `fault` says how its reward goes wrong."""

    def reset(self, start: int, fault: str = "", **row: Any) -> str:
        self.n, self.fault = start, fault
        return f"You have {start}."

    def add(self, k: int) -> int:
        """Add to the number.

        Args:
            k: how much.
        """
        if k == 4:
            raise ValueError("four is too much")
        self.n += k
        return self.n

    def get_reward(self) -> float:
        return FAULTS.get(self.fault, lambda: 1.0 / (1 + abs(7 - self.n)))()


def _raises() -> float:
    raise KeyError("board")


def _hangs() -> float:
    time.sleep(60)
    return 1.0


def _crashes() -> float:
    os._exit(3)


FAULTS = {"nan": lambda: float("nan"), "raises": _raises, "hangs": _hangs, "crashes": _crashes}


def names_the_answer(completion: str, answer: str) -> float:
    """Reward an answer that has the right number in it."""
    return float(answer in completion)
