r"""Read sets of real numbers from respelt text: intervals, unions, inequalities and chains of them, \mathbb{R}.

Two ways to write one set, such as x < -3 or x > 3 and (-\infty, -3) \cup (3, \infty), become equal lists of intervals,
whose ends are compared by the caller.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sapo.tasks.verifiers.mathtext import listing_of, named, number_of

_INFINITE = re.compile(r"[-+]?\s*\\infty")
_RELATION = re.compile(r"<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])")
_NAME = re.compile(r"[a-zA-Z](?:_(?:[0-9]|\{[0-9]+\}))?|\\(?:theta|alpha|beta|lambda|phi|varphi|mu)|f\(x\)")
_OR = re.compile(
    r"\\cup(?![A-Za-z])|,?\s*\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|(?<![A-Za-z])U(?![A-Za-z])"
)
_BUILDER = re.compile(
    r"\\\{\s*[a-zA-Z](?:\s*\\in\s*(?:\\mathbb\s*\{?R\}?|R))?\s*(?:\\mid|\||:|\\vert)\s*(.*)\\\}", re.DOTALL
)
_REALS = re.compile(
    r"\\mathbb\s*\{?R\}?|\\text\s*\{\s*(?:all )?real numbers?\s*\}|(?:all )?real numbers?|\\text\s*\{R\}"
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


def intervals_of(text: str) -> tuple[Interval, ...] | None:
    r"""Return the intervals that a respelt text names, in its order, or None where it is no such set.

    >>> len(intervals_of(r"x < -3 \text{ or } x > 3")), intervals_of("(1, 2, 3)"), intervals_of("x^2 > x")
    (2, None, None)
    """
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![A-Za-z])\s*", "", text.strip())
    builder = _BUILDER.fullmatch(text)
    text = builder[1].strip() if builder else text
    if _REALS.fullmatch(text):
        return (Interval(None, None),)
    without = re.fullmatch(rf"(?:{_REALS.pattern})\s*(?:\\setminus|\\backslash|-|\\)\s*\\\{{(.*)\\\}}", text)
    if without:
        return _around([part.strip() for part in without[1].split(",")])
    unequal = re.fullmatch(rf"({_NAME.pattern})\s*\\ne\s*(.+)", text)
    if unequal and "," not in unequal[2]:
        return _around([unequal[2].strip()], name=unequal[1])
    size = re.fullmatch(rf"\|({_NAME.pattern})\|\s*(<|\\le(?![A-Za-z]))\s*([^<>|]+)", text)
    if size:
        closed = size[2] != "<"
        return (Interval(f"-{size[3]}", size[3], closed, closed, size[1]),)
    found: list[Interval] = []
    for part in _OR.split(_apart(text)):
        pieces = _one(part.strip())
        if pieces is None:
            return None
        found.append(pieces)
    if len({piece.name for piece in found if piece.name}) > 1:  # x < 1 or y > 2
        return None
    if builder:  # its variable is bound
        found = [replace(piece, name=None) for piece in found]
    return tuple(found) if len(found) <= 20 else None


def _apart(text: str) -> str:
    """Return `x < a, x > b` with an `or` where a is at most b, so that the comma can mean nothing else."""
    sides = [_chain(part) for part in text.split(",")] if text.count(",") == 1 else []
    if len(sides) == 2 and sides[0] and sides[1] and sides[0].low is None and sides[1].high is None:
        ends = [number_of(end or "") for end in (sides[0].high, sides[1].low)]
        if ends[0] and ends[1] and ends[0].value <= ends[1].value:
            return text.replace(",", r"\cup ")
    return text


def _around(points: list[str], *, name: str | None = None) -> tuple[Interval, ...] | None:
    """Return all numbers but the points, which must be in order."""
    if not all(points) or len(points) > 1:
        return None
    return (Interval(None, points[0], name=name), Interval(points[0], None, name=name))


def _one(text: str) -> Interval | None:
    listing = listing_of(text)
    brackets = None if listing is None else listing.opening + listing.closing
    if listing is not None and brackets in ("()", "(]", "[)", "[]") and len(listing.parts) == 2:
        low, high = listing.parts
        return _interval(low, high, listing.opening == "[", listing.closing == "]")
    return _chain(text)


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


def names_one(text: str) -> bool:
    """Return whether a text is a relation or a set, rather than a point or a list."""
    return bool(_RELATION.search(text) or _OR.search(text) or _REALS.search(text) or named(text)[0] == "\\in")
