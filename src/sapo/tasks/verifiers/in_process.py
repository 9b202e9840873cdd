"""Reward functions of this process: lambdas, functions of a script or a notebook, bound methods.

A worker process could not import them, so they run here, in a thread of their own with a deadline. A coroutine function
is called for all completions of a batch at once. A recipe names such a function as `in_process:NAME@FINGERPRINT`, which
is known in the process that was given the function, and nowhere else: no other function of that name takes its place.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import re
import threading
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError, UserError
from sapo.tasks.base import checked_score
from sapo.tasks.verifiers.base import ABSTAINED
from sapo.tasks.verifiers.conventions import Signature, convention_of
from sapo.tasks.workers.wire import MAX_DETAIL
from sapo.utils.fingerprints import fingerprint_function
from sapo.utils.text import name_error

PREFIX = "in_process:"
DEFAULT_DEADLINE = 60.0
"""Seconds for one call of a function."""
AT_ONCE = 64
"""Calls of a coroutine function that are under way at the same time."""
GRACE = 5.0
"""Seconds beyond the deadlines after which an event loop that does not answer is left behind."""

Requests = Sequence[tuple[Sequence[str], Prompt]]
"""Completions with their prompt, for several prompts."""
Call = tuple[tuple[str, ...], Prompt]

_functions: dict[str, Callable[..., Any]] = {}
_fingerprints: dict[str, str] = {}
"""Of the functions as they were when they were given: what they keep may have changed since."""


def keep_function(function: Callable[..., Any], taken: Sequence[str] = ()) -> str:
    """Make a function known in this process, and return how a recipe names it.

    A function of the same name and content that was given before is replaced, unless its name is among `taken`.

    >>> keep_function(lambda completion: 1.0).partition("@")[0]
    'in_process:reward'
    """
    plain = getattr(function, "func", function)  # of functools.partial
    name = getattr(plain, "__name__", type(plain).__name__)
    name = "reward" if name == "<lambda>" else re.sub(r"\W", "_", name)
    known = next(
        (kept for kept, other in _functions.items() if _same(other, function) and PREFIX + kept not in taken), None
    )
    if known is not None:
        return PREFIX + known
    fingerprint = fingerprint_function(function)
    wanted = name = f"{name}@{fingerprint[:8]}"
    number = 1
    while PREFIX + name in taken:
        number += 1
        name = f"{wanted}.{number}"
    _functions[name], _fingerprints[name] = function, fingerprint
    return PREFIX + name


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether these are one function, or one method of one object: each access to a method makes a new one."""
    if isinstance(one, types.MethodType) and isinstance(other, types.MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


@contextmanager
def standing_in(given: Sequence[str], named: Sequence[str]) -> Iterator[None]:
    """Let functions stand in for those of the same names that a run was begun with, whatever their content.

    Whether a run takes them is for the comparison with its inputs to say; where it refuses, all is as before.

    Args:
        given: of the functions, from `keep_function`.
        named: by the recipe of the run.
    """
    functions, fingerprints = dict(_functions), dict(_fingerprints)
    left = [name for name in given if name not in named]
    for name in named:
        other = next((g for g in left if shown(g) == shown(name)), None)
        if name not in given and other is not None:
            left.remove(other)
            place, source = name.removeprefix(PREFIX), other.removeprefix(PREFIX)
            _functions[place], _fingerprints[place] = _functions[source], _fingerprints[source]
    try:
        yield
    except UserError:
        for kept, before in ((_functions, functions), (_fingerprints, fingerprints)):
            kept.clear()
            kept.update(before)  # type: ignore[arg-type]
        raise


def shown(name: str) -> str:
    """Return a function's own name.

    >>> shown("in_process:share@1f2e3d4c")
    'share'
    """
    return name.removeprefix(PREFIX).partition("@")[0]


def fingerprint_of(name: str) -> str:
    """Return the fingerprint of a function of this process, as it was when it was given; "missing" of none."""
    return _fingerprints.get(name.removeprefix(PREFIX), "missing")


def is_in_process(name: str) -> bool:
    """Return whether a verifier's name is that of a function of this process."""
    return name.startswith(PREFIX)


def load_function(name: str, deadline: float = DEFAULT_DEADLINE) -> InProcess:
    """Return the verifier that a recipe names `in_process:NAME`.

    Raises:
        TaskError: no such function was given to this process, or it has another signature.
    """
    short = name.removeprefix(PREFIX)
    if short not in _functions:
        raise TaskError(
            f"the reward function {shown(name)!r} was one of the Python session that began the run, and cannot be "
            f"imported; got a process without it; go on from Python: sapo.resume(RUN, rewards=[{shown(name)}]), or put "
            "it in a module and start a run with module:function"
        )
    return InProcess.of(shown(name), _functions[short], deadline)


@dataclass(frozen=True)
class InProcess:
    """Calls a function of this process, and awaits a coroutine.

    A call that takes longer than the deadline is left behind with its thread: Python cannot end a thread. Its
    completions have the status `verifier_error`, as those of a call that raises an exception.
    """

    name: str
    function: Callable[..., Any]
    signature: Signature
    concurrent: bool
    """Whether the function is a coroutine function, so that its calls can be under way together."""
    deadline: float = DEFAULT_DEADLINE

    @classmethod
    def of(cls, name: str, function: Callable[..., Any], deadline: float) -> InProcess:
        """Read a function's signature. A function of one parameter of any name takes the completion.

        Raises:
            TaskError: it follows no convention.
        """
        call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
        concurrent = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        function = _by_keyword(function)
        return cls(name, function, Signature.of(name, function), concurrent, deadline)

    @property
    def batched(self) -> bool:
        """Return whether the function judges all completions of a prompt in one call."""
        return self.signature.convention.batched

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return self.score_many([((text,), prompt)])[0][0] or ABSTAINED

    def score_batch(self, texts: Sequence[str], prompt: Prompt) -> list[Score | None]:
        """Score completions of a prompt, None where the function abstains."""
        return self.score_many([(texts, prompt)])[0]

    def score_many(self, requests: Requests) -> list[list[Score | None]]:
        """Score the completions of several prompts, None where the function abstains.

        A call that fails gives the status `verifier_error` to its completions.
        """
        calls: list[Call] = []
        for texts, prompt in requests:
            calls += [(tuple(texts), prompt)] if self.batched else [((text,), prompt) for text in texts]
        found = iter(self._together(calls) if self.concurrent else [self._one(call) for call in calls])
        return [
            next(found) if self.batched else [score for _ in texts for score in next(found)] for texts, _ in requests
        ]

    def _one(self, call: Call) -> list[Score | None]:
        texts, prompt = call
        try:
            result = _caller.run(lambda: self.function(**self.signature.arguments(texts, prompt)), self.deadline)
            if inspect.isawaitable(result):
                (result,) = _loop.run([_awaited(result)], self.deadline)
                if isinstance(result, BaseException):
                    raise result
            return self._scores(result, call)
        except _Late:
            return self._failed(call, f"no answer within {self.deadline:g} s (deadline)")
        except (Exception, SystemExit) as error:
            return self._failed(call, name_error(error))

    def _together(self, calls: Sequence[Call]) -> list[list[Score | None]]:
        async def judge(call: Call) -> Any:
            return await self.function(**self.signature.arguments(*call))

        found = _loop.run([judge(call) for call in calls], self.deadline)
        scores: list[list[Score | None]] = []
        for call, result in zip(calls, found, strict=True):
            if isinstance(result, _Late):
                scores.append(self._failed(call, f"no answer within {self.deadline:g} s (deadline)"))
            elif isinstance(result, BaseException):
                scores.append(self._failed(call, name_error(result)))
            else:
                try:
                    scores.append(self._scores(result, call))
                except Exception as error:
                    scores.append(self._failed(call, name_error(error)))
        return scores

    def _scores(self, result: Any, call: Call) -> list[Score | None]:
        scores = self.signature.convention.scores(result, len(call[0]))
        return [None if score is None else checked_score(score) for score in scores]

    def _failed(self, call: Call, detail: str) -> list[Score | None]:
        return [Score(0.0, Status.VERIFIER_ERROR, detail[:MAX_DETAIL])] * len(call[0])


def _by_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that can be called by keyword: one of a single parameter of any name gets the completion."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return function  # refused where its signature is read
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in parameters]
    known = convention_of(names).mark in names
    if known or len(needed) != 1 or needed[0].kind is needed[0].KEYWORD_ONLY:
        return function
    return lambda completion: function(completion)


# -------------------------------------------------------------------------------------------------------- the threads


class _Late(Exception):  # noqa: N818 (no error of ours: a deadline has passed)
    """A call took longer than its deadline."""


async def _awaited(result: Any) -> Any:
    return await result


_Work = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
"""Calls for a thread, and None where none will follow."""


class _Caller:
    """A thread that makes calls one after the other; another takes its place where one does not return."""

    def __init__(self) -> None:
        self._work: _Work | None = None
        self._lock = threading.Lock()

    def run(self, call: Callable[[], Any], seconds: float) -> Any:
        """Return what the call returns.

        Raises:
            _Late: it takes longer.
        """
        with self._lock:
            if self._work is None:
                self._work = queue.SimpleQueue()
                threading.Thread(target=_serve, args=(self._work,), name="sapo-reward", daemon=True).start()
            future: Future[Any] = Future()
            self._work.put((call, future))
            try:
                return future.result(seconds)
            except BaseException as error:
                if future.done():  # an error of the function's own
                    raise
                self._work.put(None)  # the thread ends when its late call does
                self._work = None
                if isinstance(error, FutureTimeoutError):
                    raise _Late from None
                raise


def _serve(work: _Work) -> None:
    while (item := work.get()) is not None:
        call, future = item
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del call, future, item


class _Loop:
    """An event loop in a thread of its own: in a notebook, the main thread has one that is running."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, coroutines: Sequence[Coroutine[Any, Any, Any]], seconds: float) -> list[Any]:
        """Return what each coroutine returns, or its exception; `_Late` where it takes longer than `seconds`."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_turn, args=(self._loop,), name="sapo-reward-loop", daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(_all(coroutines, seconds), self._loop)
            rounds = -(-len(coroutines) // AT_ONCE)
            try:
                return future.result(seconds * rounds + GRACE)
            except BaseException as error:
                if future.done():
                    raise
                # A coroutine that does not give the loop back, or an interrupt: the thread ends when it can.
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None
                if isinstance(error, FutureTimeoutError):
                    return [_Late() for _ in coroutines]
                raise


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop until it is stopped, then cancel what is under way on it."""
    loop.run_forever()
    if under_way := asyncio.all_tasks(loop):
        for task in under_way:
            task.cancel()
        loop.run_until_complete(asyncio.wait(under_way, timeout=1))
    loop.close()


async def _all(coroutines: Sequence[Coroutine[Any, Any, Any]], seconds: float) -> list[Any]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with room:
            try:
                async with asyncio.timeout(seconds) as limit:
                    return await coroutine
            except TimeoutError:
                if limit.expired():
                    raise _Late from None
                raise

    return await asyncio.gather(*map(one, coroutines), return_exceptions=True)


_caller = _Caller()
_loop = _Loop()
