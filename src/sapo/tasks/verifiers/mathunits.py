r"""Set units and currencies aside, and read quantities of several units: $500, 18 eggs per day, 7 hours 30 minutes."""

from __future__ import annotations

import re
from fractions import Fraction

from sapo.tasks.verifiers.mathphrases import NUMBER_WORD, number_in_words

# A word behind a number that makes it another one, or that begins another thing, is no unit: 18 minus two, 5 or seven.
_NO_UNIT = (
    r"(?!\s*(?:(?:and|or|but|nor|than|unless|(?:plus|minus)(?!\s+signs?\b))\b"
    rf"|(?:times|by|to|over|through)\s+(?:an?\s+)?{NUMBER_WORD}(?![A-Za-z])))"
)
# A word of four letters is no product of variables. Shorter units are listed.
_UNIT_WORD = (
    r"(?:[A-Za-z]{4,}|cm|mm|km|kg|mg|ml|mL|ft|in|lb|lbs|oz|mph|kph|kmh|deg|yr|yrs|hr|hrs|min|sec|sq|per|of|cents?"
    r"|USD|EUR|GBP|INR|RMB|CNY|JPY|AUD|CAD|Rs|pm|am|Hz|kHz|MHz|kW|kJ|km/h|m/s|cm/s|ft/s|mi/h)"
)
_SHORT_THING = (
    "day|egg|hen|cup|box|bag|pen|man|men|dog|cat|car|bus|cow|pig|toy|hat|jar|can|pie|row|set|way|bar|bed|bee|map|nut"
    "|van|pts|pt|boy|kid|tin|lap|mug|cap|net|job|ton|bit|gal|pct|yds|yd|mi|wk|ant|key|tie|pot|pan"
)
# The words behind the first, as in "eggs per day" and "dollars a week". "and" and its like begin another thing.
_MORE_WORDS = r"(?:[\s/]+(?!(?:and|or|but|nor|plus|minus|times|than|if|when|unless|not|x|by|to)\b)[A-Za-z]+){0,5}"
_UNIT = re.compile(
    rf"(?:(?:/\s*)?\\text\s*\{{{_NO_UNIT}[^{{}}0-9]*\}}|\\text\s*\{{{_NO_UNIT}[^{{}}]*\}}"
    rf"|(?<=[0-9}}\s])\s*(?<![A-Za-z]){_NO_UNIT}(?:{_UNIT_WORD}|(?:{_SHORT_THING})s?(?![A-Za-z])){_MORE_WORDS}"
    r"|(?<=[0-9])\s*/\s*(?:[A-Za-z]{3,})"
    r"|(?<=[0-9])(?:\^\\circ\s?|\s)[CFK])"
    r"(?:\^\s*\{?-?[0-9]\}?)?\s*$"
)
_UNIT_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\text\s*\{[^{}]*\}\s*\}\s*\{\s*\\text\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?\s*\}\s*$"
)
_CURRENCY = re.compile(
    r"^\s*(?:(?:US|A|C)?\\?\$|[€£¥₹₽₩]|\\(?:pounds|euro|yen|rupee)(?![A-Za-z])|Rs\.?|USD|EUR|GBP|INR|RMB"
    r"|\\text\s*\{\s*(?:Rs\.?|USD|EUR|GBP|INR|RMB|US\\?\$|\\?\$|€|£|¥|₹)\s*\})\s*"
)
_BEHIND = re.compile(r"(?<=[0-9])\s*(?:[€£¥₹₽₩]|\([A-Za-z][A-Za-z -]{2,30}\))\s*$")
_IN_BRACKETS = re.compile(
    rf"([0-9]+)\s*(?:\\text\s*\{{\s*)?\(\s*({NUMBER_WORD}(?:(?:[\s-]+(?:and\s+)?){NUMBER_WORD}){{0,6}})"
    r"(?:\s+(?!each\b|per\b|apiece\b)[A-Za-z]+)?\s*\)\s*\}?\s*$",
    re.IGNORECASE,
)
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")


def without_unit(text: str) -> str:
    r"""Return a respelt number without the sign of a currency before it and the unit after it.

    >>> without_unit(r"\$ 500"), without_unit("42 km"), without_unit(r"9.8 \frac{\text{m}}{\text{s}^2}")
    ('500', '42', '9.8')
    """
    text = re.sub(r"(?i)\s*\\?%\s*$|\s*\bper\s?cent\s*$|\s*\\text\s*\{\s*per\s?cent\s*\}\s*$", "%", text)
    sign = re.match(r"\s*-\s*", text)
    text = text[sign.end() :] if sign else text
    text = _CURRENCY.sub("", text)
    if (again := _IN_BRACKETS.search(text)) is not None and number_in_words(again[2]) != again[1]:
        return f"-{text}" if sign else text  # 18 (nineteen) contradicts itself
    text = _BEHIND.sub("", text).replace(r"\$", "").replace("$", "")
    text = _UNIT_FRACTION.sub("", text).strip().removesuffix(r"^\circ").strip()
    bare = _UNIT.sub("", text)
    if bare.strip() and not re.search(r"[A-Za-z\\]", re.sub(r"\\(?:frac|cdot|times|%)", "", bare)):
        text = bare
    text = text.strip().removesuffix(r"^\circ").strip()
    return f"-{text}" if sign else text


def is_contradicted(text: str) -> bool:
    r"""Return whether a text command behind a number holds words that are no unit, or another number.

    >>> is_contradicted(r"5 \text{ or seven}"), is_contradicted(r"5 \text{ (six)}"), is_contradicted(r"5 \text{ units}")
    (True, True, False)
    """
    words = re.search(r"[0-9}]\s*\\text\s*\{([^{}]*)\}\s*$", text)
    again = _IN_BRACKETS.search(text)
    wrong = again is not None and number_in_words(again[2]) != again[1]
    return wrong or (words is not None and re.match(_NO_UNIT, words[1]) is None)


# Units of which answers name two, with their worth in the smallest of each kind.
_WORTH = {
    **{"day": ("time", 86400), "hour": ("time", 3600), "hr": ("time", 3600), "h": ("time", 3600)},
    **{"minute": ("time", 60), "min": ("time", 60), "second": ("time", 1), "sec": ("time", 1), "s": ("time", 1)},
    **{"feet": ("length", 12), "foot": ("length", 12), "ft": ("length", 12), "inch": ("length", 1)},
    **{"inche": ("length", 1), "in": ("length", 1), "dollar": ("money", 100), "cent": ("money", 1)},
    **{"pound": ("mass", 16), "lb": ("mass", 16), "ounce": ("mass", 1), "oz": ("mass", 1)},
    **{"year": ("date", 12), "month": ("date", 1)},
}
UNITS_OF_PARTS = tuple(_WORTH)
_PART = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+?)s?(?=[\s,0-9]|$)\.?\s*(?:,|and)?")


def quantity_of(text: str) -> Fraction | None:
    """Return a quantity of two units or more in the largest of them, or None for another text.

    >>> quantity_of(r"7 \\text{ hours and } 30 \\text{ minutes}"), quantity_of("7 hours")
    (Fraction(15, 2), None)
    """
    parts = _parts_of(text)
    if parts is None:
        return None
    return sum((n * _WORTH[unit][1] for n, unit in parts), Fraction()) / _WORTH[parts[0][1]][1]


def largest_unit(text: str) -> str | None:
    """Return the first unit of a quantity of two units or more, or None for another text.

    >>> largest_unit("7 hours 30 minutes"), largest_unit("7 hours")
    ('hour', None)
    """
    parts = _parts_of(text)
    return None if parts is None else parts[0][1]


def with_unit(text: str) -> tuple[str, str]:
    r"""Return a respelt text before its first word, and the unit among its words: "" for no word, "?" for no unit.

    >>> with_unit(r"450 \text{ minutes}"), with_unit("7.5"), with_unit("7.5 eggs"), with_unit("7.5 whole hours")
    (('450', 'minute'), ('7.5', ''), ('7.5', '?'), ('7.5', 'hour'))
    """
    plain = " ".join(_TEXT_COMMAND.sub(r" \1 ", text).split())
    words = re.search(r"(?<![A-Za-z\\])[A-Za-z]+", plain)
    if words is None:
        return plain, ""
    read = [word.lower() for word in re.findall(r"[A-Za-z]+", plain[words.start() :])]
    units = (name for word in read for name in (word, word.removesuffix("s")) if name in _WORTH)
    return plain[: words.start()].strip(), next(units, "?")


def in_unit(value: Fraction, unit: str, other: str) -> Fraction | None:
    """Return a value of one known unit in another of its kind, or None where they are of two kinds.

    >>> in_unit(Fraction(450), "minute", "hour"), in_unit(Fraction(1), "hour", "inch")
    (Fraction(15, 2), None)
    """
    (kind, worth), (other_kind, other_worth) = _WORTH[unit], _WORTH[other]
    return value * worth / other_worth if kind == other_kind else None


def _parts_of(text: str) -> list[tuple[Fraction, str]] | None:
    """Return the numbers and units of a quantity of two known units or more of one kind, or None."""
    plain = " ".join(_TEXT_COMMAND.sub(r" \1 ", text).split())
    parts: list[tuple[Fraction, str]] = []
    position = 0
    while position < len(plain) and len(parts) < 5 and (match := _PART.match(plain, position)):
        parts.append((Fraction(match[1]), match[2].lower()))
        position = match.end()
    if len(parts) < 2 or position < len(plain) or not all(unit in _WORTH for _, unit in parts):
        return None
    return parts if len({_WORTH[unit][0] for _, unit in parts}) == 1 else None
