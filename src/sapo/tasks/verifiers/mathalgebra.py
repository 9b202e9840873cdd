r"""Compare expressions by algebra: math-verify reads LaTeX (an ANTLR grammar) into SymPy and compares.

Departures from math-verify, each of which prevents a wrong verdict:
- Only its LaTeX reader is used. Its reader of plain expressions passes text to Python's eval, and even the LaTeX reader
  passes the digits of numbers. Here SymPy's one call of eval is replaced by a reader of literals meanwhile.
- Constants are compared with the digits that tell their smallest part, 50 at least; and to a relative 1e-6 where one
  has a decimal; math-verify takes any two tiny
  ones for equal.
- Equations are equal where one is a multiple of the other: y = 3x + 13 and 3x - y + 13 = 0.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from sapo.tasks.verifiers.mathexact import is_too_large

Result = TypeVar("Result")

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""Tolerance between a decimal and a number that has no exact decimal, such as 0.333333 and 1/3."""

DIGITS = 50
"""Digits with which constants are compared at least."""

MAX_DIGITS = 5000
"""Limit of these digits where a part of a constant is huge or tiny; beyond it constants are equal as written only."""

MAX_NESTING = 14
"""Limit of brackets in brackets: the grammar's time grows fast with them."""


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import logging

    import math_verify
    import sympy.physics.units  # noqa: F401  simplify() imports it late, and its tables of units are made by eval

    # It warns whenever it is used without its own timeouts, which our deadline replaces.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


@lru_cache(maxsize=512)
def parsed(text: str) -> Any | None:
    """Return the SymPy object of an answer, or None."""
    if re.search(r"[0-9]\.[0-9]*\.[0-9]", text):  # 5.0.0 would be 5.0 times .0
        return None
    if is_too_large(text) or _nesting(text) > MAX_NESTING:
        return None
    library = _math_verify()
    target = library.LatexExtractionConfig(boxed_match_priority=0)
    found = library.parse(
        f"\\boxed{{{text}}}", [target], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=False
    )
    return found[0] if found else None


def _nesting(text: str) -> int:
    depth = most = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        most = max(most, depth)
    return most


def expressions_equal(reference: str, given: str) -> bool:
    """Return whether two respelt expressions, equations or sets are equal."""
    gold, pred = parsed(reference), parsed(given)
    if gold is None or pred is None:
        return False
    gold, pred = _with_imaginary_unit(gold, pred)
    if _same_constant(gold, pred):
        return True
    if not _rounded(gold, pred) and _digits_to_tell(gold, pred) is None:
        return False
    # A set may be written as the relation that describes it, such as 1 < x < 2 for (1, 2).
    verdict = _math_verify().verify(gold, pred, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(verdict) and not _differ_as_constants(gold, pred)


def _with_imaginary_unit(*sides: Any) -> tuple[Any, ...]:
    """Return the sides with the imaginary unit for i, where i is all they have in letters."""
    import sympy

    letters = {symbol for side in sides for symbol in getattr(side, "free_symbols", {None})}
    if None in letters or {getattr(symbol, "name", "") for symbol in letters} != {"i"}:
        return sides
    return tuple(side.subs(dict.fromkeys(letters, sympy.I)) for side in sides)


def _same_constant(gold: Any, pred: Any) -> bool:
    """Return whether two constants without decimals agree in all digits that can tell them apart."""
    import sympy

    if _rounded(gold, pred) or not all(getattr(side, "is_number", False) for side in (gold, pred)):
        return False
    digits = _digits_to_tell(gold, pred)
    if digits is None:
        return bool(gold == pred) or (gold.is_Add and pred.is_Add and set(gold.args) == set(pred.args))
    ends = _evaluated(gold, digits), _evaluated(pred, digits)
    return None not in ends and _close(ends[0], ends[1], sympy.Rational(1, 10 ** (digits - 20)))


def _digits_to_tell(*sides: Any) -> int | None:
    """Return the digits that tell constants apart which differ in their smallest part, or None where they are too many.

    e^1000 and e^1000 + 1 agree in 434 digits, and so do 1 and 1 + e^-1000.
    """
    import sympy

    most = 0
    for side in sides:
        if not getattr(side, "is_number", False):
            continue
        for part in sympy.preorder_traversal(side):
            if isinstance(part, sympy.Integer | sympy.Rational):
                most = max(most, part.p.bit_length(), part.q.bit_length())
            elif isinstance(part, sympy.Expr) and part.is_number and (value := _evaluated(part, 15)) is not None:
                sizes = [abs(size) for size in value if size]
                most = max([most, *(abs(int(sympy.log(size, 2).evalf(15))) for size in sizes)])
    digits = DIGITS + int(0.7 * most)  # twice the decimal digits of the largest part
    return digits if digits <= MAX_DIGITS else None


def constant_of(text: str) -> Any | None:
    """Return the rounded value of a real constant such as sqrt(2), or None for another text. It tells an order only."""
    value = _evaluated(parsed(text), 30)
    if value is None or value[1] != 0 or not getattr(value[0], "is_finite", True):
        return None
    return value[0]


def equations_equal(reference: str, given: str) -> bool:
    """Return whether two equations have the same solutions because one is a multiple of the other."""
    import sympy

    sides: list[list[Any]] = [[parsed(side) for side in text.split("=")] for text in (reference, given)]
    if any(len(pair) != 2 or None in pair for pair in sides):
        return False
    try:
        gold, pred = (pair[0] - pair[1] for pair in sides)
        if gold.free_symbols != pred.free_symbols or not gold.free_symbols:
            return False
        ratio = sympy.cancel(gold / pred)
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    except Exception:  # SymPy fails in many ways on what is no equation of expressions
        return False


def _rounded(*sides: Any) -> bool:
    import sympy

    return any(hasattr(side, "atoms") and side.atoms(sympy.Float) for side in sides)


def _evaluated(value: Any, digits: int = DIGITS) -> tuple[Any, Any] | None:
    """Return the real and the imaginary part with so many digits, or None. Their exponents have no limit."""
    if not getattr(value, "is_number", False):
        return None
    try:
        parts = value.evalf(digits).as_real_imag()
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    if not all(part.is_Float or part.is_Integer for part in parts):
        return None
    real, imaginary = (part * 0 if getattr(part, "_prec", 2) == 1 else part for part in parts)  # no digit is certain: 0
    return real, imaginary


def _close(gold: Any, pred: Any, tolerance: Any) -> bool:
    size = max(abs(gold[0]), abs(gold[1]))
    return all(bool(abs(a - b) <= tolerance * size) for a, b in zip(gold, pred, strict=True))


def _differ_as_constants(gold: Any, pred: Any) -> bool:
    rounded = _rounded(gold, pred)
    digits = DIGITS if rounded else _digits_to_tell(gold, pred)
    if digits is None:
        return True
    tolerance = RELATIVE_TOLERANCE if rounded else Fraction(1, 10 ** (digits - 20))
    left, right = _evaluated(gold, digits), _evaluated(pred, digits)
    if left is None or right is None:
        return False
    # Percentages: math-verify has compared the units already.
    return not any(_close(left, [part * ratio for part in right], tolerance) for ratio in _RATIOS)


_RATIOS = (1, 100, Fraction(1, 100))


def canonical_expression(expression: Any) -> str:
    """Return a text that equal answers share: ten digits of a number, SymPy's form of anything else."""
    try:
        value = expression.doit() if hasattr(expression, "doit") else expression
        if getattr(value, "is_number", False):
            real, imaginary = value.evalf(20).as_real_imag()
            return f"{real.evalf(10)}" + (f"+{imaginary.evalf(10)}i" if abs(imaginary) > 1e-12 else "")
        return str(value)
    except Exception:  # SymPy fails in many ways, and any text will do for a wrong answer
        return str(expression)


class _Late(BaseException):
    """The soft deadline has passed. Not an Exception, which SymPy would swallow."""


def within(seconds: float, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function, and stop it after `seconds` where signals allow, so that the pool need not replace the worker.

    Raises:
        TimeoutError: the function took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return function(*arguments)

    def give_up(*_: object) -> NoReturn:
        raise _Late

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*arguments)
    except _Late:
        raise TimeoutError(f"the answer was not judged within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The code that SymPy makes of a number before it evaluates it.
_LITERAL = re.compile(r"(Integer|Float) \(\s*'?([0-9.eE+-]{1,2100})'?\s*\)")


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    """Replace the one function of SymPy that evaluates text as Python by one that reads literals and refuses the rest.

    Every number of an answer goes through it, as `Integer (12 )`: the LaTeX reader passes the digits as text to
    sympy.Number, which sympifies them.
    """
    _math_verify()
    import sympy
    from sympy.parsing import sympy_parser

    def read_literal(code: Any, *_: object) -> Any:
        match = _LITERAL.fullmatch(code.strip()) if isinstance(code, str) else None
        if match is None:
            raise ValueError("text of a completion is never evaluated")
        kind, value = match.groups()
        return sympy.Integer(int(value)) if kind == "Integer" else sympy.Float(value)

    before = sympy_parser.eval_expr
    sympy_parser.eval_expr = read_literal
    try:
        yield
    finally:
        sympy_parser.eval_expr = before
