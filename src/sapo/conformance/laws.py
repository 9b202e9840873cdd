"""The laws that a policy loss should obey, each a function from a subject to a verdict: held, broken or does not apply.

A broken law comes with the smallest case found that breaks it. Cases are the same in every run: first single tokens,
from near to far off policy, then ragged batches drawn from a fixed seed. `objective_laws` has further laws, for
objectives alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace

import torch

from sapo.conformance import reference
from sapo.conformance.cases import Case, Response, random_cases, single_tokens
from sapo.conformance.search import (
    BROKEN,
    DOES_NOT_APPLY,
    HELD,
    Check,
    Verdict,
    describe_difference,
    describe_not_finite,
    describe_unlike,
    format_numbers,
    response_mask,
    search,
    search_dtypes,
    search_each,
    search_splits,
)
from sapo.conformance.subjects import MAX_LENGTH, LossOutcome, Subject, measure

NEAR = (0.0, 0.1, -0.1, 0.3, -0.3, 1.0, -1.0, 2.0, -2.0)
"""Log-ratios at which a gradient is compared with its formula."""
FAR = (50.0, -50.0, 100.0, -100.0)
"""Log-ratios of a mismatch between trainer and sampler; exp(89) overflows in float32."""
GARBAGE = (100.0, math.inf, math.nan, -100.0, -math.inf)
"""Contents of padded places, as log-ratios."""
RANDOM_CASES = 40
"""Number of ragged batches that a law is tried on after the single tokens."""


def gradient_is_the_papers(subject: Subject) -> Verdict:
    """Require that the gradient in log pi of a token is minus its normalizer weight times the objective's slope."""

    if subject.objective.name not in reference.SLOPES:
        return Verdict("gradient_is_the_papers", DOES_NOT_APPLY, "conformance.reference has no formula for it")

    def check(case: Case) -> str:
        expected = reference.gradient(case, subject.objective, subject.normalizer, MAX_LENGTH)
        return describe_difference(measure(subject, case), case, expected, subject.rtol)

    return search(subject, "gradient_is_the_papers", [*single_tokens(NEAR), *random_cases(RANDOM_CASES)], check)


def weight_is_one_on_policy(subject: Subject) -> Verdict:
    """Require the plain policy gradient at pi = pi_old, at any temperature and with any clip."""

    def check_with(hyper: dict[str, float]) -> Check:
        variant = replace(subject, loss=subject.remake(hyper)) if hyper and subject.remake else subject
        suffix = "".join(f", {name} = {value:g}" for name, value in hyper.items())

        def check(case: Case) -> str:
            expected = [[-_weight(subject, case, r) * r.advantage] * len(r.log_ratios) for r in case.responses]
            wrong = describe_difference(measure(variant, case), case, expected, subject.rtol)
            return wrong + suffix if wrong else ""

        return check

    found = Verdict("weight_is_one_on_policy", HELD)
    for hyper in ({}, *(dict.fromkeys(_shape_settings(subject), factor) for factor in (0.25, 4.0))):
        cases = [_on_policy(c) for c in (*single_tokens((0.0,)), *random_cases(10))]
        found = search(subject, found.law, cases, check_with(hyper))
        if found.status == BROKEN:
            break
    return found


def finite_far_off_policy(subject: Subject) -> Verdict:
    """Require a finite loss and a finite gradient where the log-ratio of a token is 100, in float32 too."""
    neighbours = [
        Case((Response(a, (0.1, z)), Response(-a, (0.2,)))) for z in FAR for a in (1.0, -1.0)
    ]  # fmt: skip
    cases = [*single_tokens(FAR, (1.0, -1.0, 0.0)), *neighbours]
    return search_dtypes(subject, "finite_far_off_policy", cases, lambda case, out: describe_not_finite(out))


def no_gradient_without_advantage(subject: Subject) -> Verdict:
    """Require a gradient of exactly 0 for a response whose advantage is 0, near the old policy and far from it."""
    cases = single_tokens((*NEAR, *FAR), (0.0,))
    cases += [Case((Response(0.0, (z, 0.1)), Response(1.0, (0.1,)))) for z in (*NEAR, *FAR)]

    def check(case: Case, out: LossOutcome) -> str:
        if out.error:
            return out.error
        for i, response in enumerate(case.responses):
            if response.advantage == 0 and bool((out.gradient_BT[i] != 0).any()):  # NaN != 0 too
                return f"the gradient is {format_numbers(out.gradient_BT[i, : len(response.log_ratios)])} and not 0"
        return ""

    return search_dtypes(subject, "no_gradient_without_advantage", cases, check)


def padding_is_not_read(subject: Subject) -> Verdict:
    """Require the same loss and gradient whatever padded places hold, NaN and inf included."""

    def check_in(dtype: torch.dtype) -> Check:
        def check(case: Case) -> str:
            dirty = measure(subject, case, dtype)
            clean = measure(subject, replace(case, filler=0.0), dtype)
            return describe_unlike(dirty, clean, response_mask(case), rtol=0)

        return check

    batches = [Case((Response(1.0, (0.1,)), Response(-1.0, (-0.1, 0.3, 0.1))))]
    cases = [replace(c, padding=1, filler=g) for g in GARBAGE for c in (*single_tokens((0.0,)), *batches)]
    return search_each(subject, "padding_is_not_read", cases, check_in)


def padding_adds_nothing(subject: Subject) -> Verdict:
    """Require the same loss and gradient with more columns of padding."""

    def check(case: Case) -> str:
        narrow, wide = measure(subject, replace(case, padding=0)), measure(subject, case)
        padded_BT = torch.zeros_like(wide.gradient_BT)
        padded_BT[:, : narrow.gradient_BT.shape[1]] = narrow.gradient_BT
        return describe_unlike(
            wide, replace(narrow, gradient_BT=padded_BT), torch.ones_like(padded_BT).bool(), rtol=subject.rtol
        )

    cases = [replace(c, padding=p) for p in (1, 5) for c in (*single_tokens((0.0, 0.1)), *random_cases(10))]
    return search(subject, "padding_adds_nothing", cases, check)


def order_changes_nothing(subject: Subject) -> Verdict:
    """Require the same loss and gradients in any order of the responses."""

    def check(case: Case) -> str:
        turned = measure(subject, replace(case, responses=case.responses[::-1]))
        turned = replace(turned, gradient_BT=turned.gradient_BT.flip(0))
        return describe_unlike(turned, measure(subject, case), response_mask(case), rtol=subject.rtol)

    return search(subject, "order_changes_nothing", random_cases(20, responses=(2, 4)), check)


def equal_microbatches_add_up(subject: Subject) -> Verdict:
    """Require that micro-batches of one response each add up to the loss and gradient of the mini-batch."""
    cases = [Case((Response(1.0, (0.0,)), Response(-1.0, (0.0, 0.0)))), *random_cases(20, responses=(2, 4))]
    return search_splits(subject, "equal_microbatches_add_up", cases, lambda n: [[i] for i in range(n)])


def unequal_microbatches_add_up(subject: Subject) -> Verdict:
    """Require that micro-batches of unequal size add up to the loss and gradient of the mini-batch."""
    cases = [Case((Response(1.0, (0.0,)),) * 2 + (Response(-1.0, (0.0,)),)), *random_cases(20, responses=(3, 4))]
    return search_splits(subject, "unequal_microbatches_add_up", cases, lambda n: [[0], list(range(1, n))])


def an_empty_response_counts(subject: Subject) -> Verdict:
    """Require that a response without response tokens counts in the denominators, since it was sampled."""

    def check(case: Case) -> str:
        rest = replace(case, responses=tuple(r for r in case.responses if r.log_ratios))
        if not 0 < len(rest.responses) < len(case.responses):
            return ""
        without, rows = measure(subject, rest), []
        for response, gradient in zip(rest.responses, without.gradient_BT.tolist(), strict=True):
            scale = _weight(subject, case, response) / _weight(subject, rest, response)
            rows.append([scale * g for g in gradient[: len(response.log_ratios)]])
        expected = iter(rows)
        wanted = [next(expected) if r.log_ratios else [] for r in case.responses]
        return without.error or describe_difference(measure(subject, case), case, wanted, subject.rtol)

    empty = Response(1.0, ())
    cases = [Case((*c.responses, empty)) for c in (*single_tokens((0.0,)), *random_cases(10))]
    return search(subject, "an_empty_response_counts", cases, check)


def no_tokens_no_gradient(subject: Subject) -> Verdict:
    """Require a finite loss and a gradient of 0 for a batch without any response token."""

    def check(case: Case, out: LossOutcome) -> str:
        return describe_not_finite(out) or ("the gradient is not 0" if bool((out.gradient_BT != 0).any()) else "")

    cases = [Case((Response(a, ()),) * rows) for a in (1.0, -1.0) for rows in (1, 2)]
    return search_dtypes(subject, "no_tokens_no_gradient", cases, check)


def nan_is_not_hidden(subject: Subject) -> Verdict:
    """Require a loss of NaN where a response token is NaN, so that the run can stop on it."""

    def check(case: Case) -> str:
        out = measure(subject, case)
        return "" if out.error or math.isnan(out.loss) else f"the loss is {out.loss:g}"

    return search(subject, "nan_is_not_hidden", single_tokens((math.nan,)), check, simplify=False)


def refuses_a_temperature_of_zero_or_less(subject: Subject) -> Verdict:
    """Require an error for a temperature tau <= 0: at 0 the gate divides by 0, below 0 it grows with the drift."""
    law = "refuses_a_temperature_of_zero_or_less"
    names = [f.name for f in fields(subject.objective) if f.name.startswith("tau_")]
    if not names:
        return Verdict(law, DOES_NOT_APPLY, "no temperature")
    if subject.remake is None:
        return Verdict(law, DOES_NOT_APPLY, "its temperature cannot be set")
    accepted = []
    for name in names:
        for bad in (0.0, -1.0):
            try:
                made = replace(subject, loss=subject.remake({name: bad}))
            except Exception:  # any refusal will do
                continue
            if any(measure(made, case).error for case in single_tokens((0.0, 0.1))):
                continue
            accepted.append(f"{name} = {bad:g}")
    return Verdict(law, BROKEN, f"accepts {', '.join(accepted)}") if accepted else Verdict(law, HELD)


LAWS: dict[str, Callable[[Subject], Verdict]] = {
    law.__name__: law
    for law in (
        gradient_is_the_papers,
        weight_is_one_on_policy,
        finite_far_off_policy,
        no_gradient_without_advantage,
        padding_is_not_read,
        padding_adds_nothing,
        order_changes_nothing,
        equal_microbatches_add_up,
        unequal_microbatches_add_up,
        an_empty_response_counts,
        no_tokens_no_gradient,
        nan_is_not_hidden,
        refuses_a_temperature_of_zero_or_less,
    )
}
"""The laws by name."""


def judge(subject: Subject, laws: Iterable[str] = LAWS) -> list[Verdict]:
    """Hold laws against a subject.

    >>> from sapo.conformance.subjects import own_subjects
    >>> [verdict.status for verdict in judge(own_subjects(["sapo"])[0], ["finite_far_off_policy"])]
    ['held']
    """
    return [LAWS[law](subject) for law in laws]


def _weight(subject: Subject, case: Case, response: Response) -> float:
    return reference.token_weight(case, response, subject.normalizer, MAX_LENGTH)


def _on_policy(case: Case) -> Case:
    return replace(case, responses=tuple(replace(r, log_ratios=(0.0,) * len(r.log_ratios)) for r in case.responses))


def _shape_settings(subject: Subject) -> list[str]:
    """Return the settings that widen or narrow a soft gate, and must not change its weight at r = 1."""
    if subject.remake is None:
        return []
    names = [f.name for f in fields(subject.objective)]
    return [n for n in names if n.startswith(("tau_", "lambda_", "k_")) or n == "sigma"]
