"""What a logger is, and how it names its panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Logger(Protocol):
    """Takes the figures of a step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures by name; `task/<name>/...` are those of one task."""

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Log completions with their rewards, of `sampled_completions`."""

    def close(self) -> None:
        """Write everything down before this returns."""


SAMPLE_COLUMNS = ("step", "task", "prompt", "text", "reward")
"""Columns of a table of sampled completions."""


def sample_rows(step: int, samples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return sampled completions as rows of a table.

    >>> sample_rows(1, [{"task": "t", "prompt": "q", "text": "a", "reward": 0.5}])
    [[1, 't', 'q', 'a', 0.5]]
    """
    return [[step, *(sample[name] for name in SAMPLE_COLUMNS[1:])] for sample in samples]


def panel_name(name: str) -> str:
    """Return a figure's name for loggers that make a panel of what stands before the first slash, by task.

    >>> panel_name("task/add4/reward/mean"), panel_name("train/reward/mean")
    ('task_add4/reward/mean', 'train/reward/mean')
    """
    return f"task_{name.removeprefix('task/')}" if name.startswith("task/") else name
