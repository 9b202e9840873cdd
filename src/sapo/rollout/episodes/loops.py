"""Run coroutines that are somebody else's to their end, and tell how long each of their steps held the loop."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sapo.environments.failures import describe_failure

_OURS = tuple(str(file) for folder in Path(__file__).parents[:2] for file in folder.glob("*.py"))

T = TypeVar("T")


@types.coroutine
def time_steps(coroutine: Coroutine[Any, Any, T], hold: Callable[[float], None]) -> Generator[Any, Any, T]:
    """Run a coroutine, and tell how long each of its steps held the loop."""
    value: Any = None
    thrown: BaseException | None = None
    while True:
        started = time.perf_counter()
        try:
            waiting = coroutine.send(value) if thrown is None else coroutine.throw(thrown)
        except StopIteration as ended:
            result: T = ended.value
            return result
        finally:
            hold(time.perf_counter() - started)
        value, thrown = None, None
        try:
            value = yield waiting
        except BaseException as error:
            thrown = error


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop of its own; in a thread of its own where the present one has a loop that runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(coroutine)
    with ThreadPoolExecutor(1, "episodes") as thread:  # a notebook runs its cells in a loop
        return thread.submit(_run_here, coroutine).result()


def _run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    # Not asyncio.run, which at its end waits for tasks that may have swallowed their cancellation.
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def describe_raised(error: BaseException) -> str:
    """Say what was raised, and where in the code of an environment."""
    return describe_failure(error, *_OURS)
