"""Errors for wrong options: the rule, the value got, the way out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

from sapo.utils.names import nearest_name


def unknown_option(kind: str, got: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in `known`; it suggests the nearest and lists all.

    >>> print(unknown_option("gate", "sigmod", ("sigmoid", "erf")))
    gate must be one of erf, sigmoid; got 'sigmod'; did you mean 'sigmoid'?
    """
    names = sorted(known)
    nearest = nearest_name(str(got), names, cutoff=0.6)
    way_out = f"did you mean {nearest!r}?" if nearest else "choose one of these"
    return ValueError(f"{kind} must be one of {', '.join(names)}; got {got!r}; {way_out}")


def require_positive(name: str, value: float, paper: float) -> None:
    """Refuse a value unless 0 < value < inf: at 0 a gate divides by zero, below 0 it grows with the drift."""
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite; got {value!r}; the paper uses {paper}")


def require_not_negative(name: str, value: float, paper: float) -> None:
    """Refuse a value unless 0 <= value < inf: 0 switches a term off, below 0 the term would change its sign."""
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0; got {value!r}; the paper uses {paper}")


def require_cap(name: str, value: float, paper: float) -> None:
    """Refuse a value unless 1 <= value < inf: below 1 a cap would cut tokens that are on policy."""
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 1):
        raise ValueError(f"{name} must be finite and at least 1; got {value!r}; the paper uses {paper}")


def require_clip(name: str, value: float, paper: float) -> None:
    """Refuse a value unless 0 <= value < 1: at 1 or more, the lower edge 1 - eps is not a positive ratio."""
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"{name} must satisfy 0 <= {name} < 1; got {value!r}; the paper uses {paper}")
