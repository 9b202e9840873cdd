r"""Answers that are phrases: there is no solution, the limit does not exist, infinitely many solutions.

Each phrase has many wordings and one spelling here, so that a reference and an answer in words of their own agree.
"""

from __future__ import annotations

import re

NO_SOLUTION = r"\emptyset"
_KIND = r"(?:(?:real|such|valid|possible|feasible|common)[\s-]+)*"
_THING = r"(?:solutions?|roots?|zeros?|numbers?|values?|answers?|solution set)"
_LEAD = (
    r"(?:(?:so|thus|therefore|hence|in conclusion|consequently|then|and|because|that)\s*,?\s*)*"
    r"(?:(?:we|i)\s+(?:see|conclude|find|get|know|have|deduce)(?:\s+that)?\s*,?\s*)?"
)
_SUBJECT = r"(?:(?:this|the|our)\s+(?:given\s+)?(?:equation|system|inequality|problem|set of equations)|it)"
_TAIL = r"(?:\s+(?:exists?|(?:for|of)\s+[a-z]|(?:in|over)\s+(?:the\s+)?(?:reals?|real\s+numbers)|at\s+all|here))*"
_NOTHING = (
    rf"(?:there\s+(?:is|are|exists?)\s+no\s+{_KIND}{_THING}{_TAIL}"
    rf"|{_SUBJECT}\s+(?:has|have)\s+no\s+{_KIND}{_THING}{_TAIL}"
    rf"|(?:there\s+(?:is|are|exists?)\s+)?no\s+such\s+[a-z]+{_TAIL}"
    rf"|no\s+{_KIND}{_THING}{_TAIL}"
    r"|(?:the\s+)?(?:solution\s+set\s+is\s+)?(?:the\s+)?(?:empty|null)\s+set|(?:the\s+)?solution\s+set\s+is\s+empty)"
)
_PHRASES = (
    (NO_SOLUTION, _NOTHING),
    (
        r"\text{does not exist}",
        r"(?:(?:the|this)\s+limit\s+|it\s+)?(?:does\s+not\s+exist|doesn't\s+exist)|D\.?N\.?E\.?",
    ),
    (r"\mathbb{R}", r"(?:the\s+set\s+of\s+)?(?:all\s+(?:the\s+)?real\s+numbers|all\s+reals)"),
    (
        r"\text{infinitely many solutions}",
        rf"(?:(?:there\s+(?:is|are)|{_SUBJECT}\s+has)\s+)?"
        r"(?:infinitely\s+many|an\s+infinite\s+number\s+of|infinite)(?:\s+solutions)?",
    ),
)
_BARE_INFINITE = re.compile(r"\s*infinite\W*", re.IGNORECASE)
_SPELT = [(spelling, re.compile(rf"{_LEAD}(?:{words})", re.IGNORECASE)) for spelling, words in _PHRASES]
_STATED = re.compile(rf"{_LEAD}(?:{_NOTHING})", re.IGNORECASE)
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TENS = dict(
    zip(("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), range(20, 100, 10), strict=True)
)
NUMBER_WORD = "(?:" + "|".join((*_WORDS[:-1], *_TENS, "hundred", "thousand", "million")) + ")"
"""A pattern of one word of a number."""

_HALVES = {"one half": "1/2", "a half": "1/2", "one-half": "1/2", "one third": "1/3", "one-third": "1/3"}
_HALVES |= {"two thirds": "2/3", "two-thirds": "2/3", "one quarter": "1/4", "one fourth": "1/4", "one-quarter": "1/4"}
_HALVES |= {"three quarters": "3/4", "three fourths": "3/4", "three-quarters": "3/4", "one-fourth": "1/4"}
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|textrm)\s*\{([^{}]*)\}")


def phrase_of(text: str) -> str | None:
    r"""Return the one spelling of a phrase that is an answer, or None for another text.

    >>> phrase_of(r"\text{There is no solution.}"), phrase_of("No real roots exist"), phrase_of("no idea")
    ('\\emptyset', '\\emptyset', None)
    """
    if len(text) > 200 or not any(mark in text.lower() for mark in ("no", "ne", "infinit", "empty", "null", "real")):
        return None
    plain = " ".join(_COMMAND.sub(r" \1 ", text).replace("*", " ").split()).strip(" .,;:!")
    if _BARE_INFINITE.fullmatch(plain):
        return None
    return next((spelling for spelling, pattern in _SPELT if pattern.fullmatch(plain)), None)


def number_in_words(text: str) -> str | None:
    r"""Return the digits of a number in words, or None for another text.

    >>> number_in_words(r"\text{Eighteen}"), number_in_words("forty-two"), number_in_words("eleventh")
    ('18', '42', None)
    """
    if len(text) > 40:
        return None
    word = " ".join(_COMMAND.sub(r" \1 ", text).lower().split()).strip(" .!")
    value = _spelt_number(word)
    return _HALVES.get(word) or (None if value is None else str(value))


def _spelt_number(words: str) -> int | None:
    """Return the value of twenty-one, or of three hundred and five, or None for another text."""
    total = section = 0
    parts = words.replace("-", " ").replace(" and ", " ").split()
    last = "hundred"
    for part in parts:
        if part in _TENS and last == "hundred":
            section += _TENS[part]
        elif part in _WORDS and (last == "hundred" or (last in _TENS and 0 < _WORDS.index(part) < 10)):
            section += _WORDS.index(part)
        elif part == "hundred" and last in _WORDS[1:10]:
            section *= 100
        elif part == "thousand" and section > 0 and not total:
            total, section = section * 1000, 0
        else:
            return None
        last = "hundred" if part == "thousand" else part
    return total + section if parts else None


def stated_at_the_end(text: str) -> str | None:
    """Return the last sentence of a completion where it says that there is no solution, or None.

    >>> stated_at_the_end("x^2 = -1. So the equation has no real solutions."), stated_at_the_end("No solution? x = 2.")
    ('So the equation has no real solutions', None)
    """
    sentence = re.split(r"[.!?\n]\s+|\n", text.strip().rstrip(" .!*$")[-300:])[-1].strip(" *_`$")
    return sentence if _STATED.fullmatch(" ".join(sentence.split())) else None
