"""Tasks by name, as a recipe writes them. Any object with the methods of `Task` works without an entry here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.base import Task
from sapo.tasks.generated.arithmetic import ArithmeticTask
from sapo.tasks.generated.reasoning import ReasoningGymTask
from sapo.tasks.generated.sums import SumsTask
from sapo.tasks.rows.datasets import DatasetTask
from sapo.tasks.rows.presets import ALIASES, PRESETS
from sapo.tasks.rows.task import FileTask
from sapo.utils.names import did_you_mean

TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": ArithmeticTask,
    "file": FileTask,
    "jsonl": FileTask,
    "parquet": FileTask,
    "sums": SumsTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
    **PRESETS,
    **{alias: PRESETS[name] for alias, name in ALIASES.items()},
}


def make_task(kind: str, /, *, seed: int, **options: Any) -> Task:
    """Make a task of TASKS with its options. The option `name` is its name in logs.

    `reasoning_gym/chain_sum` is the task reasoning_gym with dataset=chain_sum.

    Raises:
        TaskError: the task or an option is unknown, or an option is missing or wrong. The nearest known name is given.

    >>> make_task("arithmetic", seed=0, digits=2).train_prompt(0).text
    '23+92='
    """
    kind, slash, dataset = kind.partition("/")
    if slash and kind == "reasoning_gym":
        options = {"dataset": dataset, **options}
    elif slash:
        kind = f"{kind}/{dataset}"
    if kind not in TASKS:
        raise TaskError(f"a task must be one of {', '.join(TASKS)}; got {kind!r}{did_you_mean(kind, TASKS)}")
    parameters = inspect.signature(TASKS[kind]).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not takes_more:
            known = [name for name in parameters if name != "seed"]
            raise TaskError(
                f"task {kind!r} takes the options {', '.join(known)}; got {option!r}{did_you_mean(option, known)}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in options:
            raise TaskError(f"task {kind!r} needs the option {name!r}; got {list(options)}; add {name}=...")
    return TASKS[kind](seed=seed, **options)
