"""Completions of logged steps, as rollouts/ holds them, and the choice of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sapo.report.runs import read_lines


def is_off_policy(record: dict[str, Any]) -> bool:
    """Tell whether an update was made on samples of other weights: by its record, or because it is not the first of its
    step."""
    return not record["on_policy"] if "on_policy" in record else record.get("update", 0) > 0


@lru_cache(maxsize=64)
def read_rollouts(path: Path, changed_at: int) -> tuple[dict[str, Any], ...]:
    """Read the completions of a logged step. `changed_at`, the file's time of change, is part of the cache's key."""
    return read_lines(path)


def rollouts_of(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the completions of a logged step.

    Raises:
        ConfigError: a line of the file is no record.
    """
    return read_rollouts(path, path.stat().st_mtime_ns)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly spaced, with the first and the last; the last alone where one is asked for.

    >>> evenly([1, 2, 3, 4, 5], 3), evenly([1, 2, 3], 1)
    ([1, 3, 5], [3])
    """
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)] if most > 1 else list(items[-1:])
