"""Which environments are played in processes of their own, and how they are made there."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sapo.environments.adapters.skyrl import SkyRlEnvironment
from sapo.environments.adapters.trl import TrlEnvironment
from sapo.environments.tool_task import ToolTask
from sapo.environments.wrapping import SamePrompt
from sapo.utils.text import name_error

_ATTRIBUTE = "_sapo_origin"

_CODE_OF_OTHERS = ("trl:", "skyrl:")
"""Adapters of classes that run here. A client of OpenEnv only speaks with its server, whose sessions are counted."""


@dataclass(frozen=True)
class Origin:
    """What a recipe says of an environment, from which another process makes it again.

    >>> Origin("my_games:Guess", 0, {"n": 15}).kind
    'my_games:Guess'
    """

    kind: str
    """The task as `make_task` takes it; of one that is `played`, its name in logs."""
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    played: Mapping[str, Any] | None = None
    """The options `tools`, `calls` and `environment` of a task whose prompts are another's. Its rows stay where they
    are: an episode is given its prompt."""
    score_truncated: bool = False
    """Of the task whose prompts are played."""

    def make(self) -> Any:
        """Make the environment.

        Raises:
            TaskError: it cannot be made.
        """
        from sapo.tasks.registry import as_environment, make_task

        if self.played is None:
            return make_task(self.kind, seed=self.seed, **self.options)
        return as_environment(_PromptsElsewhere(self.kind, self.score_truncated), **self.played)


class _PromptsElsewhere(SamePrompt):
    """Stands for the task whose prompts are played."""

    def __init__(self, name: str, score_truncated: bool) -> None:
        super().__init__("", name)
        self.score_truncated = score_truncated


def has_code_of_others(environment: Any, tools: Any) -> bool:
    """Return whether the options of a task name code of a user's own, and all of it by name.

    >>> has_code_of_others("trl:my_games:Board", None), has_code_of_others(None, ["calculator"])
    (True, False)
    """
    named = environment.get("name") if isinstance(environment, Mapping) else environment
    tools = tools if isinstance(tools, list | tuple) else []
    if not all(isinstance(tool, str) for tool in tools):
        return False
    return str(named).startswith(_CODE_OF_OTHERS) or (named is None and any(":" in tool for tool in tools))


def is_of_others(environment: Any) -> bool:
    """Return whether the episodes of an environment run code that is not of this package.

    >>> from sapo.environments.games import Guess
    >>> is_of_others(Guess())
    False
    """
    code = [type(environment)]
    if type(environment).play is ToolTask.play:
        code += [tool.function for tool in environment.toolbox.tools.values()]
    if isinstance(environment, TrlEnvironment | SkyRlEnvironment):
        return True
    return any(getattr(part, "__module__", "").partition(".")[0] != "sapo" for part in code)


def note_origin(task: Any, origin: Origin) -> None:
    """Note how a task was made, or why another process cannot be told. One that takes no attributes is left without."""
    noted: Origin | str = origin
    try:
        pickle.dumps(origin)
    except Exception as error:  # an object among the options may raise anything
        noted = f"has options that cannot be sent to another process ({name_error(error)})"
    with suppress(AttributeError, TypeError):
        object.__setattr__(task, _ATTRIBUTE, noted)


def say_why_here(task: Any) -> str:
    """Say why a task without an origin is played in this process.

    >>> say_why_here(object())
    'is of a class with __slots__, which leave no place to note how it was made,'
    """
    if not hasattr(task, "__dict__"):
        return "is of a class with __slots__, which leave no place to note how it was made,"
    noted = task.__dict__.get(_ATTRIBUTE)
    return noted if isinstance(noted, str) else "was made in Python"


def origin_of(task: Any) -> Origin | None:
    """Return how a task was made; None of one that is played in this process."""
    found = getattr(task, "__dict__", {}).get(_ATTRIBUTE)  # not that of a task within it
    return found if isinstance(found, Origin) else None
