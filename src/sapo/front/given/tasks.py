"""Tasks given in Python as the section `tasks` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapo.config import TaskConfig
from sapo.tasks import Task
from sapo.tasks.registry import keep_task


def tasks_settings(tasks: Any) -> list[dict[str, Any]]:
    """Return the section `tasks` of a recipe for tasks that were given.

    Args:
        tasks: a task's name, its settings, an object with the methods of `sapo.tasks.Task`, or a list of these or of
            pairs with weights.

    Raises:
        TaskError: they are none of these.

    >>> tasks_settings(["gsm8k", ({"name": "arithmetic", "digits": 3}, 0.5)])
    [{'name': 'gsm8k'}, {'name': 'arithmetic', 'digits': 3, 'weight': 0.5}]
    """
    if isinstance(tasks, str | Mapping | TaskConfig) or not isinstance(tasks, Sequence):
        tasks = [tasks]
    found = []
    for item in tasks:
        pair = isinstance(item, tuple) and len(item) == 2
        task, weight = item if pair else (item, None)
        settings = _task(task)
        found.append(settings if weight is None else {**settings, "weight": weight})
    return found


def _task(task: Any) -> dict[str, Any]:
    if isinstance(task, str):
        return {"name": task}
    if isinstance(task, TaskConfig):
        return task.model_dump(mode="json", exclude_unset=True)
    if isinstance(task, Mapping):
        return {str(k): v for k, v in task.items()}
    return {"name": keep_task(task)}


def keep_tasks(tasks: Any) -> None:
    """Make task objects known in this process to a run that is resumed and names them."""
    tasks_settings([t for t in (tasks if isinstance(tasks, Sequence) else [tasks]) if isinstance(t, Task)])
