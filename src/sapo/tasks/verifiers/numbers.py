"""Verifiers that compare a text or a number: `exact`, `last_number` and `hash_answer`.

Numbers are compared exactly, as fractions. Extremely long ones are not read.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sapo.data import Prompt, Score
from sapo.tasks.verifiers.base import reference_of, unparseable
from sapo.tasks.verifiers.mathwords import scaled

# Longer than any sensible answer, and short enough for exact arithmetic to be fast.
MAX_NUMBER_LENGTH = 100

# A sign counts unless it follows a word, a number or a bracket: the last number of "10-5" is 5, of "= -5" it is -5.
NUMBER = re.compile(
    r"(?:(?<![\w).])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9])|/[0-9]+)?"
)

# The same in a sentence, where a blank may group digits in threes too: 10 000.
NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w).])[-+])?(?<![\w.,])[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9.,]?[0-9])|{NUMBER.pattern}"
)


def exact(text: str, prompt: Prompt) -> Score:
    """Give reward 1 where the text, without blanks around it, is the answer.

    >>> exact(" Paris\\n", Prompt(id=0, task="capitals", text="France?", answer="Paris")).reward
    1.0
    """
    given = text.strip()
    return Score(float(given == reference_of(prompt).strip()), answer=given)


def last_number(text: str, prompt: Prompt) -> Score:
    """Give reward 1 where the last number in the text has the value of the answer: 1,000, 1000.0 and 2000/2 are equal.

    >>> last_number("12 eggs at 4 make $1,000.50.", Prompt(id=0, task="t", text="?", answer="1000.5")).reward
    1.0
    """
    reference = _reference(prompt)
    last = last_number_in(text)
    if last is None:
        return unparseable("no number in the completion")
    value = number_in(last)
    if value is None:
        return unparseable(f"the last number cannot be read: {last[:40]!r}")
    return Score(float(value == reference), answer=str(value))


def _reference(prompt: Prompt) -> Fraction:
    reference = number_in(after_hash(reference_of(prompt)))
    if reference is None:
        raise ValueError(f"last_number needs a number as the answer; got {prompt.answer!r:.80}; use another verifier")
    return reference


last_number.check_reference = _reference  # type: ignore[attr-defined]


def last_number_in(text: str) -> str | None:
    """Return the last number of a text, without blanks in it, or None.

    >>> last_number_in("12 boxes of 10 000 each"), last_number_in("none")
    ('10000', None)
    """
    for characters in ("\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}", "\N{THIN SPACE}"):
        text = text.replace(characters, " ")
    numbers = NUMBER_IN_TEXT.findall(scaled(text).replace("\N{MINUS SIGN}", "-"))
    return numbers[-1].replace(" ", "") if numbers else None


def after_hash(text: str) -> str:
    """Return what follows the last `#`, or the whole text without one.

    >>> after_hash("6 * 3 = 18 #### 18")
    '18'
    """
    return text.rpartition("#")[2].strip()


def number_in(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number alone (a leading $ is allowed), or None.

    >>> number_in("$1,000.50"), number_in("about 3")
    (Fraction(2001, 2), None)
    """
    if text.isdecimal() and text.isascii() and len(text) <= MAX_NUMBER_LENGTH:
        return Fraction(int(text))
    text = text.removeprefix("$").replace("\N{MINUS SIGN}", "-")
    if len(text) > MAX_NUMBER_LENGTH or not NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)
