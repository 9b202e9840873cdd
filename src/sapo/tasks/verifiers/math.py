r"""The verifier `math`: compare a completion's answer with the reference, however the two are written.

The answer is found and parsed here: numbers are compared exactly, words as words, lists and points part by part.
Expressions are compared by math-verify (LaTeX through an ANTLR grammar to SymPy). Departures from math-verify's rules,
each of which prevents a wrong verdict:
- Only its LaTeX reader is used. Its reader of plain expressions passes text to Python's eval, and even the LaTeX reader
  passes the digits of numbers. Here SymPy's one call of eval is replaced by a reader of literals meanwhile.
- 52_8 is a numeral in base 8; math-verify drops the base.
- A decimal must equal a decimal exactly; math-verify rounds to six places.
- Constants must agree to a relative 1e-6; math-verify takes any two tiny ones for equal.
- Points are compared part by part; math-verify turns (8, -2) and (9, -3) both into the empty interval.
- An anagram is another word.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, NoReturn, TypeVar

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import IsolatedOptions, brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import after_phrase, last_boxed, last_boxes, last_formula
from sapo.tasks.verifiers.mathtext import (
    Listing,
    Number,
    base_of,
    listing_of,
    number_of,
    respell,
    squeezed,
    without_name,
    words_of,
)
from sapo.tasks.verifiers.numbers import NUMBER, after_hash

Result = TypeVar("Result")

MAX_ANSWER_LENGTH = 2000
"""Limit of the characters of an answer; the longest of MATH-500 has 57."""

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""Tolerance between a decimal and a number that has no exact decimal, such as 0.333333 and 1/3."""


@dataclass(frozen=True)
class Math(IsolatedOptions):
    r"""Gives reward 1 where the answer equals the prompt's: 1/2, \frac12, \dfrac{1}{2}, 0.5 and x = 0.5 are equal.

    The answer is the last \boxed{...}. Without a box it is the first of these that is present: what follows `####`,
    what follows "answer is", the last formula, the whole text where it is one short formula, the last number.

    >>> prompt = Prompt(id=0, task="maths", text="?", answer=r"\frac{1}{2}")
    >>> Math()(r"So $x = \boxed{0.50}$.", prompt).reward
    1.0
    """

    require_box: bool = False
    """Read boxes only. A completion without one is unparseable."""
    pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("math_verify") is None:
            raise TaskError("verifier 'math' needs the package math-verify; pip install 'sapo-rl[tasks]'")

    def prepare(self) -> None:
        """Load SymPy, including what it loads when it first simplifies."""
        with _nothing_evaluated():
            equal("(x+1)^2", "x^2+2x+1")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        reference = respell(_reference_answer(reference_of(prompt)))
        if not reference:
            raise ValueError(f"verifier 'math' needs an answer; got {brief(prompt.answer or '')}")
        if not self.require_box and len(text) <= MAX_ANSWER_LENGTH and squeezed(respell(text)) == squeezed(reference):
            found: str | None = text
        else:
            several = listing_of(reference) is not None
            found = answer_in(text, several=several, require_box=self.require_box)
        if found is None:
            return unparseable("no \\boxed{} in the completion" if self.require_box else "no answer in the completion")
        if len(found) > MAX_ANSWER_LENGTH:
            return unparseable(f"the answer is longer than {MAX_ANSWER_LENGTH} characters: {brief(found)}")
        given = respell(found)
        if not given:
            return unparseable("the answer is empty")
        with _nothing_evaluated():
            # A right answer is recorded as the reference, so that all right answers are equal text for a majority.
            if _within(self.deadline * 0.6, equal, reference, given):
                return Score(1.0, answer=canonical_answer(reference) or squeezed(reference))
            try:
                canonical = _within(self.deadline * 0.2, canonical_answer, given)
            except TimeoutError:  # its canonical form is unknown, but it is wrong
                return Score(0.0, answer=squeezed(given))
        if canonical is None and words_of(reference) is None and base_of(reference) is None:
            return unparseable(f"the answer cannot be read: {brief(found)}")
        return Score(0.0, answer=canonical if canonical is not None else squeezed(given))


def answer_in(text: str, *, several: bool = False, require_box: bool = False) -> str | None:
    r"""Return the answer of a completion as it is written, or None. `several` joins adjacent boxes to one list.

    >>> answer_in(r"so \boxed{5}"), answer_in("3 * 6 = 18 #### 18"), answer_in("I make it 7 or 8"), answer_in("Hm.")
    ('5', '18', '8', None)
    """
    if several and len(together := last_boxes(text)) > 1:
        return ", ".join(together)
    boxed = last_boxed(text)
    if boxed is not None or require_box or re.search(r"\\(?:boxed|fbox)\s*\{", text):  # a box that is never closed
        return boxed
    if "####" in text:
        return after_hash(text).split("\n")[0] or None
    phrase = after_phrase(text)
    if phrase is not None:
        whole = _is_formula(phrase) or number_of(respell(phrase)) is not None
        return last_formula(phrase) or (phrase if whole else _last_number(phrase)) or phrase
    formula = last_formula(text)
    if formula is not None:
        return formula
    if _is_formula(text.strip()):
        return text.strip()
    return _last_number(text)


def equal(reference: str, given: str) -> bool:
    """Return whether two respelt answers are equal. `reference` decides how they are compared."""
    if squeezed(reference) == squeezed(given):
        return True
    whole = reference, given
    reference, given = without_name(reference), without_name(given)
    if squeezed(reference) == squeezed(given):
        return True
    if (numeral := base_of(reference)) is not None:
        # The base may be left out, since the question gives it.
        return numeral == base_of(given) or given == numeral[0]
    if (numeral := base_of(given)) is not None:
        value = number_of(reference)
        return value is not None and value.value == int(*numeral)
    if (words := words_of(reference)) is not None:
        return words == _as_words(given, letter=len(words) == 1)
    left, right = number_of(reference), number_of(given)
    if left is not None and right is not None:
        return _numbers_equal(left, right)
    parts, others = listing_of(reference), listing_of(given)
    if parts is not None and others is not None:
        return _listings_equal(parts, others)
    # y = 2x + 3 may be written as another equation of the same line.
    as_equations = "=" in given and whole != (reference, given)
    return _expressions_equal(*whole) if as_equations else _expressions_equal(reference, given)


def canonical_answer(text: str) -> str | None:
    r"""Return a respelt answer in a form in which equal answers are equal text, or None where it is no mathematics.

    >>> canonical_answer(r"\frac{2}{4}"), canonical_answer("3, 1"), canonical_answer("52_8")
    ('1/2', '1, 3', '52_8')
    """
    text = without_name(text)
    if (numeral := base_of(text)) is not None:
        return f"{numeral[0]}_{numeral[1]}"
    if (words := words_of(text)) is not None:
        return words if "\\text" in text or len(words) == 1 else None
    if (number := number_of(text)) is not None:
        return f"{number.value}%" if number.percent else str(number.value)
    if (listing := listing_of(text)) is not None:
        parts = [canonical_answer(part) or squeezed(part) for part in listing.parts]
        inside = ", ".join(parts if listing.ordered else sorted(parts))
        return f"{listing.opening}{inside}{listing.closing}" if listing.ordered else inside
    expression = _parsed(text)
    return None if expression is None else _canonical_expression(expression)


# ------------------------------------------------------------------------------------------------- parts of an answer


def _reference_answer(answer: str) -> str:
    """Return the answer of a row: its box, or what follows ####, where the row has a whole solution."""
    if "####" in answer:
        return after_hash(answer)
    boxed = last_boxed(answer) if "\\boxed" in answer else None
    return answer if boxed is None else boxed


def _as_words(given: str, *, letter: bool) -> str:
    inside = words_of(given)
    if inside is not None:
        return inside
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", given).strip()
    labelled = re.match(r"\(?([A-Za-z])(?:\)|[.:]\s)", plain) if letter else None  # (C) 5
    return (labelled[1] if labelled else plain.strip("() .")).lower()


def _numbers_equal(reference: Number, given: Number) -> bool:
    if reference.percent != given.percent:  # 50% is 0.5, or 50 where the question asked for a percentage
        as_given = {given.value, given.value / 100} if given.percent else {given.value, given.value * 100}
        return reference.value in as_given
    if reference.value == given.value:
        return True
    has_a_decimal = 10**400 % reference.value.denominator == 0
    return not has_a_decimal and abs(reference.value - given.value) <= RELATIVE_TOLERANCE * abs(reference.value)


def _listings_equal(reference: Listing, given: Listing) -> bool:
    if len(reference.parts) != len(given.parts):
        return False
    if reference.ordered:
        if given.opening and (reference.opening, reference.closing) != (given.opening, given.closing):
            return False
        if not given.opening and (reference.opening, reference.closing) != ("(", ")"):
            return False
        return all(equal(a, b) for a, b in zip(reference.parts, given.parts, strict=True))
    if "[" in given.opening + given.closing or "]" in given.closing:
        return False
    left = list(given.parts)
    for part in reference.parts:
        match = next((other for other in left if equal(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is_formula(text: str) -> bool:
    """Return whether a text is one short line of mathematics: a digit, a command or an operator, without words."""
    if not text or "\n" in text or len(text) > 200:
        return False
    spelt = respell(text)
    return bool(any(c.isdigit() or c in "\\=+^/" for c in spelt)) and not _has_words(spelt)


def _has_words(text: str) -> bool:
    text = re.sub(r"\\(?:begin|end)\{[a-z]+\}", " ", text)
    plain = "".join(c if c.isalpha() or c == "\\" else " " for c in text)
    return any(len(word) >= 2 and "\\" not in word for word in plain.split())


def _last_number(text: str) -> str | None:
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else None


# ------------------------------------------------------------------------------------------------------- math-verify


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import logging

    import math_verify
    import sympy.physics.units  # noqa: F401  simplify() imports it late, and its tables of units are made by eval

    # It warns whenever it is used without its own timeouts, which our deadline replaces.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


@lru_cache(maxsize=512)
def _parsed(text: str) -> Any | None:
    """Return the SymPy object of an answer, or None."""
    if re.search(r"[0-9]\.[0-9]*\.[0-9]", text):  # 5.0.0 would be 5.0 times .0
        return None
    library = _math_verify()
    target = library.LatexExtractionConfig(boxed_match_priority=0)
    found = library.parse(
        f"\\boxed{{{text}}}", [target], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=False
    )
    return found[0] if found else None


def _expressions_equal(reference: str, given: str) -> bool:
    gold, pred = _parsed(reference), _parsed(given)
    if gold is None or pred is None:
        return False
    # A set may be written as the relation that describes it, such as 1 < x < 2 for (1, 2).
    verdict = _math_verify().verify(gold, pred, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(verdict) and not _differ_as_constants(gold, pred)


def _differ_as_constants(gold: Any, pred: Any) -> bool:
    if not (getattr(gold, "is_number", False) and getattr(pred, "is_number", False)):
        return False
    try:
        a, b = complex(gold.evalf(30)), complex(pred.evalf(30))
    except (TypeError, ValueError, ArithmeticError):
        return False
    ratios = (1, 100, 0.01)  # percentages: math-verify has compared the units already
    return all(abs(a - b * ratio) > float(RELATIVE_TOLERANCE) * abs(a) for ratio in ratios)


def _canonical_expression(expression: Any) -> str:
    try:
        value = expression.doit() if hasattr(expression, "doit") else expression
        if getattr(value, "is_number", False):
            number = complex(value.evalf(20))
            parts = [f"{number.real:.10g}", f"{number.imag:+.10g}i" if abs(number.imag) > 1e-12 else ""]
            return "".join(parts)
        return str(value)
    except Exception:  # SymPy fails in many ways, and any text will do for a wrong answer
        return str(expression)


class _Late(BaseException):
    """The soft deadline has passed. Not an Exception, which SymPy would swallow."""


def _within(seconds: float, function: Callable[..., Result], *arguments: Any) -> Result:
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
def _nothing_evaluated() -> Iterator[None]:
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
