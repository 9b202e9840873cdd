r"""Compute numbers exactly from respelt text: 4^{1012}, \frac{2025!}{2}, \binom{8}{4}, 2 \cdot 5 \cdot 7.

Floating point takes all tiny constants for equal and fails on huge ones, and SymPy may compute a power for ever. So
what is made of integers is computed here as a fraction, up to a size.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_BITS = 400_000
MAX_FACTORIAL = 20_000
MAX_TOKENS = 400
MAX_DEPTH = 60
MAX_HEIGHT = 3
"""Limit of powers in exponents for SymPy, where a variable is among them; one less for constants such as e."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<word>\\(?:frac|cdot|times|binom|div)(?![A-Za-z]))|(?P<sign>[-+*/^!(){}]))"
)


class TooLarge(ValueError):  # noqa: N818 - what the number is, not a fault
    """A number of more than MAX_BITS."""


def exact_value(text: str) -> Fraction | None:
    r"""Return the value of a respelt text of integers, decimals, + - * / ^ !, \frac and \binom, or None for another.

    >>> exact_value(r"\frac{2^{3}}{4!} + 1"), exact_value("x + 1"), exact_value(r"3 \cdot (2 - 5)")
    (Fraction(4, 3), None, Fraction(-9, 1))

    Raises:
        TooLarge: the number is too large, or too small, to be computed.
    """
    tokens = _tokens(text)
    if not tokens:
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum()
    except (_NotExact, IndexError, ZeroDivisionError):
        return None
    return value if reader.position == len(tokens) else None


def is_too_large(text: str) -> bool:
    """Return whether a part of a text is a power or factorial that nobody should compute.

    >>> is_too_large("x + 10^{10^{10}}"), is_too_large("2^{2^{2}}"), is_too_large("(10^9)!")
    (True, False, True)
    """
    if "^" not in text and "!" not in text and "binom" not in text:
        return False
    if _height(text) > (MAX_HEIGHT if re.search(r"(?<![A-Za-z\\])[a-df-z](?![A-Za-z])", text) else MAX_HEIGHT - 1):
        return True
    for part in re.findall(r"(?:[0-9+\-*/^!(){}.\s]|\\(?:frac|cdot|times|binom)(?![A-Za-z]))+", text):
        for piece in (part, *_groups(part)):
            try:
                exact_value(piece.strip(" +-*/^"))
            except TooLarge:
                return True
    return False


def _height(text: str) -> int:
    """Return how many powers stand in the exponents of powers."""
    levels: list[int] = []
    most = 0
    for position, character in enumerate(text):
        if character in "{(":
            above = levels[-1] if levels else 0
            levels.append(above + (text[max(0, position - 3) : position].rstrip().endswith("^")))
            most = max(most, levels[-1])
        elif character in "})" and levels:
            levels.pop()
    return most


def _groups(text: str) -> list[str]:
    """Return the powers in a text with unbalanced brackets around them."""
    return re.findall(r"[0-9]+\^\{[0-9^{}]*\}|[0-9]+\^[0-9]+|\([0-9^{}]+\)!|[0-9]+!", text)[:20]


class _NotExact(Exception):  # noqa: N818 - the text is of another kind
    pass


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None or len(found) >= MAX_TOKENS:
            return []
        token = match[0].strip()
        found.append("*" if token in ("\\cdot", "\\times") else "/" if token == "\\div" else token)
        position = match.end()
    return found


class _Reader:
    """A parser by recursive descent: sum, product, power, atom."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, token: str) -> bool:
        found = self.next == token
        self.position += found
        return found

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotExact
        value = self.product()
        while self.next in ("+", "-"):
            value = value + self.product() if self.take("+") else value - (self.take("-") and self.product())
        self.depth -= 1
        return _checked(value)

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if self.take("*"):
                value *= self.signed()
            elif self.take("/"):
                value /= self.signed()
            elif self.next == "\\frac" and value.denominator == 1 and 0 < (part := self.power()) < 1:
                value += part  # a mixed number
            elif self.next in ("(", "\\frac", "\\binom") and self.next:
                value *= self.power()
            else:
                return _checked(value)

    def signed(self) -> Fraction:
        if self.take("-"):
            return -self.signed()
        return self.signed() if self.take("+") else self.power()

    def power(self) -> Fraction:
        value = self.atom()
        while self.take("!"):
            value = _factorial(value)
        if self.take("^"):
            exponent = self.exponent()
            value = _power(value, exponent)
        while self.take("!"):
            value = _factorial(value)
        return value

    def exponent(self) -> Fraction:
        if self.next in ("{", "("):
            value = self.atom()
            return _power(value, self.exponent()) if self.take("^") else value
        token = self.next
        self.position += 1
        if not token.isdigit():
            raise _NotExact
        return Fraction(token)

    def atom(self) -> Fraction:
        token = self.next
        self.position += 1
        if token in ("\\frac", "\\binom"):
            above, below = self.argument(), self.argument()
            return above / below if token == "\\frac" else _binomial(above, below)
        if token in ("(", "{"):
            value = self.sum()
            if not self.take(")" if token == "(" else "}"):
                raise _NotExact
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _NotExact
        return Fraction(token)

    def argument(self) -> Fraction:
        token = self.next
        if token == "{":
            return self.atom()
        if not token.isdigit():
            raise _NotExact
        # \frac12 is 1/2: each argument is one digit.
        if len(token) > 1:
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        self.position += 1
        return Fraction(self.tokens[self.position - 1])


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise TooLarge
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        root = _root(base, exponent.denominator)
        return _power(root, Fraction(exponent.numerator))
    if base in (0, 1, -1):
        return base ** int(exponent % 2 or 2) if exponent > 0 or base else _nothing()
    bits = base.numerator.bit_length() + base.denominator.bit_length() - 1
    if abs(exponent) * bits > MAX_BITS:
        raise TooLarge
    return base ** int(exponent)


def _nothing() -> Fraction:
    raise _NotExact


def _root(base: Fraction, degree: int) -> Fraction:
    """Return the exact root of a positive fraction."""
    if base <= 0 or degree > 20 or base.numerator.bit_length() > 500 or base.denominator.bit_length() > 500:
        raise _NotExact
    roots = [_integer_root(n, degree) for n in (base.numerator, base.denominator)]
    return Fraction(roots[0], roots[1])


def _integer_root(number: int, degree: int) -> int:
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    if low**degree != number:
        raise _NotExact
    return low


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise _NotExact
    if value > MAX_FACTORIAL:
        raise TooLarge
    return Fraction(math.factorial(int(value)))


def _binomial(above: Fraction, below: Fraction) -> Fraction:
    if above.denominator != 1 or below.denominator != 1 or not 0 <= below <= above:
        raise _NotExact
    if above > MAX_FACTORIAL and min(below, above - below) > 20:
        raise TooLarge
    return Fraction(math.comb(int(above), int(below)))
