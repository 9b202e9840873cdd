"""A user's function as a verifier, `module:function`, sync or async. It runs in a worker process."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.base import checked_reward
from sapo.utils.plugins import import_named

USER_PARAMETERS = ("completion", "answer", "prompt", "metadata")

DEFAULT_DEADLINE = 60.0
"""Seconds for one completion: long enough for a judge behind an API, without blocking a run for ever."""


@dataclass
class UserFunction:
    """Calls a function with those of USER_PARAMETERS that its signature takes, and awaits a coroutine.

    All coroutines of a worker run in one event loop, so that a client kept in the module can be reused.

    Raises:
        TaskError: the module or function does not exist, or the function has another signature.
    """

    spec: str
    function: Callable[..., Any] = field(init=False)
    accepted: tuple[str, ...] = field(init=False)
    runner: asyncio.Runner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.function = import_named(self.spec, what="verifier", noun="function", error=TaskError)
        self.accepted = _accepted_parameters(self.spec, self.function)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        values = {"completion": text, "answer": prompt.answer, "prompt": prompt.text, "metadata": prompt.metadata}
        result = self.function(**{name: values[name] for name in self.accepted})
        if inspect.isawaitable(result):
            self.runner = self.runner or asyncio.Runner()
            result = self.runner.run(_awaited(result))
        return result if isinstance(result, Score) else Score(checked_reward(result))


async def _awaited(result: Any) -> Any:
    return await result


def _accepted_parameters(spec: str, function: Callable[..., Any]) -> tuple[str, ...]:
    rule = f"verifier {spec!r} must take completion and may take {', '.join(USER_PARAMETERS[1:])}, by keyword"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TaskError(f"{rule}; got a function without a readable signature; wrap it in one of your own") from error
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = tuple(name for name in USER_PARAMETERS if takes_all or name in by_keyword)
    unmet = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.kind is p.POSITIONAL_ONLY or p.name not in USER_PARAMETERS
    ]
    if "completion" not in accepted or unmet:
        got = f"required {unmet}" if unmet else f"parameters {[p.name for p in parameters]}"
        raise TaskError(f"{rule}; got {got}; rename them or give defaults")
    return accepted
