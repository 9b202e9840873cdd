r"""Normalise mathematical text without algebra, and recognise the form of an answer.

Numbers, words and lists are recognised here from the text alone. Anything else is an expression, for mathcompare.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from sapo.tasks.verifiers.mathexact import TooLarge, exact_value
from sapo.tasks.verifiers.mathspell import squeezed
from sapo.tasks.verifiers.mathunits import without_unit
from sapo.tasks.verifiers.mathwords import is_changed
from sapo.tasks.verifiers.numbers import MAX_NUMBER_LENGTH, number_in

_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_MIXED = re.compile(r"[-+]?\s*(?:([0-9]+)\s+([0-9]+/[0-9]+)|([0-9]*)\s*(\\frac.*))", re.DOTALL)
_BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16},
}
_BASE_NAME = "[0-9]+|" + "|".join(_BASES)
# 52_8, 52_{(8)}, (52)_8, 52_{\text{eight}}, 52_{\text{base }8}
_BASE = re.compile(
    r"\(?\s*(?P<digits>[0-9A-Za-z]+)\s*\)?\s*_\s*\{?\s*\(?\s*(?:\\text\s*\{)?\s*\(?\s*(?:base\s*\}?\s*)?"
    rf"(?P<base>{_BASE_NAME})\s*\)?\s*\}}?\s*\)?\s*\}}?"
)
# 52 (base 8), 52 \text{ in base }8
_BASE_BEHIND = re.compile(
    r"(?P<digits>[0-9][0-9A-Za-z]*)\s*(?:\\text\s*\{)?\s*\(?\s*(?:\\text\s*\{)?\s*(?:in\s+)?base\s*\}?\s*"
    rf"(?P<base>{_BASE_NAME})\s*\)?\s*\}}?\s*\)?"
)
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_NAME = re.compile(
    r"((?:[a-zA-Z]|\\[a-zA-Z]+)'?(?:_(?:[0-9a-zA-Z]|\{[0-9a-zA-Z]+\}))?(?:\([a-zA-Z]\))?"
    r"|\(\s*[a-zA-Z]\s*(?:,\s*[a-zA-Z]\s*)+\))"
    r"\s*(?:=|\\in(?![A-Za-z])|\\equiv(?![A-Za-z]))\s*(?=[^=\s])"
)
_COMMAND = re.compile(r"\\(?!text|circ)[A-Za-z]+")
_WORDED = re.compile(r"[A-Za-z%$]|\\(?:text|circ)")
_NAME_BEHIND = re.compile(r"([^=<>]*[0-9][^=<>]*?)\s*=\s*([a-zA-Z](?:_(?:[0-9]|\{[0-9]+\}))?)")
_LETTER = re.compile(r"\(([A-Za-z])\)")
_ANOTHER_LABEL = re.compile(
    r"(?<![A-Za-z'(])\(?[A-Z][).:](?:[\s,;]|$)|\bor\s+\(?[A-Z](?![\w'])"
    r"|^\s*(?:[,/&]|and\b|nor\b)\s*\(?[A-Z](?![\w'])"
    r"|^\s*(?:is|was|would\s+be)\s+(?:not|wrong|false|incorrect|never)\b|^\s*(?:wrong|false|incorrect)\W*$"
)


@dataclass(frozen=True)
class Number:
    """A number, and whether it is a percentage.

    >>> number_of(r"\\$1,234.50"), number_of(r"1\\frac{4}{5}"), number_of(r"50\\%")
    (Number(value=Fraction(2469, 2), percent=False), Number(value=Fraction(9, 5), percent=False), \
Number(value=Fraction(50, 1), percent=True))
    """

    value: Fraction
    percent: bool = False


@dataclass(frozen=True)
class Listing:
    """Several answers, or one answer of several parts.

    >>> listing_of("(3, 4]"), listing_of("1,-2")
    (Listing(parts=('3', '4'), opening='(', closing=']'), Listing(parts=('1', '-2'), opening='', closing=''))
    """

    parts: tuple[str, ...]
    opening: str = ""
    closing: str = ""

    @property
    def ordered(self) -> bool:
        """Return whether the order counts: in points and intervals, but not in sets and lists of solutions."""
        return self.opening in ("(", "[")


def number_of(text: str) -> Number | None:
    """Return the number that a respelt text is, with or without a currency sign and a unit, or None."""
    if len(text) > 2 * MAX_NUMBER_LENGTH or is_changed(text):
        return None
    whole_text = _TEXT_COMMAND.fullmatch(text)
    text = whole_text[1] if whole_text else text
    text = without_unit(text)
    percent = text.endswith(("%", "percent"))
    if percent:
        text = text.removesuffix("percent").removesuffix("%").removesuffix("\\").strip()
    value = _plain_number(text)
    if value is None and "\\text" not in text:
        value = _exact(text)
    return None if value is None else Number(value, percent)


def _exact(text: str) -> Fraction | None:
    try:
        return exact_value(text)
    except TooLarge:
        return None


def base_of(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of a numeral such as 4210_{5}, or None for other texts.

    >>> base_of("4210_{5}"), base_of("52 (base 8)"), base_of("4210")
    (('4210', 5), ('52', 8), None)
    """
    match = _BASE.fullmatch(text) or _BASE_BEHIND.fullmatch(text)
    if not match:
        return None
    base = _BASES.get(match["base"]) or int(match["base"][:9])
    digits = match["digits"].upper()
    # x_1 is a name. A numeral in base b has digits below b.
    valid = 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)
    return (digits, base) if valid and digits[0].isdigit() else None


def words_of(text: str) -> str | None:
    r"""Return an answer of words in lower case, or None where it is mathematics.

    >>> words_of(r"\text{Evelyn}"), words_of("(C)"), words_of("the east"), words_of("xy"), words_of(r"\frac12")
    ('evelyn', 'c', 'the east', None, None)
    """
    letter = _LETTER.fullmatch(_TEXT_COMMAND.sub(r"\1", text).strip())
    if letter:
        return letter[1].lower()
    inside = _TEXT_COMMAND.sub(r"\1", text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z\s'.,-]*", inside.strip()):
        return None
    if inside == text and not re.search(r"[A-Za-z]{4}", text):
        return None  # without \text, short runs of letters are products
    return " ".join(inside.lower().split()).rstrip(".")


def without_name(text: str) -> str:
    r"""Return the right side of `x = 5`, `f(x) = ...` or `x \in [0, 1]`, and any other text unchanged.

    >>> without_name("x = 5"), without_name("2x + y = 1")
    ('5', '2x + y = 1')
    """
    return named(text)[1]


def plain_words(text: str) -> str:
    """Return a respelt text without the commands that set words."""
    return _TEXT_COMMAND.sub(r"\1", text).strip()


def label_of(text: str) -> str | None:
    """Return the letter of an option before its text, in lower case, or None.

    >>> label_of("(C) 5"), label_of(r"\\text{E: green}"), label_of("5")
    ('c', 'e', None)
    """
    labelled = re.match(r"\(?([A-Za-z])(?:\)|[.:]\s)", plain_words(text))
    return labelled[1].lower() if labelled else None


def is_hedged(text: str) -> bool:
    """Return whether the label of an option is followed by another label, or by words that reject it.

    >>> is_hedged("(A) 5 or (B) 6"), is_hedged("(A) is wrong"), is_hedged("(A) None of these"), is_hedged("B) False")
    (True, True, False, False)
    """
    label = re.match(r"\(?[A-Za-z][).:]", text)
    return label is not None and _ANOTHER_LABEL.search(text[label.end() :]) is not None


def last_value(text: str) -> Number | None:
    """Return the number at the end of a chain of equations, such as m + n = 27 + 43 = 70, or None.

    >>> last_value("m + n = 27 + 43 = 70"), last_value("n = 3k")
    (Number(value=Fraction(70, 1), percent=False), None)
    """
    *sides, last = text.split("=")
    if re.search(r"[<>]|\\[lg]e(?![A-Za-z])|,", text) or any(map(is_unsolved, sides)):
        return None
    return number_of(last.strip())


def chain_agrees(sides: Sequence[str]) -> bool:
    r"""Return whether the bare numbers among the sides of a chain are equal, or close where one may be rounded.

    A side may go on from the value before it, as in 16 - 7 = 9 * 2 = 18. One with a unit, as in 3 hours = 180 minutes,
    is not compared.

    >>> [chain_agrees(text.split("=")) for text in ("7 = 5", "x = 2 + 3 = 5", "1/3 = 0.33", "16 - 7 = 9 * 2 = 18")]
    [False, True, True, True]
    """
    bare = [side.strip() for side in sides if not _WORDED.search(_COMMAND.sub("", side))]
    values = [(side, number.value) for side in bare if (number := number_of(side)) is not None]
    return all(_is_near(value, other) or _goes_on(value, side) for (_, value), (side, other) in pairwise(values))


def _goes_on(value: Fraction, side: str) -> bool:
    head = re.match(r"-?[0-9]+(?:\.[0-9]+)?(?=\s*[-+*/\\])", side)
    return head is not None and Fraction(head[0]) == value


def _is_near(one: Fraction, other: Fraction) -> bool:
    if one == other or (one.denominator == 1 and other.denominator == 1):
        return one == other
    to_integer = abs(one - other) < Fraction(1, 2) and (one.denominator == 1 or other.denominator == 1)
    return to_integer or abs(one - other) * 20 <= max(abs(one), abs(other))


def is_unsolved(side: str) -> bool:
    """Return whether a side of an equation is more than a name or a sum of names: 2x, x^2, n - 1, but not m + n.

    >>> [is_unsolved(side) for side in ("2x", "x^2", "n-1", "m+n", "f(2)", "a_{10}", "27 + 43", "|AB|")]
    [True, True, True, False, False, False, False, False]
    """
    side = re.sub(r"_\{[^{}]*\}|_[0-9a-zA-Z]", "", side)
    side = re.sub(r"\\text\s*\{[^{}]*\}|(?<![A-Za-z\\])[a-zA-Z]\([^()]*\)", "A", side)
    if not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", side)):
        return False
    functions = r"\\(?:sqrt|log|ln|sin|cos|tan|exp|lfloor|lceil)(?![A-Za-z])"
    unsolved = rf"[0-9^]|{functions}|\|\s*[a-z]\s*\||(?<![A-Za-z])[a-z]\s*-\s*[a-z](?![A-Za-z])"
    return re.search(unsolved, side) is not None


def written(value: Fraction) -> str:
    """Return a number as text, in base 16 where Python refuses to write so many digits.

    >>> written(Fraction(3, 4)), written(Fraction(2) ** 20_000)[:4]
    ('3/4', '0x10')
    """
    if value.numerator.bit_length() + value.denominator.bit_length() < 10_000:
        return str(value)
    return f"{value.numerator:#x}" + (f"/{value.denominator:#x}" if value.denominator != 1 else "")


def named(text: str) -> tuple[str, str]:
    """Return the name and the value of `x = 5` or `5 = x`, and no name for any other text.

    >>> named("x = 5"), named("5 = x"), named("2x + y = 1")
    (('x', '5'), ('x', '5'), ('', '2x + y = 1'))
    """
    name = _NAME.match(text)
    if name and "=" not in text[name.end() :]:
        return squeezed(name[1]), text[name.end() :]
    behind = _NAME_BEHIND.fullmatch(text)
    if behind and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", behind[1])):
        return behind[2], behind[1].strip()
    return "", text


def system_of(text: str) -> str | None:
    """Return `(p, q) = (3, 7)` as `p = 3, q = 7`, or None for another text.

    >>> system_of("(p, q) = (3, 7)"), system_of("p = 3")
    ('p=3, q=7', None)
    """
    name, value = named(text)
    if not name.startswith("("):
        return None
    names, values = name.strip("()").split(","), listing_of(value)
    if values is None or values.opening + values.closing != "()" or len(values.parts) != len(names):
        return None
    return ", ".join(f"{one.strip()}={part}" for one, part in zip(names, values.parts, strict=True))


def listing_of(text: str, *, grouped: bool = True) -> Listing | None:
    r"""Return the parts of `a, b`, `a and b`, `(a, b)`, `[a, b)`, `\{a, b\}` or `a \pm b`, or None for one answer.

    Thousands separators do not separate parts: 10,080 is one number, unless `grouped` is False.
    """
    cases = re.fullmatch(r"\\begin\{(?:cases|aligned)\}(.*)\\end\{(?:cases|aligned)\}", text, re.DOTALL)
    if cases:
        text = re.sub(
            r"\s*\\\\\s*", ", ", cases[1].replace("&", " ").replace(r"\quad", " ").strip().rstrip("\\")
        ).strip()
        text = re.sub(r",\s*,", ",", text)
    opening = closing = ""
    inside = text
    for left, right in [("\\{", "\\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), ("]", "["), ("{", "}")]:
        if text.startswith(left) and text.endswith(right) and _closes_at_end(text, len(left), len(right)):
            opening, closing = left, right
            inside = text[len(left) : -len(right)]
            break
    if not opening:
        inside = re.sub(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*", ",", text)
    if opening == "{":
        opening, closing = "\\{", "\\}"
    parts = tuple(part.strip() for part in _split_at_commas(inside, grouped=grouped))
    if len(parts) == 1 and opening != "\\{":
        return _plus_minus(text) if not opening else None
    if not all(parts) or len(parts) > 50:
        return None
    if not opening or opening == "\\{":
        spread = [_plus_minus(part) or Listing((part,)) for part in parts]
        parts = tuple(part for listing in spread for part in listing.parts)
    return Listing(parts, opening, closing)


def _repeating(text: str) -> Fraction | None:
    """Return the value of a decimal with repeating digits, such as 0.1\\overline{6}."""
    match = re.fullmatch(r"(-?)([0-9]*)\.([0-9]{0,20})\\(?:overline|bar|dot)\s*\{?([0-9]{1,20})\}?", text)
    if match is None:
        return None
    fixed, cycle = match[2] + match[3], match[4]
    repeated = Fraction(int(fixed + cycle) - int(fixed or 0), (10 ** len(cycle) - 1) * 10 ** len(match[3]))
    return -repeated if match[1] else repeated


def _plain_number(text: str) -> Fraction | None:
    if "\\overline" in text or "\\bar" in text or "\\dot" in text:
        return _repeating(text)
    sign = -1 if text.startswith("-") else 1
    mixed = _MIXED.fullmatch(text)
    if mixed:
        whole, fraction = int(mixed[1] or mixed[3] or 0), _fraction(mixed[2] or mixed[4])
        if fraction is None or (whole and fraction < 0):
            return None
        return sign * (whole + fraction)
    grouped_or_signed = re.fullmatch(r"[-+]?\s*[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?|[-+]\s+\S+", text)
    return number_in(text.replace(" ", "") if grouped_or_signed else text)


def _fraction(text: str) -> Fraction | None:
    if not text.startswith("\\"):
        return number_in(text)
    match = _FRAC.fullmatch(text)
    if not match:
        return None
    denominator = int(match[3] or match[4])
    return Fraction(int(match[1] or match[2]), denominator) if denominator else None


def _closes_at_end(text: str, left: int, right: int) -> bool:
    """Return whether the last bracket closes the first. In (1, 2) \\cup (3, 4) it does not."""
    depth = 0
    for position in range(left, len(text) - right):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split_at_commas(text: str, *, grouped: bool = True) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        thousands = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))").match(text, position)
        if character in ",;" and depth == 0 and not (grouped and thousands and _in_grouped_number(text, position)):
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _in_grouped_number(text: str, comma: int) -> bool:
    """Return whether a comma is in a number whose digits are grouped in threes throughout."""
    grouped = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
    return any(match.start() < comma < match.end() for match in grouped.finditer(text, max(0, comma - 60), comma + 60))


def _plus_minus(text: str) -> Listing | None:
    """Return both values of a text with one \\pm, and with \\mp on the other side."""
    if text.count(r"\pm") != 1:
        return None
    return Listing(tuple(_signed(text, *signs) for signs in ("+-", "-+")))


def _signed(text: str, plus_minus: str, minus_plus: str) -> str:
    text = re.sub(r"\\pm(?![A-Za-z])\s*", plus_minus, re.sub(r"\\mp(?![A-Za-z])\s*", minus_plus, text))
    return re.sub(r"(^|[({=,])\s*\+", r"\1", text).strip()
