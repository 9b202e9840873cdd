"""Calls of user code that may block: in a thread of their own, so that one that hangs holds up its episode alone.

A thread cannot be ended. One whose call never returns is left behind: it is a daemon, which ends with this process.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

_Calls = queue.SimpleQueue[Callable[[], None] | None]


class Side:
    """One thread beside the loop, which makes the calls of one episode in their order.

    async with Side() as side:
        answer = await side.call(environment.step, text)
    """

    def __init__(self) -> None:
        self._calls: _Calls | None = None

    async def __aenter__(self) -> Side:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self._leave()

    async def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Return what a function returns. A coroutine function is awaited in the loop instead.

        Raises:
            Exception: what it raises. `SystemExit` and the like become a RuntimeError: they end no thread of ours.
        """
        if asyncio.iscoroutinefunction(function):
            return await function(*args, **options)
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="sapo-environment", daemon=True).start()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if answer.done():  # the episode ran out of time
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def carry_out() -> None:
            value: Any = None
            error: BaseException | None = None
            try:
                value = function(*args, **options)
            except StopIteration as stopped:  # which no future takes
                error = RuntimeError(f"StopIteration: {stopped}")
            except Exception as raised:
                error = raised
            except BaseException as raised:
                error = RuntimeError(f"{type(raised).__name__}: {raised}")
            try:
                loop.call_soon_threadsafe(settle, value, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

        self._calls.put(carry_out)
        try:
            value = await answer
        except asyncio.CancelledError:
            self._leave()  # what is called next, to close things, must not wait for what hangs
            raise
        return await value if asyncio.iscoroutine(value) else value

    def _leave(self) -> None:
        """Let the thread end after the call that it is at; a further call has another."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _serve(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        call()
