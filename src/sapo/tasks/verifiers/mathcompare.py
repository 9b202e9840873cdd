r"""Compare two respelt answers of mathematics, of which the reference decides how.

Numbers are compared exactly here, words as words, lists and points part by part, sets of numbers by their intervals.
Expressions are compared by algebra (mathalgebra.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from sapo.tasks.verifiers.mathalgebra import (
    RELATIVE_TOLERANCE,
    canonical_expression,
    equations_equal,
    expressions_equal,
    parsed,
)
from sapo.tasks.verifiers.mathexact import is_too_large
from sapo.tasks.verifiers.mathphrases import NO_SOLUTION, number_in_words
from sapo.tasks.verifiers.mathsets import Interval, intervals_of, names_one, offers, pairs_of, relates
from sapo.tasks.verifiers.mathspell import squeezed
from sapo.tasks.verifiers.mathtext import (
    Listing,
    Number,
    base_of,
    chain_agrees,
    is_hedged,
    is_unsolved,
    label_of,
    last_value,
    listing_of,
    named,
    number_of,
    plain_words,
    system_of,
    without_name,
    words_of,
    written,
)
from sapo.tasks.verifiers.mathunits import in_unit, is_contradicted, largest_unit, quantity_of, with_unit
from sapo.tasks.verifiers.mathwords import is_changed

Result = TypeVar("Result")

_SYMBOL = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)'?(?:_(?:[0-9a-zA-Z]|\{[0-9a-zA-Z]+\}))?")
_MODULUS = re.compile(r"\(?\s*\\(?:pmod|mod|bmod)(?![A-Za-z])\s*(?:\{[^{}]*\}|[0-9]+)\s*\)?$")
# No group but the first may begin with 0 in a list: 10,080 is a number.
_THREE_DIGITS = re.compile(r"(?:\\\{)?[0-9]{1,3}(?:,[1-9][0-9]{2})+(?:\\\})?")
_ZEROS = re.compile(r",0[0-9]{2}(?![0-9])")
_SCIENTIFIC = re.compile(r"[-+]?[0-9]{1,50}(?:\.[0-9]{1,50})?[eE][-+]?[0-9]{1,3}")
_FREE_LETTERS = [rf"\{name}" for name in ("upsilon", "kappa", "zeta", "eta", "iota", "chi", "tau", "nu", "xi")]
_PLAIN_LOG = re.compile(r"\\log(?![A-Za-z])(?!\s*_)")
_DATED = re.compile(
    r"(?i:(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?\s+[0-9]{1,2}(?:,?\s+[0-9]{4})?"
    r"|[0-9]{1,2}:[0-9]{2}\s*[ap]\.?m\.?)"
)
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?:the\s+)?(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?(?:\s+of)?"
_YEAR = r"(?:,?\s+(?P<year>[0-9]{4}))?"
_DAYS = [re.compile(pattern) for pattern in (rf"{_MONTH}\s+{_DAY}{_YEAR}", rf"{_DAY}\s+{_MONTH}{_YEAR}")]
_UNIT_BETWEEN = re.compile(r"[0-9}]\s*\\text\s*\{(?!\s*(?:and|or)\s*\})[^{}]*\}[^0-9=]*[0-9]")


def equal(reference: str, given: str) -> bool:
    """Return whether two respelt answers are equal. `reference` decides how they are compared."""
    if squeezed(reference) == squeezed(given):
        return True
    reference, given = _spread(reference, given)
    if _names_differ(reference, given):
        return False
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
    if re.fullmatch(r"[A-Z]", reference) and re.match(r"\(?[A-Z][).:]", plain_words(given)):
        return label_of(given) == reference.lower() and not is_hedged(plain_words(given))
    if number_of(reference) is not None and (digits := number_in_words(given)) is not None:
        return equal(reference, digits)
    if number_of(given) is not None and (digits := number_in_words(reference)) is not None:
        return equal(digits, given)
    if NO_SOLUTION in (reference, given) and {words_of(reference), words_of(given)} & {"none"}:
        return True
    if (day := _day_of(reference)) is not None and (other := _day_of(given)) is not None:
        return day == other
    if _DATED.fullmatch(plain_words(reference)):
        return squeezed(plain_words(reference)).lower() == squeezed(plain_words(given)).lower()
    if (words := words_of(reference)) is not None:
        return words == _as_words(given, letter=len(words) == 1)
    if _MODULUS.search(reference):  # 12 \pmod{13}; the question names the modulus, so that an answer need not
        moduli = {squeezed(found[0]) for side in (reference, given) if (found := _MODULUS.search(side))}
        return len(moduli) == 1 and equal(_MODULUS.sub("", reference).strip(), _MODULUS.sub("", given).strip())
    if is_changed(reference) or is_changed(given):
        return squeezed(plain_words(reference)).lower() == squeezed(plain_words(given)).lower()
    if r"\approx" in given and r"\approx" not in reference:
        # 10\sqrt{3} \approx 17.32 gives a value and a rounded one; a reference with a decimal point may be the latter.
        exact, _, rounded = given.partition(r"\approx")
        if not chain_agrees([exact, rounded]):
            return False  # 5 \approx 7
        return equal(reference, exact.strip()) or ("." in reference and equal(reference, rounded.strip()))
    for decide in (_as_quantities, _as_three_digits, _as_numbers, _as_sets, _as_listings):
        if (verdict := decide(reference, given)) is not None:
            return verdict
    return _as_expressions(whole, reference, given)


def _spread(reference: str, given: str) -> tuple[str, str]:
    """Return `(p, q) = (3, 7)` as `p = 3, q = 7` where the other side has names too."""
    spread = [system_of(text) or text for text in (reference, given)]
    listings = [listing_of(text) for text in spread]
    both = all(side is not None and all(named(part)[0] for part in side.parts) for side in listings)
    return (spread[0], spread[1]) if both else (reference, given)


def _names_differ(reference: str, given: str) -> bool:
    """Return whether the sides name different unknowns: x = k and y = k, or x = 5 and m + n = 5, but not y and f(x)."""
    names = [named(text)[0] for text in (reference, given)]
    known = bool(names[0]) and number_of(without_name(reference)) is not None
    if known and not names[1] and _SYMBOL.fullmatch(names[0]) and given.count("=") == 1:
        side = re.sub(r"\\text\s*\{[^{}]*\}", "", given.partition("=")[0])
        return re.search(r"[A-Za-z]", side) is not None and number_of(given.partition("=")[2].strip()) is not None
    if names[0] == names[1] or not all(_SYMBOL.fullmatch(name) for name in names):
        return False
    values = without_name(reference), without_name(given)
    if all(number_of(value) is not None for value in values):
        return False  # the name of a single number is the writer's own choice
    # y = 2x - 5 may be solved for x.
    return names[1] not in values[0] and names[0] not in values[1]


def _day_of(text: str) -> tuple[str, int, str | None] | None:
    """Return the month, day and year of "March 5", "5th of March" or "5 March 2020", or None for another text."""
    plain = " ".join(plain_words(text).lower().split())
    found = next((match for pattern in _DAYS if (match := pattern.fullmatch(plain))), None)
    return None if found is None else (found["month"][:3], int(found["day"]), found["year"])


def _as_expressions(whole: Sequence[str], reference: str, given: str) -> bool:
    """Compare by algebra: equations as they stand, and otherwise the right sides of `x = ...`."""
    *whole, reference, given = _for_algebra(*whole, reference, given)
    if "=" in whole[0] and "=" in whole[1] and equations_equal(*whole):
        return True
    if is_too_large(reference) or is_too_large(given):
        return _powers_equal(reference, given)
    # y = 2x + 3 may be written as another equation of the same line.
    as_equations = "=" in given and whole != [reference, given]
    sides = whole if as_equations else [reference, given]
    if expressions_equal(*sides):
        return True
    natural = [_PLAIN_LOG.sub(r"\\ln", side) for side in sides]  # log may mean ln where the other side has ln
    return natural != sides and any(r"\ln" in side for side in sides) and expressions_equal(*natural)


def _for_algebra(*texts: str) -> list[str]:
    r"""Return texts that mean to the reader of LaTeX, which takes E for e and 1e-5 for e - 5, what they mean to people.

    E becomes a letter of its own, and so does a capital beside its small letter, as in a + A. 1e-5 becomes a fraction.
    """
    texts = tuple(_written_out(text) for text in texts)
    letters = [set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|\{[A-Za-z\s]{2,}\}", " ", text))) for text in texts]
    capitals = {letter for found in letters for letter in found if letter == "E" or letter.lower() in found - {letter}}
    capitals = {letter for letter in capitals if letter.isupper()}
    if not capitals and not any(r"\Pi" in text for text in texts):
        return list(texts)
    free = [name for name in _FREE_LETTERS if not any(name in text for text in texts)]
    names = dict(zip(sorted(capitals) + [r"\Pi"], free, strict=False))

    def named_anew(match: re.Match[str]) -> str:
        name = names.get(match[1] or match[2] or match[3])
        return match[0] if name is None else f"{name} "

    own = re.compile(r"\\text\s*\{\s*([A-Z])\s*\}|(\\[A-Za-z]+)|([A-Z])(?![A-Za-z]{3})")
    return [own.sub(named_anew, text) for text in texts]


def _written_out(text: str) -> str:
    number = number_of(text) if _SCIENTIFIC.fullmatch(text) else None
    return text if number is None else written(number.value)


def _powers_equal(reference: str, given: str) -> bool:
    """Compare two powers that nobody can compute: base with base, exponent with exponent."""
    found = [re.fullmatch(r"([0-9]+)\^(?:\{(.*)\}|([0-9]))", text) for text in (reference, given)]
    if not found[0] or not found[1] or found[0][1] != found[1][1]:
        return False
    return equal(found[0][2] or found[0][3], found[1][2] or found[1][3])


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
    if is_changed(text):
        return None
    if (quantity := quantity_of(text)) is not None:
        return written(quantity)
    if (number := number_of(text)) is not None:
        return f"{written(number.value)}%" if number.percent else written(number.value)
    if (listing := listing_of(text)) is not None:
        parts = [canonical_answer(part) or squeezed(part) for part in listing.parts]
        inside = ", ".join(parts if listing.ordered else sorted(parts))
        return f"{listing.opening}{inside}{listing.closing}" if listing.ordered else inside
    expression = parsed(text)
    return None if expression is None else canonical_expression(expression)


# ------------------------------------------------------------------------------------------------- parts of an answer


def _as_words(given: str, *, letter: bool) -> str:
    inside = words_of(given)
    if inside is not None:
        return inside
    plain = plain_words(given)
    return (label_of(given) if letter else None) or plain.strip("() .").lower()


def _as_quantities(reference: str, given: str) -> bool | None:
    """Compare quantities of two units, such as 7 hours and 30 minutes, with 450 minutes or with a bare 7.5."""
    units = largest_unit(reference), largest_unit(given)
    unit = units[0] or units[1]
    if unit is None:
        return None
    totals = [_total_in(unit, text) for text in (reference, given)]
    return None not in totals and totals[0] == totals[1]


def _total_in(unit: str, text: str) -> Fraction | None:
    """Return a quantity in a unit. A number without a unit is in that unit already."""
    several, largest = quantity_of(text), largest_unit(text)
    if several is not None and largest is not None:
        return in_unit(several, largest, unit)
    head, own = with_unit(text)
    number = number_of(head)
    if number is None or own == "?":
        return None
    return in_unit(number.value, own or unit, unit)


def _as_three_digits(reference: str, given: str) -> bool | None:
    """Return True where 100,200 is read as a list on one side, or on both, and the lists are equal.

    The form cannot tell 100,200 from 1,234. So each side is read in both ways, and one agreement is enough: nobody
    writes 100200 for the list by mistake, nor 200,100 for the number.
    """
    if not (_THREE_DIGITS.fullmatch(reference) or _THREE_DIGITS.fullmatch(given)):
        return None
    sides = listing_of(reference, grouped=False), listing_of(given, grouped=False)
    return True if sides[0] and sides[1] and _listings_equal(sides[0], sides[1]) else None


def _as_numbers(reference: str, given: str) -> bool | None:
    left, right = number_of(reference), number_of(given)
    if left is not None and right is None and "=" in given:
        if any(map(is_unsolved, given.split("=")[:-1])):
            return False  # an equation for x is no value
        right = last_value(given)
        if right is not None and not chain_agrees(given.split("=")):
            return False  # 7 = 5
    if left is not None and right is None and _UNIT_BETWEEN.search(re.sub(r"\^\s*\{?-?[0-9]\}?", "", given)):
        return False  # 10 cm by 5 cm is neither
    if left is not None and right is None and is_contradicted(given):
        return False  # 5 \text{ or seven}
    if left is None or right is None:
        return None
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", reference) and ", " in given:
        return None
    return _numbers_equal(left, right)


def _as_sets(reference: str, given: str) -> bool | None:
    """Compare sets of real numbers where at least one is written as a relation or a union."""
    if not (names_one(reference) or names_one(given)):
        return None
    pairs = pairs_of(reference), pairs_of(given)
    if all(pairs) and len({pair[0] + pair[-1] for side in pairs for pair in side}) == 1:
        return None  # (1, 9) or (3, 7) may be points, of which each counts
    # A reference of nothing, such as x < -1 and x > 4, means the union. An answer is held to what it says.
    loosely = intervals_of(reference) == () and squeezed(reference) != r"\emptyset"
    left, right = (intervals_of(text, and_joins=loosely) for text in (reference, given))
    if left is None or right is None:
        relations = relates(reference) and relates(given)
        return False if relations and offers(reference) != offers(given) else None  # x > 0 or y > 0; x > 0 and y > 0
    names = {piece.name for piece in (*left, *right) if piece.name}
    return len(names) < 2 and len(left) == len(right) and _matched(left, right, _same_interval)


def _same_interval(left: Interval, right: Interval) -> bool:
    if (left.low_closed, left.high_closed) != (right.low_closed, right.high_closed):
        return False
    ends = [(left.low, right.low), (left.high, right.high)]
    return all((a is None and b is None) or (a is not None and b is not None and equal(a, b)) for a, b in ends)


def _as_listings(reference: str, given: str) -> bool | None:
    parts, others = listing_of(reference), listing_of(given)
    if parts is None and others is not None and len(others.parts) == 1 and number_of(reference) is not None:
        return equal(reference, others.parts[0])  # 1,234 in the braces of a set
    if parts is None and others is not None and not _ZEROS.search(reference):
        parts = listing_of(reference, grouped=False)
    if others is None and parts is not None and not _ZEROS.search(given):
        others = listing_of(given, grouped=False)
    return None if parts is None or others is None else _listings_equal(parts, others)


def _numbers_equal(reference: Number, given: Number) -> bool:
    if reference.percent != given.percent:  # 50% is 0.5, or 50 where the question asked for a percentage
        as_given = {given.value, given.value / 100} if given.percent else {given.value, given.value * 100}
        return reference.value in as_given
    if reference.value == given.value:
        return True
    if abs(reference.value.denominator) > 10**400:
        return False
    has_a_decimal = 10**400 % reference.value.denominator == 0
    rounded = 10**400 % min(given.value.denominator, 10**401) == 0
    close = abs(reference.value - given.value) <= RELATIVE_TOLERANCE * abs(reference.value)
    return not has_a_decimal and rounded and close


def _listings_equal(reference: Listing, given: Listing) -> bool:
    if len(reference.parts) != len(given.parts):
        return False
    names = [[named(part)[0] for part in side.parts] for side in (reference, given)]
    distinct = [all(side) and len(set(side)) == len(side) for side in names]
    if any(distinct) and not (reference.ordered or (given.ordered and not distinct[0])):
        return _named_equal(reference, given, names, distinct)
    if any(distinct):
        return all(equal(a, b) for a, b in zip(reference.parts, given.parts, strict=True))
    if reference.ordered:
        if given.opening and (reference.opening, reference.closing) != (given.opening, given.closing):
            return False
        if not given.opening and (reference.opening, reference.closing) != ("(", ")"):
            return False
        return all(equal(a, b) for a, b in zip(reference.parts, given.parts, strict=True))
    if "[" in given.opening + given.closing or "]" in given.closing:
        return False
    return _matched(reference.parts, given.parts, equal)


def _named_equal(reference: Listing, given: Listing, names: list[list[str]], distinct: list[bool]) -> bool:
    """Compare `x = 1, y = 2` by names, and in order where only one side has them."""
    if not all(distinct):
        return all(equal(a, b) for a, b in zip(reference.parts, given.parts, strict=True))
    if set(names[0]) != set(names[1]):
        return False
    values = dict(zip(names[1], given.parts, strict=True))
    return all(equal(part, values[name]) for name, part in zip(names[0], reference.parts, strict=True))


def _matched(left: Sequence[Result], right: Sequence[Result], same: Callable[[Result, Result], bool]) -> bool:
    """Return whether each item of one list has an item of its own in the other that is the same."""
    rest = list(right)
    for item in left:
        match = next((other for other in rest if same(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest
