"""The search for a case that breaks a law, and the comparison of outcomes.

Functions named describe_... return a text that says what is wrong with an outcome, empty where nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from sapo.conformance.cases import Case, shrink
from sapo.conformance.subjects import LossOutcome, Subject, Whole, measure

HELD: Final = "held"
BROKEN: Final = "broken"
DOES_NOT_APPLY: Final = "does not apply"


@dataclass(frozen=True)
class Verdict:
    """The verdict of a law on a subject.

    Verdict("finite_far_off_policy", "broken", "the gradient is nan", Case((Response(1.0, (89.0,)),)))
    """

    law: str
    status: Literal["held", "broken", "does not apply"]
    detail: str = ""
    """What is wrong at the counterexample, or why the law does not apply."""
    counterexample: Case | None = None

    def __str__(self) -> str:
        """Return the law with its counterexample and its detail, in one line."""
        return ": ".join(str(part) for part in (self.law, self.counterexample, self.detail) if part)


Check = Callable[[Case], str]
"""Returns what is wrong at a case; empty where the law holds."""


def search(
    subject: Subject, law: str, cases: Iterable[Case], check: Check, *, simplify: bool = True, suffix: str = ""
) -> Verdict:
    """Try all cases; return the first that breaks the law, made smaller, or HELD."""
    for case in cases:
        if check(case):
            smallest = shrink(case, lambda c: bool(check(c))) if simplify else case
            return Verdict(law, BROKEN, check(smallest) + suffix, smallest)
    return Verdict(law, HELD)


def search_each(subject: Subject, law: str, cases: list[Case], check_in: Callable[[torch.dtype], Check]) -> Verdict:
    """Search in every dtype of the subject, the coarsest first; a broken law names the dtype."""
    found = Verdict(law, HELD)
    for dtype in reversed(subject.dtypes):
        found = search(subject, law, cases, check_in(dtype), suffix=f" ({str(dtype).removeprefix('torch.')})")
        if found.status == BROKEN:
            break
    return found


def search_dtypes(subject: Subject, law: str, cases: list[Case], check: Callable[[Case, LossOutcome], str]) -> Verdict:
    """Search for a case whose outcome is wrong, in every dtype of the subject."""
    return search_each(subject, law, cases, lambda dtype: lambda case: check(case, measure(subject, case, dtype)))


def search_splits(
    subject: Subject, law: str, cases: Iterable[Case], split: Callable[[int], list[list[int]]]
) -> Verdict:
    """Search for a case whose micro-batches do not add up to the mini-batch."""
    if subject.unsplittable:
        return Verdict(law, DOES_NOT_APPLY, subject.unsplittable)
    smallest_count = 2 if split(2) == [[0], [1]] and len(split(3)) == 3 else 3

    def check(case: Case) -> str:
        if len(case.responses) < smallest_count:
            return ""
        parts = split(len(case.responses))
        whole = Whole(len(case.responses), case.num_tokens, len(parts))
        total, gradient_BT = 0.0, torch.zeros(len(case.responses), case.width, dtype=torch.float64)
        for rows in parts:
            # A loader leaves out the columns beyond the longest response of the micro-batch.
            part = replace(case, responses=tuple(case.responses[i] for i in rows))
            out = measure(subject, part, whole=whole)
            if out.error:
                return out.error
            total += out.loss
            gradient_BT[rows, : part.width] = out.gradient_BT
        entire = measure(subject, case)
        return describe_unlike(LossOutcome(total, gradient_BT), entire, response_mask(case), rtol=subject.rtol)

    return search(subject, law, cases, check)


def response_mask(case: Case) -> Tensor:
    """Return which places of the padded batch are response tokens, (B, T) bool."""
    return case.tensors(torch.float64).mask_BT


def describe_not_finite(out: LossOutcome) -> str:
    """Describe a loss or a gradient that is not finite."""
    if out.error:
        return out.error
    if not math.isfinite(out.loss):
        return f"the loss is {out.loss}"
    bad = out.gradient_BT[~out.gradient_BT.isfinite()]
    return f"the gradient is {bad[0].item()}" if bad.numel() else ""


def describe_difference(out: LossOutcome, case: Case, expected: list[list[float]], rtol: float) -> str:
    """Describe a gradient that is not `expected` at response tokens and 0 elsewhere."""
    if out.error:
        return out.error
    if not math.isfinite(out.loss):
        return f"the loss is {out.loss}"
    wanted_BT = torch.zeros_like(out.gradient_BT)
    for i, row in enumerate(expected):
        wanted_BT[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return compare_gradients(out.gradient_BT, wanted_BT, rtol)


def describe_unlike(out: LossOutcome, wanted: LossOutcome, mask_BT: Tensor, *, rtol: float) -> str:
    """Describe an outcome that differs from another at response tokens, or has a gradient elsewhere."""
    if out.error or wanted.error:
        return out.error or wanted.error
    if not math.isclose(out.loss, wanted.loss, rel_tol=rtol, abs_tol=rtol * 1e-2):
        return f"the loss is {out.loss:.6g} and not {wanted.loss:.6g}"
    return compare_gradients(out.gradient_BT, torch.where(mask_BT, wanted.gradient_BT, 0.0), rtol)


def compare_gradients(got_BT: Tensor, wanted_BT: Tensor, rtol: float) -> str:
    """Describe the first place at which two gradients differ."""
    wrong_BT = ~torch.isclose(got_BT, wanted_BT, rtol=rtol, atol=rtol * 1e-2)
    if not bool(wrong_BT.any()):
        return ""
    i, t = wrong_BT.nonzero()[0].tolist()
    at = f" of response {i + 1}, token {t + 1}" if got_BT.numel() > 1 else ""
    return f"the gradient{at} is {got_BT[i, t].item():.6g} and not {wanted_BT[i, t].item():.6g}"


def format_numbers(values: Tensor) -> str:
    """Return numbers as text, between commas."""
    return ", ".join(f"{v:.6g}" for v in values.tolist())
