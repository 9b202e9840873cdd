"""Suggest the name that was probably meant, at the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name closest to a misspelt one, or None where nothing is close.

    >>> nearest_name("arithmatic", ["arithmetic", "file"])
    'arithmetic'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name as the end of an error message, or nothing.

    >>> did_you_mean("arithmatic", ["arithmetic", "file"])
    "; did you mean 'arithmetic'?"
    >>> did_you_mean("xyz", ["arithmetic", "file"])
    ''
    """
    close = nearest_name(name, known)
    return f"; did you mean {close!r}?" if close else ""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return what an error says after an unknown key: the nearest known one with its prefix, or all of them."""
    known = list(known)
    close = nearest_name(name, known)
    dot = prefix + "." if prefix else ""
    if close:
        return f"; did you mean {dot}{close}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""
