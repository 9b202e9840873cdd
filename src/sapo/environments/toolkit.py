"""Tools that come with the package: a calculator, and Python in the sandbox."""

from __future__ import annotations

import ast
import asyncio
import fcntl
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from sapo.environments.base import ToolError
from sapo.environments.clock import off_the_clock, tool_seconds
from sapo.sandbox import Limits, Outcome, ProgramResult, SandboxUnavailable, run_program

MAX_EXPRESSION = 1000
"""Limit of the characters of an expression."""

MAX_BITS = 4096
"""Limit of the bits of a whole number on the way to a result: 1,233 digits."""

PYTHON_LIMITS = Limits(cpu_seconds=5, wall_seconds=10, stdout_bytes=64 * 1024)


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: numbers with + - * / // % ** and parentheses, as in (37 * 52 + 18) / 4.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ToolError(f"an expression must have at most {MAX_EXPRESSION} characters; got {len(expression)}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ToolError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError(f"not an arithmetic expression: {expression!r:.80}") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


async def python_sandbox(code: str) -> str:
    """Run a Python program and return what it prints. Nothing is kept from one call to the next.

    Args:
        code: the program. It has the standard library, and neither files nor a network.
    """
    try:
        result = await _run_in_turn(code)
    except SandboxUnavailable as error:  # a ValueError, which the model would be told
        raise RuntimeError(f"python_sandbox needs a sandbox: {error}") from error
    if result.succeeded:
        return result.stdout
    if result.outcome is Outcome.FINISHED:
        raise ToolError(f"{_last_line(result.stderr) or result.reason}; it printed: {result.stdout!r:.300}")
    raise ToolError(result.reason)


async def _run_in_turn(code: str) -> ProgramResult:
    """Run a program in one of the places for programs; waiting for one is not on the episode's clock.

    Raises:
        ToolError: no time is left for it.
    """
    loop = asyncio.get_running_loop()
    started = asyncio.Event()

    def run() -> ProgramResult:
        with _place():
            loop.call_soon_threadsafe(started.set)
            return run_program(code, limits=limits)

    seconds = min(PYTHON_LIMITS.wall_seconds, tool_seconds())
    if seconds <= 0:
        raise ToolError("no time left to run a program")
    limits = replace(PYTHON_LIMITS, wall_seconds=seconds)
    result = loop.run_in_executor(_PLACES, run)
    try:
        with off_the_clock():
            await started.wait()
    except asyncio.CancelledError:
        result.cancel()  # nobody waits for it any more
        raise
    return await result


_PLACES = ThreadPoolExecutor(os.cpu_count() or 1, "sapo-program")
"""As many programs at a time as there are cores, so that each has its time by the clock."""

_shared: IO[bytes] | None = None
"""A file whose first bytes are the places of several processes."""

_own: list[threading.Lock] = []
"""A lock of each place for the threads of this process, which the system does not tell apart."""


def share_places() -> None:
    """Let this process and those that it forks take turns with programs, which have as many places as there are cores.

    A place is a byte of a file that nobody else sees. The system frees it when the process that holds it ends.
    """
    global _shared, _own
    _own = [threading.Lock() for _ in range(os.cpu_count() or 1)]
    _shared = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this process)


@contextmanager
def _place() -> Iterator[None]:
    """Hold a place that no other process holds; at once where places are not shared."""
    if _shared is None:
        yield
        return
    while (place := next(filter(_take, range(os.cpu_count() or 1)), None)) is None:
        time.sleep(0.005)
    try:
        yield
    finally:
        _leave(place)


def _take(place: int) -> bool:
    assert _shared is not None, "places are shared"
    if not _own[place].acquire(blocking=False):
        return False
    try:
        fcntl.lockf(_shared, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:  # another process has it
        _own[place].release()
        return False
    return True


def _leave(place: int) -> None:
    assert _shared is not None, "places are shared"
    fcntl.lockf(_shared, fcntl.LOCK_UN, 1, place)
    _own[place].release()


TOOLS: dict[str, Callable[..., Any]] = {"calculator": calculator, "python_sandbox": python_sandbox}
"""Tools by the names that a recipe may use."""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:150]


def _value(node: ast.expr) -> int | float:
    """Return the value of an expression.

    Raises:
        ToolError: it is made of something else than numbers and operators, or too large.
        ArithmeticError: it has none.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ToolError("an expression must be made of numbers, + - * / // % ** and parentheses")


def _power(base: int | float, exponent: int | float) -> int | float:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if max(abs(base).bit_length() - 1, 0) * exponent > MAX_BITS:
            raise OverflowError
        if abs(base) <= 1:
            exponent = 2 - exponent % 2
    value: Any = base**exponent
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    return value


def _bounded(value: int | float) -> int | float:
    """Refuse a number that is too large, or none.

    Raises:
        OverflowError: it is.
    """
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise OverflowError
    elif not math.isfinite(value):
        raise OverflowError
    return value


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], int | float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}
