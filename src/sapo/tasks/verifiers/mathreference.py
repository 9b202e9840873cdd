r"""Find the answer in the reference of a row on mathematics, and refuse a reference that no answer can meet."""

from __future__ import annotations

import re

from sapo.tasks.verifiers.base import brief
from sapo.tasks.verifiers.extract import last_boxed
from sapo.tasks.verifiers.mathsets import names_one
from sapo.tasks.verifiers.mathspell import respell
from sapo.tasks.verifiers.mathtext import base_of, listing_of, number_of, plain_words, words_of
from sapo.tasks.verifiers.mathunits import quantity_of
from sapo.tasks.verifiers.numbers import after_hash

MAX_ANSWER_LENGTH = 2000
"""Limit of the characters of an answer; the longest of MATH-500 has 57."""

MAX_WORDS = 30
"""Words of a reference answer, beyond which it is a solution."""

MAX_WORDS_AMONG_NUMBERS = 5
"""Words of a reference answer with numbers among them, beyond which it is a sentence, which only itself would equal."""

_PLAIN_NUMBER = re.compile(r"\s*-?[0-9]{1,300}(\.[0-9]{1,300})?\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
# An operator without a right side, or a command without its argument, at the end.
_UNFINISHED = re.compile(
    r"(?:[=*/<>_^]|(?<![\^_{])[-+]|\\(?:cdot|times|div|pm|mp|le|ge|ne|in|cup|cap|frac|sqrt|binom|text)"
    r"|\\(?:frac|binom)\s*\{[^{}]*\})$"
)
_OPERATOR = re.compile(r"[-+*/<>=]|\\(?:cdot|times|div|pm|mp|le|ge|ne|approx)")
_LABEL = re.compile(r"(?<![^\s(,;{])(?:[ivx]{1,4}|[0-9]{1,2}|[A-Za-z])\.?$")
# Words in brackets behind a number: 7 (since 2 + 5 = 7).
_EXPLANATION = re.compile(r"(?<=[0-9}])\s*(?:\\text\s*\{\s*)?\([^()]*\)\s*\}?\s*$")
_GRADE = re.compile(r"[A-Za-z]{1,2}\s?[-+]|[A-Za-z]{0,2}[0-9]{1,9}\+|.*[\^{]\s*\{?[-+]|.*\*")


def reference_answer(answer: str) -> str:
    """Return the answer of a row: its box, or what follows ####, where the row has a whole solution."""
    if "####" in answer:
        return after_hash(answer)
    boxed = last_boxed(answer) if "\\boxed" in answer else None
    return answer if boxed is None else boxed


def check_answer(answer: str) -> None:
    r"""Refuse an answer that is none: empty, a whole solution, a sentence, or half a formula such as x = and (1, 2.

    Raises:
        ValueError: it is one of these.
    """
    found = reference_answer(answer)
    if _PLAIN_NUMBER.fullmatch(found):
        return
    way_out = "put the answer in \\boxed{} or behind ####, or set answer_after"
    if len(found) > MAX_ANSWER_LENGTH or len(_WORD.findall(found)) > MAX_WORDS:
        raise ValueError(f"verifier 'math' needs an answer and not a whole solution; got {brief(answer)}; {way_out}")
    spelt = respell(found)
    if _OPERATOR.fullmatch(spelt):
        return
    if not re.search(r"[^\W_]", spelt):
        raise ValueError(f"verifier 'math' needs an answer; got {brief(answer)}; {way_out}")
    braces = re.findall(r"(?<!\\)[{}]", found.replace("\\\\", ""))
    if braces.count("{") != braces.count("}"):
        raise ValueError(f"verifier 'math' needs LaTeX whose braces match; got {brief(answer)}; fix the row")
    if not _closes(spelt):
        raise ValueError(f"verifier 'math' needs an answer whose brackets match; got {brief(answer)}; fix the row")
    if _UNFINISHED.search(spelt) and not _GRADE.fullmatch(spelt):
        raise ValueError(f"verifier 'math' needs an answer that is finished; got {brief(answer)}; fix the row")
    unexplained = _EXPLANATION.sub("", spelt)
    if len(_WORD.findall(unexplained)) > MAX_WORDS_AMONG_NUMBERS and not _is_read(spelt):
        raise ValueError(f"verifier 'math' needs an answer and not a sentence; got {brief(answer)}; {way_out}")


def _closes(text: str) -> bool:
    """Return whether brackets are in pairs, where 1) and 2) number a list and [0, 1[ is an interval."""
    if "[" in text or "]" in text:
        return sum(character in "([])" for character in text) % 2 == 0
    depth = 0
    for position, character in enumerate(text):
        if character == ")" and depth == 0 and _LABEL.search(text[:position]):
            continue
        depth += (character == "(") - (character == ")")
    return depth == 0


def _is_read(text: str) -> bool:
    """Return whether a respelt text of several words has a reading: words, a number, a quantity, a set, a list."""
    if any(read(text) is not None for read in (words_of, number_of, quantity_of, base_of)):
        return True
    listing, plainly = listing_of(text), listing_of(plain_words(text))
    parts = () if plainly is None else plainly.parts
    if parts and all(
        re.match(r"-?[0-9]", part) and len(_WORD.findall(part)) <= MAX_WORDS_AMONG_NUMBERS for part in parts
    ):
        return True  # 12 red balls and 5 blue balls in each box
    in_few_words = listing is not None and all(len(_WORD.findall(part)) <= 3 for part in listing.parts)
    return in_few_words or names_one(text)
