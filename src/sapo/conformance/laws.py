"""The laws a policy loss should obey, each a function of a subject that says held, broken or does not apply.

A broken law comes with the smallest case found that breaks it. Cases are the same in every run: first single tokens,
from plain to far, then ragged batches drawn from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

import torch
from torch import Tensor

from sapo.conformance import reference
from sapo.conformance.cases import Case, Response, random_cases, shrink, single_tokens
from sapo.conformance.subjects import MAX_LENGTH, Outcome, Subject, Whole, measure

HELD: Final = "held"
BROKEN: Final = "broken"
DOES_NOT_APPLY: Final = "does not apply"

NEAR = (0.0, 0.1, -0.1, 0.3, -0.3, 1.0, -1.0, 2.0, -2.0)
"""Log-ratios at which a gradient is compared with its formula."""
FAR = (50.0, -50.0, 100.0, -100.0)
"""Log-ratios of a mismatch between trainer and sampler; exp(89) is the first that float32 cannot hold."""
GARBAGE = (100.0, math.inf, math.nan, -100.0, -math.inf)
"""What padded places may hold, as log-ratios."""
RANDOM_CASES = 40


@dataclass(frozen=True)
class Verdict:
    """What a law says of a subject.

    Verdict("finite_far_off_policy", "broken", "the gradient is nan", Case((Response(1.0, (89.0,)),)))
    """

    law: str
    status: Literal["held", "broken", "does not apply"]
    detail: str = ""
    """What went wrong at the counter-example, or why the law does not apply."""
    counterexample: Case | None = None


Check = Callable[[Case], str]
"""Empty where the law holds for a case, otherwise what is wrong."""


def gradient_is_the_papers(subject: Subject) -> Verdict:
    """The gradient in log pi of each token is minus its weight in the normaliser times the objective's slope."""

    def check(case: Case) -> str:
        expected = reference.gradient(case, subject.objective, subject.normalizer, MAX_LENGTH)
        return _differs(measure(subject, case), case, expected, subject.rtol)

    return _search(subject, "gradient_is_the_papers", [*single_tokens(NEAR), *random_cases(RANDOM_CASES)], check)


def weight_is_one_on_policy(subject: Subject) -> Verdict:
    """At pi = pi_old the gradient is that of the plain policy gradient, whatever the temperature or the clip."""

    def check_with(hyper: dict[str, float]) -> Check:
        variant = replace(subject, loss=subject.remake(hyper)) if hyper and subject.remake else subject
        suffix = "".join(f", {name} = {value:g}" for name, value in hyper.items())

        def check(case: Case) -> str:
            expected = [[-_weight(subject, case, r) * r.advantage] * len(r.log_ratios) for r in case.responses]
            wrong = _differs(measure(variant, case), case, expected, subject.rtol)
            return wrong + suffix if wrong else ""

        return check

    found = Verdict("weight_is_one_on_policy", HELD)
    for hyper in ({}, *(dict.fromkeys(_shape_settings(subject), factor) for factor in (0.25, 4.0))):
        cases = [_on_policy(c) for c in (*single_tokens((0.0,)), *random_cases(10))]
        found = _search(subject, found.law, cases, check_with(hyper))
        if found.status == BROKEN:
            break
    return found


def finite_far_off_policy(subject: Subject) -> Verdict:
    """A token whose log-ratio is 100 leaves the loss and every gradient finite, in float32 too."""
    neighbours = [
        Case((Response(a, (0.1, z)), Response(-a, (0.2,)))) for z in FAR for a in (1.0, -1.0)
    ]  # fmt: skip
    cases = [*single_tokens(FAR, (1.0, -1.0, 0.0)), *neighbours]
    return _search_dtypes(subject, "finite_far_off_policy", cases, lambda case, out: _not_finite(out))


def no_gradient_without_advantage(subject: Subject) -> Verdict:
    """A response whose advantage is 0 gets a gradient of exactly 0, near the old policy and far from it."""
    cases = single_tokens((*NEAR, *FAR), (0.0,))
    cases += [Case((Response(0.0, (z, 0.1)), Response(1.0, (0.1,)))) for z in (*NEAR, *FAR)]

    def check(case: Case, out: Outcome) -> str:
        if out.error:
            return out.error
        for i, response in enumerate(case.responses):
            if response.advantage == 0 and bool((out.gradient_BT[i] != 0).any()):  # NaN != 0 too
                return f"the gradient is {_numbers(out.gradient_BT[i, : len(response.log_ratios)])} and not 0"
        return ""

    return _search_dtypes(subject, "no_gradient_without_advantage", cases, check)


def padding_is_not_read(subject: Subject) -> Verdict:
    """Whatever padded places hold, NaN and inf included, loss and gradient are as if they held zeros."""

    def check_in(dtype: torch.dtype) -> Check:
        def check(case: Case) -> str:
            dirty = measure(subject, case, dtype)
            return _unlike(dirty, measure(subject, replace(case, filler=0.0), dtype), _mask(case), rtol=0)

        return check

    batches = [Case((Response(1.0, (0.1,)), Response(-1.0, (-0.1, 0.3, 0.1))))]
    cases = [replace(c, padding=1, filler=g) for g in GARBAGE for c in (*single_tokens((0.0,)), *batches)]
    return _search_each(subject, "padding_is_not_read", cases, check_in)


def padding_adds_nothing(subject: Subject) -> Verdict:
    """More columns of padding change neither loss nor gradient."""

    def check(case: Case) -> str:
        narrow, wide = measure(subject, replace(case, padding=0)), measure(subject, case)
        padded_BT = torch.zeros_like(wide.gradient_BT)
        padded_BT[:, : narrow.gradient_BT.shape[1]] = narrow.gradient_BT
        return _unlike(
            wide, replace(narrow, gradient_BT=padded_BT), torch.ones_like(padded_BT).bool(), rtol=subject.rtol
        )

    cases = [replace(c, padding=p) for p in (1, 5) for c in (*single_tokens((0.0, 0.1)), *random_cases(10))]
    return _search(subject, "padding_adds_nothing", cases, check)


def order_changes_nothing(subject: Subject) -> Verdict:
    """The order of the responses changes neither the loss nor the gradient of any."""

    def check(case: Case) -> str:
        turned = measure(subject, replace(case, responses=case.responses[::-1]))
        turned = replace(turned, gradient_BT=turned.gradient_BT.flip(0))
        return _unlike(turned, measure(subject, case), _mask(case), rtol=subject.rtol)

    return _search(subject, "order_changes_nothing", random_cases(20, responses=(2, 4)), check)


def equal_microbatches_add_up(subject: Subject) -> Verdict:
    """Micro-batches of one response each add up to the loss and gradient of the mini-batch."""
    cases = [Case((Response(1.0, (0.0,)), Response(-1.0, (0.0, 0.0)))), *random_cases(20, responses=(2, 4))]
    return _splits(subject, "equal_microbatches_add_up", cases, lambda n: [[i] for i in range(n)])


def unequal_microbatches_add_up(subject: Subject) -> Verdict:
    """Micro-batches of unequal numbers of responses add up to the loss and gradient of the mini-batch."""
    cases = [Case((Response(1.0, (0.0,)),) * 2 + (Response(-1.0, (0.0,)),)), *random_cases(20, responses=(3, 4))]
    return _splits(subject, "unequal_microbatches_add_up", cases, lambda n: [[0], list(range(1, n))])


def an_empty_response_counts(subject: Subject) -> Verdict:
    """A response without response tokens was sampled: it stays in the denominators and gets no gradient."""

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
        return without.error or _differs(measure(subject, case), case, wanted, subject.rtol)

    empty = Response(1.0, ())
    cases = [Case((*c.responses, empty)) for c in (*single_tokens((0.0,)), *random_cases(10))]
    return _search(subject, "an_empty_response_counts", cases, check)


def no_tokens_no_gradient(subject: Subject) -> Verdict:
    """A batch without any response token has a finite loss and a gradient of 0."""

    def check(case: Case, out: Outcome) -> str:
        return _not_finite(out) or ("the gradient is not 0" if bool((out.gradient_BT != 0).any()) else "")

    cases = [Case((Response(a, ()),) * rows) for a in (1.0, -1.0) for rows in (1, 2)]
    return _search_dtypes(subject, "no_tokens_no_gradient", cases, check)


def nan_is_not_hidden(subject: Subject) -> Verdict:
    """A NaN at a response token comes out of the loss as NaN, so that the run can stop on it."""

    def check(case: Case) -> str:
        out = measure(subject, case)
        return "" if out.error or math.isnan(out.loss) else f"the loss is {out.loss:g}"

    return _search(subject, "nan_is_not_hidden", single_tokens((math.nan,)), check, simplify=False)


def refuses_a_temperature_of_zero_or_less(subject: Subject) -> Verdict:
    """A temperature tau <= 0 is refused: at 0 the gate divides by 0, below it the gate grows with the drift."""
    law = "refuses_a_temperature_of_zero_or_less"
    names = [f.name for f in fields(subject.objective) if f.name.startswith("tau_")]  # type: ignore[arg-type]
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
"""Every law by its name."""


def judge(subject: Subject, laws: Iterable[str] = LAWS) -> list[Verdict]:
    """What each law says of the subject.

    >>> from sapo.conformance.subjects import own_subjects
    >>> [verdict.status for verdict in judge(own_subjects(["sapo"])[0], ["finite_far_off_policy"])]
    ['held']
    """
    return [LAWS[law](subject) for law in laws]


def _search(
    subject: Subject, law: str, cases: Iterable[Case], check: Check, *, simplify: bool = True, suffix: str = ""
) -> Verdict:
    """Held when no case breaks the law; otherwise the first that does, made smaller."""
    for case in cases:
        if check(case):
            smallest = shrink(case, lambda c: bool(check(c))) if simplify else case
            return Verdict(law, BROKEN, check(smallest) + suffix, smallest)
    return Verdict(law, HELD)


def _search_each(subject: Subject, law: str, cases: list[Case], check_in: Callable[[torch.dtype], Check]) -> Verdict:
    """The same in every dtype the subject computes in, the coarsest first; a breach says in which it was found."""
    found = Verdict(law, HELD)
    for dtype in reversed(subject.dtypes):
        found = _search(subject, law, cases, check_in(dtype), suffix=f" ({str(dtype).removeprefix('torch.')})")
        if found.status == BROKEN:
            break
    return found


def _search_dtypes(subject: Subject, law: str, cases: list[Case], check: Callable[[Case, Outcome], str]) -> Verdict:
    return _search_each(subject, law, cases, lambda dtype: lambda case: check(case, measure(subject, case, dtype)))


def _splits(subject: Subject, law: str, cases: Iterable[Case], split: Callable[[int], list[list[int]]]) -> Verdict:
    """The sum over micro-batches against the mini-batch."""
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
            # Columns beyond the longest response of the micro-batch are left out, as a loader would.
            part = replace(case, responses=tuple(case.responses[i] for i in rows))
            out = measure(subject, part, whole=whole)
            if out.error:
                return out.error
            total += out.loss
            gradient_BT[rows, : part.width] = out.gradient_BT
        entire = measure(subject, case)
        return _unlike(Outcome(total, gradient_BT), entire, _mask(case), rtol=subject.rtol)

    return _search(subject, law, cases, check)


def _weight(subject: Subject, case: Case, response: Response) -> float:
    return reference.token_weight(case, response, subject.normalizer, MAX_LENGTH)


def _on_policy(case: Case) -> Case:
    return replace(case, responses=tuple(replace(r, log_ratios=(0.0,) * len(r.log_ratios)) for r in case.responses))


def _mask(case: Case) -> Tensor:
    return case.tensors(torch.float64).mask_BT


def _not_finite(out: Outcome) -> str:
    if out.error:
        return out.error
    if not math.isfinite(out.loss):
        return f"the loss is {out.loss}"
    bad = out.gradient_BT[~out.gradient_BT.isfinite()]
    return f"the gradient is {bad[0].item()}" if bad.numel() else ""


def _differs(out: Outcome, case: Case, expected: list[list[float]], rtol: float) -> str:
    """What is wrong with a gradient that should be `expected` at response tokens and 0 elsewhere."""
    if out.error:
        return out.error
    if not math.isfinite(out.loss):
        return f"the loss is {out.loss}"
    wanted_BT = torch.zeros_like(out.gradient_BT)
    for i, row in enumerate(expected):
        wanted_BT[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return _compare(out.gradient_BT, wanted_BT, rtol)


def _unlike(out: Outcome, wanted: Outcome, mask_BT: Tensor, *, rtol: float) -> str:
    """What is wrong with an outcome that should equal another at response tokens and have no gradient elsewhere."""
    if out.error or wanted.error:
        return out.error or wanted.error
    if not math.isclose(out.loss, wanted.loss, rel_tol=rtol, abs_tol=rtol * 1e-2):
        return f"the loss is {out.loss:.6g} and not {wanted.loss:.6g}"
    return _compare(out.gradient_BT, torch.where(mask_BT, wanted.gradient_BT, 0.0), rtol)


def _compare(got_BT: Tensor, wanted_BT: Tensor, rtol: float) -> str:
    wrong_BT = ~torch.isclose(got_BT, wanted_BT, rtol=rtol, atol=rtol * 1e-2)
    if not bool(wrong_BT.any()):
        return ""
    i, t = wrong_BT.nonzero()[0].tolist()
    at = f" of response {i + 1}, token {t + 1}" if got_BT.numel() > 1 else ""
    return f"the gradient{at} is {got_BT[i, t].item():.6g} and not {wanted_BT[i, t].item():.6g}"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{v:.6g}" for v in values.tolist())


def _shape_settings(subject: Subject) -> list[str]:
    """The settings that widen or narrow a soft gate and must leave its weight at r = 1 alone."""
    if subject.remake is None:
        return []
    names = [f.name for f in fields(subject.objective)]  # type: ignore[arg-type]
    return [n for n in names if n.startswith(("tau_", "lambda_", "k_")) or n == "sigma"]
