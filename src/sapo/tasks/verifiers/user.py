"""A user's function as a verifier, `module:function`, sync or async. It runs in a worker process."""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import ABSTAINED
from sapo.tasks.verifiers.conventions import Signature
from sapo.tasks.verifiers.limits import DATA, half_of_the_memory, memory_limit
from sapo.utils.plugins import import_named

DEFAULT_DEADLINE = 60.0
"""Seconds for one completion: long enough for a judge behind an API, without blocking a run for ever."""


DEFAULT_MEMORY_GB = 8.0
"""GiB that a function may use, where the machine has twice as many: a run must not be ended for want of memory."""


def default_memory_gb() -> float:
    """Return DEFAULT_MEMORY_GB, or half of the machine's memory where that is less."""
    return min(DEFAULT_MEMORY_GB, half_of_the_memory())


def check_memory(memory_gb: object) -> None:
    """Refuse a limit of memory that is no positive number of GiB."""
    number = isinstance(memory_gb, (int, float)) and not isinstance(memory_gb, bool)
    if not number or not 0 < memory_gb < math.inf:  # type: ignore[operator]
        raise TaskError(f"a verifier's memory_gb must be a positive number of GiB; got {memory_gb!r}; set memory_gb: 8")


@dataclass
class UserFunction:
    """Calls a function as its parameters say (conventions.py), and awaits a coroutine.

    All coroutines of a worker run in one event loop, so that a client kept in the module can be reused.

    Raises:
        TaskError: the module or function does not exist, or the function has another signature.
    """

    spec: str
    memory_gb: float = field(default_factory=default_memory_gb)
    """GiB of private memory that its process may use, its module included, and each process it starts."""
    function: Callable[..., Any] = field(init=False)
    signature: Signature = field(init=False)
    runner: asyncio.Runner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        with self._limited():
            self.function = import_named(self.spec, what="verifier", noun="function", error=TaskError)
        self.signature = Signature.of(self.spec, self.function)

    @property
    def batched(self) -> bool:
        """Return whether the function judges all completions of a prompt in one call."""
        return self.signature.convention.batched

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return self.score_batch([text], prompt)[0] or ABSTAINED

    def score_batch(self, texts: Sequence[str], prompt: Prompt) -> list[Score | None]:
        """Score completions of a prompt, None where the function abstains: in one call where it takes several."""
        if not self.batched and len(texts) > 1:
            return [score for text in texts for score in self.score_batch([text], prompt)]
        with self._limited():
            result = self.function(**self.signature.arguments(texts, prompt))
            if inspect.isawaitable(result):
                self.runner = self.runner or asyncio.Runner()
                result = self.runner.run(_awaited(result))
        return self.signature.convention.scores(result, len(texts))

    @contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            with memory_limit(DATA, int(min(self.memory_gb * 2**30, sys.maxsize))):
                yield
        except MemoryError as error:
            rule = f"{self.spec} may use {self.memory_gb:.3g} GiB, and asked for more"
            raise MemoryError(f"{rule}; mend it, or set its memory_gb") from error


async def _awaited(result: Any) -> Any:
    return await result
