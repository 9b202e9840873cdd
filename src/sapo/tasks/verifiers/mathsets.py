r"""Read sets of real numbers from respelt text: intervals, unions, intersections, inequalities, \mathbb{R}.

Two ways to write one set, such as x < -3 or x > 3 and (-\infty, -3) \cup (3, \infty), become equal lists of intervals,
whose ends are compared by the caller. A list of intervals is sorted and merged where the order of its ends is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

from sapo.tasks.verifiers.mathalgebra import constant_of
from sapo.tasks.verifiers.mathphrases import NO_SOLUTION
from sapo.tasks.verifiers.mathtext import listing_of, named, number_of

MAX_PIECES = 20
"""Limit of the intervals of a set."""

_INFINITE = re.compile(r"[-+]?\s*\\infty")
_RELATION = re.compile(r"<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])")
_NAME = re.compile(r"[a-zA-Z](?:_(?:[0-9]|\{[0-9]+\}))?|\\(?:theta|alpha|beta|lambda|phi|varphi|mu)|f\(x\)")
_OR = re.compile(
    r"\\cup(?![A-Za-z])|,?\s*\\text\s*\{\s*or\s*\}|,?\s*(?<![A-Za-z\\])or(?![A-Za-z])|(?<![A-Za-z])U(?![A-Za-z])"
)
_AND = re.compile(r",?\s*\\text\s*\{\s*and\s*\}|,?\s*(?<![A-Za-z\\])and(?![A-Za-z])")
_WORD = re.compile(r",?\s*\\text\s*\{\s*(?:or|and)\s*\}|,?\s*(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])")
_CAP = re.compile(r"\\cap(?![A-Za-z])|&&?|(?<!\\)\\&")
_BUILDER = re.compile(
    r"\\\{\s*[a-zA-Z](?:\s*\\in\s*(?:\\mathbb\s*\{?R\}?|R))?\s*(?:\\mid|\||:|\\vert)\s*(.*)\\\}", re.DOTALL
)
_REALS = re.compile(
    r"\\mathbb\s*\{?R\}?|\\text\s*\{\s*(?:[Aa]ll )?real numbers?\s*\}|(?:[Aa]ll )?real numbers?|\\text\s*\{R\}"
)
_SIZE = re.compile(
    rf"\|\s*({_NAME.pattern})\s*(?:([-+])\s*([^|<>,]+))?\|\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))\s*([^<>|,]+)"
)
_MIRROR = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


@dataclass(frozen=True)
class Interval:
    r"""An interval of real numbers. Its ends are text; None stands for infinity.

    >>> intervals_of("2 \\le x < 5")
    (Interval(low='2', high='5', low_closed=True, high_closed=False, name='x'),)
    """

    low: str | None
    high: str | None
    low_closed: bool = False
    high_closed: bool = False
    name: str | None = None
    """The variable of the relation that describes it."""


Intervals = tuple[Interval, ...]


class _UnknownOrder(Exception):  # noqa: N818 - nothing is wrong: one end is not known to be below another
    pass


def intervals_of(text: str, *, and_joins: bool = False) -> Intervals | None:
    r"""Return the intervals that a respelt text names, or None where it is no such set. The empty set has none.

    A comma between relations means "and", as in x > 1, x < 3, but "or" where "and" would leave nothing: x < 1, x > 3.
    `and_joins` reads the word "and" in this way too.

    >>> len(intervals_of(r"x < -3 \text{ or } x > 3")), intervals_of("(1, 2, 3)"), intervals_of("x^2 > x")
    (2, None, None)
    >>> intervals_of("x > 1 and x < 3") == intervals_of("1 < x < 3"), intervals_of("x < 1 and x > 3")
    (True, ())
    """
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![A-Za-z])\s*", "", text.strip())
    builder = _BUILDER.fullmatch(text)
    text = builder[1].strip() if builder else text
    if _REALS.fullmatch(text):
        return (Interval(None, None),)
    if text == NO_SOLUTION:
        return ()
    without = re.fullmatch(rf"(?:{_REALS.pattern})\s*(?:\\setminus|\\backslash|-|\\)\s*\\\{{(.*)\\\}}", text)
    if without:
        return _around([part.strip() for part in without[1].split(",")])
    if _may_be_points(text):
        return None
    try:
        found = _union_in(text, and_joins=and_joins)
    except _UnknownOrder:
        return None
    if found is None or len({piece.name for piece in found if piece.name}) > 1:  # x < 1 or y > 2
        return None
    if builder:  # its variable is bound
        found = tuple(replace(piece, name=None) for piece in found)
    return found if len(found) <= MAX_PIECES else None


def pairs_of(text: str) -> tuple[str, ...]:
    r"""Return the pairs in brackets that words or commas join, or none for another text.

    They may be points. Infinity, and signs of a union, are found in sets alone.

    >>> pairs_of(r"(1, 9) \text{ or } (3, 7)"), pairs_of(r"(1, 9) \cup (3, 7)"), pairs_of(r"(1, \infty)")
    (('(1, 9)', '(3, 7)'), (), ())
    """
    parts = tuple(piece for part in _WORD.split(text) for piece in _split_outside(part.strip()))
    return parts if len(parts) <= MAX_PIECES and all(map(_is_pair, parts)) else ()


def names_one(text: str) -> bool:
    """Return whether a text is a relation or a set, rather than a point or a list."""
    marks = (_RELATION, _OR, _CAP, _REALS)
    return any(mark.search(text) for mark in marks) or named(text)[0] == "\\in"


def relates(text: str) -> bool:
    """Return whether a text has an inequality."""
    return _RELATION.search(text) is not None


def offers(text: str) -> bool:
    """Return whether a text joins its parts by "or"."""
    return _OR.search(text) is not None


# -------------------------------------------------------------------------------------------------- or, and, commas


def _union_in(text: str, *, and_joins: bool) -> Intervals | None:
    parts = [_intersection_in(part.strip(), and_joins=and_joins) for part in _OR.split(text)]
    found = tuple(piece for part in parts if part is not None for piece in part)
    return None if None in parts or len(found) > MAX_PIECES else _merged(found)


def _intersection_in(text: str, *, and_joins: bool) -> Intervals | None:
    capped = _CAP.split(text)
    if len(capped) > 1:
        return _all_of([_joined_by_commas(part.strip()) for part in capped])
    parts = _AND.split(text)
    if len(parts) == 1:
        return _joined_by_commas(text)
    pieces = [_joined_by_commas(part.strip()) for part in parts]
    if any(_bracketed(part.strip()) for part in parts):  # on (0, 1) and (2, 3)
        return _any_of(pieces)
    both = _all_of(pieces)
    return _any_of(pieces) if both == () and and_joins else both


def _joined_by_commas(text: str) -> Intervals | None:
    whole = _one(text)
    parts = _split_outside(text)
    if whole is not None or len(parts) == 1 or len(parts) > MAX_PIECES:
        return whole
    pieces = [_one(part) for part in parts]
    if any(_bracketed(part) for part in parts):
        return _any_of(pieces)
    both = _all_of(pieces)
    return _any_of(pieces) if both == () else both


def _split_outside(text: str) -> list[str]:
    """Return the parts between the commas that stand in no brackets; (0, 1] is balanced too."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _is_pair(text: str) -> bool:
    listing = listing_of(text) if _bracketed(text) and "\\infty" not in text else None
    return listing is not None and len(listing.parts) == 2 and listing.opening in ("(", "[")


def _may_be_points(text: str) -> bool:
    """Return whether several pairs are points rather than intervals: one falls from end to end, or two overlap."""
    pairs = pairs_of(text)
    pieces = [piece for pair in pairs for piece in _one(pair) or ()] if len(pairs) > 1 else []
    ends = [(_value(piece.low or ""), _value(piece.high or "")) for piece in pieces]
    known = [(low, high) for low, high in ends if low is not None and high is not None]
    return any(low > high for low, high in known) or any(
        one[0] < other[1] and other[0] < one[1] for one, other in combinations(known, 2)
    )


def _bracketed(text: str) -> bool:
    return text[:1] in ("(", "[") and text[-1:] in (")", "]")


# ------------------------------------------------------------------------------------------------------- one interval


def _around(points: list[str], *, name: str | None = None) -> Intervals | None:
    """Return all numbers but the points."""
    if not all(points) or len(points) > MAX_PIECES:
        return None
    if len(points) > 1:
        values = [_value(point) for point in points]
        if None in values:
            return None
        points = [point for _, point in sorted(zip(values, points, strict=True))]
    ends = [None, *points, None]
    return tuple(Interval(low, high, name=name) for low, high in pairwise(ends))


def _one(text: str) -> Intervals | None:
    """Return the set of one interval, relation, chain of relations or single point in braces."""
    if _REALS.fullmatch(text):
        return (Interval(None, None),)
    half = re.fullmatch(r"\\mathbb\s*\{?R\}?\s*[\^_]\s*\{?\s*(\+|-|>\s*0|<\s*0)\s*\}?", text)
    if half:
        return (Interval("0", None),) if half[1][0] in "+>" else (Interval(None, "0"),)
    point = re.fullmatch(r"\\\{([^{},;<>=]+)\\\}", text)
    if point:
        end = point[1].strip()
        return (Interval(end, end, True, True),)
    unequal = re.fullmatch(rf"({_NAME.pattern})\s*\\ne\s*(.+)", text)
    if unequal and "," not in unequal[2]:
        return _around([unequal[2].strip()], name=unequal[1])
    equation = re.fullmatch(rf"({_NAME.pattern})\s*=\s*([^=<>,]+)", text)
    if equation and number_of(equation[2].strip()):
        end = equation[2].strip()
        return (Interval(end, end, True, True, equation[1]),)
    size = _SIZE.fullmatch(text)
    if size:
        return _by_distance(size[1], size[2], size[3], size[4], size[5].strip())
    listing = listing_of(text)
    brackets = None if listing is None else listing.opening + listing.closing
    if listing is not None and brackets in ("()", "(]", "[)", "[]") and len(listing.parts) == 2:
        low, high = listing.parts
        return (_interval(low, high, listing.opening == "[", listing.closing == "]"),)
    chain = _chain(text)
    return None if chain is None else (chain,)


def _by_distance(name: str, sign: str | None, centre: str | None, relation: str, size: str) -> Intervals | None:
    """Return the set of |x - centre| < size, or of |x| < size."""
    low, high = f"-{size}", size
    if centre is not None:
        middle, radius = number_of(centre.strip()), number_of(size)
        if middle is None or radius is None:
            return None
        at = middle.value if sign == "-" else -middle.value
        low, high = str(at - radius.value), str(at + radius.value)
    closed = relation in ("\\le", "\\ge")
    if relation in ("<", "\\le"):
        return (Interval(low, high, closed, closed, name),)
    return (Interval(None, low, False, closed, name), Interval(high, None, closed, False, name))


def _interval(low: str, high: str, low_closed: bool, high_closed: bool) -> Interval:
    endless = [_INFINITE.fullmatch(end.strip()) is not None for end in (low, high)]
    return Interval(
        None if endless[0] else low.strip(),
        None if endless[1] else high.strip(),
        low_closed and not endless[0],
        high_closed and not endless[1],
    )


def _chain(text: str) -> Interval | None:
    """Return the interval of x > a, a < x or a <= x < b."""
    relations = [relation.strip() for relation in _RELATION.findall(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    if not relations or not all(sides) or any("=" in side or "," in side for side in sides):
        return None
    if len(relations) == 1 and _NAME.fullmatch(sides[0]) and not _NAME.fullmatch(sides[1]):
        sides, relations = [sides[1], sides[0]], [_MIRROR[relations[0]]]
    if _NAME.fullmatch(sides[1]) is None or len(sides) > 3:
        return None
    ends = " ".join([sides[0], *sides[2:]])
    if re.search(rf"(?<![A-Za-z\\]){re.escape(sides[1])}(?![A-Za-z])", ends):  # x^2 > x says nothing by itself
        return None
    if relations[0] in (">", "\\ge"):  # 5 > x > 2
        sides, relations = sides[::-1], [_MIRROR[relation] for relation in relations[::-1]]
        if len(sides) == 2:
            return replace(_interval("-\\infty", sides[1], False, relations[0] == "\\le"), name=sides[0])
    if any(relation in (">", "\\ge") for relation in relations):
        return None
    high = sides[2] if len(sides) == 3 else "\\infty"
    return replace(_interval(sides[0], high, relations[0] == "\\le", relations[-1] == "\\le"), name=sides[1])


# ---------------------------------------------------------------------------------------- arithmetic of intervals


def _all_of(parts: list[Intervals | None]) -> Intervals | None:
    """Return the intersection of sets."""
    if not parts or None in parts or len({piece.name for part in parts for piece in part or () if piece.name}) > 1:
        return None
    found = parts[0] or ()
    for part in parts[1:]:
        pieces = [_overlap(one, other) for one in found for other in part or ()]
        found = tuple(piece for piece in pieces if piece is not None)[: MAX_PIECES + 1]
    return _merged(found)


def _any_of(parts: list[Intervals | None]) -> Intervals | None:
    return None if None in parts else _merged(tuple(piece for part in parts for piece in part or ()))


def _overlap(one: Interval, other: Interval) -> Interval | None:
    """Return what two intervals have in common, or None for nothing.

    Raises:
        _UnknownOrder: two low ends, or two high ends, cannot be compared.
    """
    low, low_closed = _tighter((one.low, one.low_closed), (other.low, other.low_closed), upper=False)
    high, high_closed = _tighter((one.high, one.high_closed), (other.high, other.high_closed), upper=True)
    name = one.name or other.name
    if low is not None and high is not None:
        order = _compared(low, high)
        if order is not None and (order > 0 or (order == 0 and not (low_closed and high_closed))):
            return None
    return Interval(low, high, low_closed, high_closed, name)


def _tighter(one: tuple[str | None, bool], other: tuple[str | None, bool], *, upper: bool) -> tuple[str | None, bool]:
    if one[0] is None or other[0] is None:
        return one if other[0] is None else other
    order = _compared(one[0], other[0])
    if order is None:
        raise _UnknownOrder
    if order == 0:
        return one[0], one[1] and other[1]
    return one if (order < 0) == upper else other


def _merged(pieces: Intervals) -> Intervals:
    """Return intervals in order, those that touch or overlap as one.

    They stay as they are where an order is not known, and where they are of several variables: x > 0 or y > 0.
    """
    if len({piece.name for piece in pieces if piece.name}) > 1:
        return pieces
    lows = [None if piece.low is None else _value(piece.low) for piece in pieces]
    highs = [None if piece.high is None else _value(piece.high) for piece in pieces]
    known = zip(pieces, lows, highs, strict=True)
    if len(pieces) < 2 or any(
        (low is None and piece.low is not None) or (high is None and piece.high is not None)
        for piece, low, high in known
    ):
        return pieces
    order = [(low is not None, low or 0, not piece.low_closed) for piece, low in zip(pieces, lows, strict=True)]
    ranked = sorted(range(len(pieces)), key=order.__getitem__)
    merged, ends = [pieces[ranked[0]]], [highs[ranked[0]]]
    for index in ranked[1:]:
        piece, last, end, low = pieces[index], merged[-1], ends[-1], lows[index]
        touches = end is None or low is None or low < end or (low == end and (piece.low_closed or last.high_closed))
        if not touches:
            merged.append(piece)
            ends.append(highs[index])
            continue
        high = highs[index]
        if end is not None and (high is None or high > end):
            merged[-1] = replace(last, high=piece.high, high_closed=piece.high_closed)
            ends[-1] = high
        elif end is not None and high == end:
            merged[-1] = replace(last, high_closed=last.high_closed or piece.high_closed)
    return tuple(merged)


def _compared(one: str, other: str) -> int | None:
    """Return -1, 0 or 1 as the first end is below, at or above the second, or None where that is not known."""
    values = _value(one), _value(other)
    if values[0] is None or values[1] is None:
        return 0 if "".join(one.split()) == "".join(other.split()) else None
    return int(values[0] > values[1]) - int(values[0] < values[1])


def _value(end: str) -> Fraction | None:
    number = number_of(end)
    if number is not None:
        return number.value
    constant: Any = constant_of(end)
    return None if constant is None else Fraction(str(constant))
