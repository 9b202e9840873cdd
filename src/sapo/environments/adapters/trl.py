"""Environments as TRL's GRPOTrainer takes them: `environment_factory` and `tools`.

An environment is a class with `reset(**row)`, which may return what is said before the first turn, and public methods,
which are the tools. `get_reward()` scores the episode; without it the task's verifier scores the last turn. As in TRL,
a tool that raises is answered with the error, and a reward of None means that the episode cannot be scored: it leaves
loss and baseline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.environments.base import Answer, Ask
from sapo.environments.calls import check_format
from sapo.environments.side import Side
from sapo.environments.tool_task import converse, figures_of, offered
from sapo.environments.tools import Toolbox, load_tools
from sapo.environments.wrapping import Wrapped, row_of
from sapo.errors import TaskError
from sapo.utils.plugins import import_named

_NO_TOOLS = ("reset", "get_reward")


class TrlEnvironment(Wrapped):
    """A task played by a TRL environment.

    Args:
        task: source of the prompts.
        factory: makes an environment; one plays an episode at a time and is reset for the next.
        tools: further tools, which belong to no environment.
        calls: format of calls.
    """

    prefers_chat = True

    def __init__(
        self,
        task: Any,
        factory: Callable[[], Any],
        tools: Sequence[Callable[..., Any]] = (),
        calls: str = "auto",
    ) -> None:
        super().__init__(task)
        check_format(calls)
        self.factory, self.further, self.calls = factory, list(tools), calls
        probe = factory()
        if not callable(getattr(probe, "reset", None)):
            raise TaskError(f"a TRL environment must have a method reset; {type(probe).__name__} has none; write one")
        self.toolbox = self._toolbox_of(probe)
        self._idle = [probe]

    @classmethod
    def named(cls, name: str, task: Any, tools: Sequence[Any] = (), calls: str = "auto") -> TrlEnvironment:
        """Make one of `module:Class`.

        Raises:
            TaskError: it cannot be imported, or is no TRL environment.
        """
        factory = import_named(name, what="environment", noun="class", error=TaskError)
        return cls(task, factory, load_tools(tools), calls)

    async def play(self, prompt: Prompt, ask: Ask) -> Score | Answer:
        """Reset an environment to the prompt's row, let the model call its methods, and take its reward."""
        environment = self._idle.pop() if self._idle else self.factory()
        tools = offered(self._toolbox_of(environment), prompt)
        async with Side() as side:
            opening = await side.call(environment.reset, **_taken(environment.reset, row_of(prompt)))
            if not isinstance(opening, str | None):
                raise TypeError(
                    f"reset must return a text or None; got {type(opening).__name__}; pictures are not taken"
                )
            text, results = await converse(ask, opening or "", tools, self.calls, side, tells=(Exception,))
            score = await self._score(environment, side, text)
        self._idle.append(environment)  # not after a failure: its state is unknown
        figures = figures_of(tools.names, results)
        return Answer(text or "", figures) if score is None else replace(score, figures=figures)

    async def _score(self, environment: Any, side: Side, text: str | None) -> Score | None:
        """Return an environment's reward; None where the task's verifier is to judge."""
        if hasattr(environment, "get_reward"):
            reward = await side.call(environment.get_reward)
            if reward is None:
                raise ValueError("get_reward returned None: the episode cannot be scored")
            return Score(reward)
        if text is None:
            return Score(0.0, Status.TRUNCATED, "the last turn has no end token")
        return None

    def toolbox_of(self, prompt: Prompt) -> Toolbox:
        """Return the tools that a prompt offers.

        Raises:
            TaskError: its row names one that the environment has not.
        """
        return offered(self.toolbox, prompt)

    def _toolbox_of(self, environment: Any) -> Toolbox:
        # Listed on the class: looking at the instance would evaluate its properties.
        methods = [
            getattr(environment, name)
            for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)
            if not name.startswith("_") and name not in _NO_TOOLS
        ]
        return Toolbox([*self.further, *methods])


def _taken(function: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that a function takes: all of them where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return row
    return {p.name: row[p.name] for p in parameters if p.name in row}
