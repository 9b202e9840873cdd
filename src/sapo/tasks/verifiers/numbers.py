"""Verifiers that compare a text or a number: `exact`, `last_number` and `hash_answer`.

Numbers are compared exactly, as fractions. Extremely long ones are not read.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sapo.data import Prompt, Score
from sapo.tasks.verifiers.base import reference_of, unparseable

# Longer than any sensible answer, and short enough for exact arithmetic to be fast.
MAX_NUMBER_LENGTH = 100

# A sign counts unless it follows a word, a number or a bracket: the last number of "10-5" is 5, of "= -5" it is -5.
NUMBER = re.compile(
    r"(?:(?<![\w).])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9])|/[0-9]+)?"
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
    reference = number_in(after_hash(reference_of(prompt)))
    if reference is None:
        raise ValueError(f"last_number needs a number as the answer; got {prompt.answer!r}; use another verifier")
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not numbers:
        return unparseable("no number in the completion")
    value = number_in(numbers[-1])
    if value is None:
        return unparseable(f"the last number cannot be read: {numbers[-1][:40]!r}")
    return Score(float(value == reference), answer=str(value))


def hash_answer(text: str, prompt: Prompt) -> Score:
    """Give reward 1 where what follows the last `#` is the answer, as in GSM8K: by value for numbers, else by text.

    An answer field with a whole solution that ends in `#### 18` is read in the same way.

    >>> hash_answer("6 * 3 = 18 #### 18", Prompt(id=0, task="gsm8k", text="?", answer="three sixes #### 18")).reward
    1.0
    """
    if "#" not in text:
        return unparseable("no '#' in the completion")
    given, answer = after_hash(text), after_hash(reference_of(prompt))
    if not given:
        return unparseable("nothing after the last '#'")
    reference = number_in(answer)
    if reference is None:
        return Score(float(given == answer), answer=given)
    value = number_in(given)
    if value is None:
        return unparseable(f"no number after the last '#': {given[:40]!r}")
    return Score(float(value == reference), answer=str(value))


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
    text = text.removeprefix("$").replace("\N{MINUS SIGN}", "-")
    if len(text) > MAX_NUMBER_LENGTH or not NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)
