r"""Normalise mathematical text without algebra, and recognise the form of an answer.

Numbers, words and lists are recognised here from the text alone. Anything else is an expression, for math.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sapo.tasks.verifiers.numbers import MAX_NUMBER_LENGTH, number_in

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_CHARACTERS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{NO-BREAK SPACE}": " ",
    "×": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "∈": r"\in ",
}
_SPELLINGS = [
    (re.compile(r",\s*\\!\s*"), ","),  # 11,\! 111
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit)\s*\{"), r"\\text{"),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])|(?<!\\)\\[,;:!]"), ""),
    (re.compile(r"\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\ |~"), " "),
    (re.compile(r"^\s*(?:=|\\approx(?![A-Za-z])|≈)"), ""),
    (re.compile(r"\{(?:b|small)?matrix\}"), "{pmatrix}"),  # not vmatrix, which is a determinant
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"√\s*\{?\(?([0-9]+)\)?\}?"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])"), r"\\infty"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
]
_MATH_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_MIXED = re.compile(r"[-+]?\s*(?:([0-9]+)\s+([0-9]+/[0-9]+)|([0-9]*)\s*(\\frac.*))", re.DOTALL)
# A word of four letters is no product of variables. Shorter units are listed.
_UNIT_WORD = r"(?:[A-Za-z]{4,}|cm|mm|km|kg|mg|ml|ft|in|lb|lbs|oz|mph|deg|yr|yrs|hr|hrs|min|sec|sq|per|of)"
_UNIT = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|(?<=[0-9}\s])\s*(?<![A-Za-z])" + _UNIT_WORD + r"(?:\s" + _UNIT_WORD + r"){0,2})"
    r"(?:\^\s*\{?[0-9]\}?)?\s*$"
)
_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+))")
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_NAME = re.compile(
    r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:[0-9a-zA-Z]|\{[0-9a-zA-Z]+\}))?(?:\([a-zA-Z]\))?"
    r"\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=\s])"
)
_LETTER = re.compile(r"\(([A-Za-z])\)")


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


def respell(text: str) -> str:
    r"""Respell a text without $, \left, \dfrac, \mbox, thin spaces, Unicode signs, double blanks and a final full stop.

    >>> respell(r"$\left( \dfrac12,\; 10{,}000 \right)$.")
    '( \\frac12, 10,000 )'
    """
    for character, spelling in _CHARACTERS.items():
        text = text.replace(character, spelling)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _MATH_DELIMITERS.sub("", text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return " ".join(text.replace("**", " ").split()).rstrip(" .;,")


def squeezed(text: str) -> str:
    r"""Remove blanks and needless braces, so that two spellings of the same text are equal.

    >>> squeezed(r"\frac{1}{2} x^{2}") == squeezed(r"\frac12x^2")
    True
    """
    text = re.sub(r"(?<=\\)([A-Za-z]+)\s+(?=[A-Za-z])", "\\1\x00", text)  # the blank that ends a command
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "\x00", text)  # 1 3/4 is not 13/4
    text = re.sub(r"\s+", "", text).replace("\x00", " ")
    return re.sub(r"(?<!text)\{([0-9A-Za-z])\}", r"\1", text)


def number_of(text: str) -> Number | None:
    """Return the number that a respelt text is, with or without a currency sign and a unit, or None."""
    if len(text) > 2 * MAX_NUMBER_LENGTH:
        return None
    whole_text = _TEXT_COMMAND.fullmatch(text)
    text = whole_text[1] if whole_text else text
    text = text.replace(r"\$", "").replace("$", "").replace("€", "").replace("£", "").removesuffix(r"^\circ").strip()
    bare = _UNIT.sub("", text)
    if bare.strip() and not re.search(r"[A-Za-z\\]", bare.replace(r"\frac", "").replace(r"\%", "")):
        text = bare
    text = text.removesuffix(r"^\circ").strip()
    percent = text.endswith("%")
    if percent:
        text = text.removesuffix("%").removesuffix("\\").strip()
    value = _plain_number(text)
    return None if value is None else Number(value, percent)


def base_of(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of a numeral such as 4210_{5}, or None for other texts.

    >>> base_of("4210_{5}"), base_of("4210")
    (('4210', 5), None)
    """
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base = int((match[2] or match[3])[:9])
    digits = match[1].upper()
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
    name = _NAME.match(text)
    if not name:
        return text
    rest = text[name.end() :]
    return rest if "=" not in rest else text


def listing_of(text: str) -> Listing | None:
    r"""Return the parts of `a, b`, `a and b`, `(a, b)`, `[a, b)`, `\{a, b\}` or `a \pm b`, or None for one answer.

    Thousands separators do not separate parts: 10,080 is one number.
    """
    opening = closing = ""
    inside = text
    for left, right in [("\\{", "\\}"), ("(", ")"), ("(", "]"), ("[", ")"), ("[", "]")]:
        if text.startswith(left) and text.endswith(right) and _closes_at_end(text, len(left), len(right)):
            opening, closing = left, right
            inside = text[len(left) : -len(right)]
            break
    if not opening:
        inside = re.sub(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*", ",", text)
    parts = tuple(part.strip() for part in _split_at_commas(inside))
    if len(parts) == 1 and opening != "\\{":
        return _plus_minus(text) if not opening else None
    if not all(parts) or len(parts) > 50:
        return None
    if not opening or opening == "\\{":
        spread = [_plus_minus(part) or Listing((part,)) for part in parts]
        parts = tuple(part for listing in spread for part in listing.parts)
    return Listing(parts, opening, closing)


def _plain_number(text: str) -> Fraction | None:
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


def _split_at_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        thousands = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))").match(text, position)
        if character in ",;" and depth == 0 and not (thousands and _in_grouped_number(text, position)):
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _in_grouped_number(text: str, comma: int) -> bool:
    """Return whether a comma is in a number whose digits are grouped in threes throughout."""
    grouped = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
    return any(match.start() < comma < match.end() for match in grouped.finditer(text, max(0, comma - 60), comma + 60))


def _plus_minus(text: str) -> Listing | None:
    head, sign, tail = text.partition(r"\pm")
    if not sign or r"\pm" in tail or r"\mp" in text or "{" in re.sub(r"\{[^{}]*\}", "", head):
        return None
    return Listing((f"{head}+{tail}".removeprefix("+").strip(), f"{head}-{tail}".strip()))
