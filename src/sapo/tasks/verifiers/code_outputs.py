"""Compare what a program printed or returned with what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

_PLAIN_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_WITH_EXPONENT = re.compile(rf"{_PLAIN_NUMBER.pattern}[eE][-+]?[0-9]+")
MOST_BITS_OF_A_FLOAT = 1000
"""Integers with more are compared exactly: they may have no float."""
LONGEST_WITH_EXPONENT = 30
"""Characters of a number with an exponent. A float has 24 at most."""


def same_value(got: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Return whether a value read from JSON is the expected one, its floats within the tolerance.

    >>> same_value([0.3333333], [0.33333], 1e-5), same_value([0.3333333], [0.33333]), same_value({"a": 1}, {"a": 1.0})
    (True, False, True)
    """
    if not tolerance or type(got) is not type(expected):
        numbers = isinstance(got, (int, float)) and isinstance(expected, (int, float)) and tolerance
        return _near_floats(got, expected, tolerance) if numbers else bool(got == expected)
    if isinstance(got, list):
        return len(got) == len(expected) and all(
            same_value(a, b, tolerance) for a, b in zip(got, expected, strict=True)
        )
    if isinstance(got, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key], tolerance) for key in got)
    return _near_floats(got, expected, tolerance) if isinstance(got, float) else bool(got == expected)


def _near_floats(got: float, expected: float, tolerance: float) -> bool:
    if got == expected:
        return True
    if any(isinstance(value, int) and value.bit_length() > MOST_BITS_OF_A_FLOAT for value in (got, expected)):
        return False
    return math.isfinite(got) and abs(got - expected) <= tolerance * max(1.0, abs(expected))


def _near(got: Decimal, expected: Decimal, tolerance: float) -> bool:
    if got == expected or not tolerance:
        return got == expected
    return bool(abs(got - expected) <= Decimal(tolerance) * max(Decimal(1), abs(expected)))


def same_output(printed: str, expected: str, tolerance: float = 0.0) -> bool:
    """Return whether two outputs are equal line by line, as LiveCodeBench compares them.

    Blanks around the output and around each line are ignored. Lines of numbers alone are equal when the values are
    exactly equal, or within the tolerance. What is expected may have a number as Python reads it. What was printed may
    have an exponent only where Python prints one: a program that prints others does so to please a parser.

    >>> same_output("1.0 2\\n", "1 2.00"), same_output("1 2", "1\\n2")
    (True, False)
    >>> same_output("100", "1e2"), same_output("1e2", "100")
    (True, False)
    """
    ours = [line.strip() for line in printed.strip().split("\n")]
    theirs = [line.strip() for line in expected.strip().split("\n")]
    return len(ours) == len(theirs) and all(_same_line(*pair, tolerance) for pair in zip(ours, theirs, strict=True))


def _same_line(printed: str, expected: str, tolerance: float) -> bool:
    if printed == expected:
        return True
    try:
        ours = [_number(word, _is_printed) for word in printed.split()]
        theirs = [_number(word, _is_finite) for word in expected.split()]
        return len(ours) == len(theirs) and all(map(_near, ours, theirs, [tolerance] * len(ours)))
    except InvalidOperation:  # a word that is no number, or a signalling NaN
        return False


def _number(word: str, takes_exponent: Callable[[str], bool]) -> Decimal:
    """Return the value of a number in plain digits, or with an exponent that is taken.

    Raises:
        InvalidOperation: it is none.
    """
    with_exponent = len(word) < LONGEST_WITH_EXPONENT and _WITH_EXPONENT.fullmatch(word) and takes_exponent(word)
    if not (_PLAIN_NUMBER.fullmatch(word) or with_exponent):
        raise InvalidOperation(word)
    return Decimal(word)


def _is_printed(word: str) -> bool:
    return repr(float(word)) == word


def _is_finite(word: str) -> bool:
    return math.isfinite(float(word))
