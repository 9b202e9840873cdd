"""What a logger is, and how it names its panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Logger(Protocol):
    """Takes the figures of a step."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures by name; `task/<name>/...` are those of one task."""

    def close(self) -> None:
        """Write everything down before this returns."""


def panel_name(name: str) -> str:
    """Return a figure's name for loggers that make a panel of what stands before the first slash, by task.

    >>> panel_name("task/add4/reward/mean"), panel_name("train/reward/mean")
    ('task_add4/reward/mean', 'train/reward/mean')
    """
    return f"task_{name.removeprefix('task/')}" if name.startswith("task/") else name
