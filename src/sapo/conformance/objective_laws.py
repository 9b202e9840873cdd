"""Laws of an objective itself, beside those of its loss, and the judgement of a user's own before a run begins.

A loss is differentiated by autograd. The trainer instead takes the slope that the objective returns, of tokens it may
cut into slices. These laws hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sapo.conformance.cases import Case, Response, random_cases, single_tokens
from sapo.conformance.laws import FAR, LAWS, NEAR
from sapo.conformance.search import BROKEN, DOES_NOT_APPLY, HELD, Check, Verdict, search, search_each
from sapo.conformance.subjects import Subject, objective_subject
from sapo.objectives import Objective, Surrogate

STEP = 1e-5
"""Step of the finite differences, in log r."""


def surrogate_is_per_token(subject: Subject) -> Verdict:
    """Require one finite value, slope and weight per token, in the dtype of the log-ratios, also without autograd."""

    def check_in(dtype: torch.dtype) -> Check:
        def check(case: Case) -> str:
            tokens = _Batch.of(case, dtype)
            found = tokens.surrogate(subject.objective)
            with torch.no_grad():
                bare = tokens.surrogate(subject.objective)
            for name in ("value", "slope", "weight"):
                numbers_M, bare_M = getattr(found, f"{name}_M"), getattr(bare, f"{name}_M")
                if wrong := _malformed(numbers_M, bare_M, tokens.log_ratio_M):
                    return f"the {name} {wrong}"
                if name != "value" and numbers_M.requires_grad:
                    return f"the {name} has a gradient"
            return ""

        return _guarded(check)

    far = [Case((Response(a, (0.1, z)), Response(-a, (0.2,)))) for z in FAR for a in (1.0, -1.0, 0.0)]
    cases = [*single_tokens(NEAR), *far, *random_cases(10)]
    return search_each(subject, "surrogate_is_per_token", cases, check_in)


def slope_is_the_derivative(subject: Subject) -> Verdict:
    """Require that the slope is the derivative of the value by autograd, under weights constant within a sequence."""

    def check(case: Case) -> str:
        tokens = _Batch.of(case, torch.float64)
        found = tokens.surrogate(subject.objective)
        weights_M = 1 + 0.5 * tokens.sequence_M.double()
        derivative_M = torch.zeros_like(weights_M)
        if found.value_M.requires_grad:
            (derivative_M,) = torch.autograd.grad((weights_M * found.value_M).sum(), tokens.log_ratio_M)
        return _first_unequal("slope", found.slope_M, "the derivative of the value", derivative_M / weights_M)

    cases = [*single_tokens((*NEAR, *FAR), (1.0, -1.0, 0.5)), *random_cases(40)]
    return search(subject, "slope_is_the_derivative", cases, _guarded(check))


def value_integrates_the_slope(subject: Subject) -> Verdict:
    """Require that the slope is the derivative of the value by finite differences, from the left or the right.

    A value with a stopped gradient, as in -sg(w) A log pi, breaks this law. Its loss is not what is minimised.
    """

    def check(case: Case) -> str:
        tokens = _Batch.of(case, torch.float64)
        below, here, above = (
            tokens.moved(by).surrogate(subject.objective).value_M.detach() for by in (-STEP, 0.0, STEP)
        )
        slope_M = tokens.surrogate(subject.objective).slope_M
        differences = [(here - below) / STEP, (above - here) / STEP]
        nearest_M = min(differences, key=lambda d: float((d - slope_M).abs().sum()))
        return _first_unequal("slope", slope_M, "the finite difference of the value", nearest_M, tolerance=1e-3)

    return search(subject, "value_integrates_the_slope", single_tokens(NEAR, (1.0, -1.0, 0.5)), _guarded(check))


def uncoupled_tokens_are_independent(subject: Subject) -> Verdict:
    """Require that a token has the same value, slope and weight alone as among others, unless `coupled` is set."""
    law = "uncoupled_tokens_are_independent"
    if subject.objective.coupled:
        return Verdict(law, DOES_NOT_APPLY, "it couples the tokens of a sequence")

    def check(case: Case) -> str:
        tokens = _Batch.of(case, torch.float64)
        together = tokens.surrogate(subject.objective)
        for m in range(len(tokens.sequence_M)):
            alone = tokens.at(m).surrogate(subject.objective)
            for name in ("value_M", "slope_M", "weight_M"):
                here, there = getattr(together, name).detach()[m : m + 1], getattr(alone, name).detach()
                if wrong := _first_unequal(name.removesuffix("_M"), here, "that of the token alone", there, first=m):
                    return f"{wrong}; set coupled to True if the tokens of a sequence are gated together"
        return ""

    return search(subject, law, random_cases(20), _guarded(check))


OBJECTIVE_LAWS: dict[str, Callable[[Subject], Verdict]] = {
    law.__name__: law
    for law in (
        surrogate_is_per_token,
        slope_is_the_derivative,
        value_integrates_the_slope,
        uncoupled_tokens_are_independent,
    )
}
"""The laws of objectives by name."""

REQUIRED = frozenset(
    {
        "surrogate_is_per_token",
        "slope_is_the_derivative",
        "uncoupled_tokens_are_independent",
        "finite_far_off_policy",
        "no_gradient_without_advantage",
        "padding_is_not_read",
        "padding_adds_nothing",
        "order_changes_nothing",
        "equal_microbatches_add_up",
        "unequal_microbatches_add_up",
        "an_empty_response_counts",
        "no_tokens_no_gradient",
        "nan_is_not_hidden",
    }
)
"""Laws that a run relies on, and so refuses an objective that breaks one. The others are matters of design: the weight
at r = 1, the refusal of a temperature, a value that is no integral, a formula of the paper."""


@dataclass(frozen=True)
class Judgement:
    """The verdicts of all laws on one objective.

    >>> judge_objective("sapo").refusal is None
    True
    """

    name: str
    """The objective as a recipe names it."""
    objective: Objective
    verdicts: tuple[Verdict, ...]

    @property
    def refused_by(self) -> list[Verdict]:
        """Return the broken laws that a run relies on."""
        return [v for v in self.verdicts if v.status == BROKEN and v.law in REQUIRED]

    @property
    def broken_by_design(self) -> list[Verdict]:
        """Return the broken laws that are a matter of design."""
        return [v for v in self.verdicts if v.status == BROKEN and v.law not in REQUIRED]

    @property
    def refusal(self) -> str | None:
        """Return in one line why no run may use the objective; None where one may."""
        if not self.refused_by:
            return None
        more = [v.law for v in self.refused_by[1:]]
        also = f"; it also breaks {', '.join(more)}" if more else ""
        way_out = f"correct {type(self.objective).__name__}; `sapo train RECIPE --dry-run` lists every law"
        return f"objective {self.name} breaks the law {self.refused_by[0]}{also}; {way_out}"

    def lines(self) -> list[str]:
        """Say which laws hold, which are broken and which do not apply."""
        held = [v.law for v in self.verdicts if v.status == HELD]
        others = [f"{v.law} ({v.detail})" for v in self.verdicts if v.status == DOES_NOT_APPLY]
        return [
            f"objective {self.name}, {self.objective!r}, by the laws of conformance:",
            f"  held: {', '.join(held) or 'none'}",
            *(f"  broken: {v}" for v in self.refused_by),
            *(f"  broken, a matter of design: {v}" for v in self.broken_by_design),
            f"  does not apply: {', '.join(others) or 'none'}",
        ]


def judge_objective(name: str, hyper: dict[str, Any] | None = None) -> Judgement:
    """Hold all laws, those of its loss and its own, against an objective.

    Args:
        name: a name in OBJECTIVES, or `module:Class`.
        hyper: its hyperparameters.

    Raises:
        ValueError: no such objective, or a wrong hyperparameter.
    """
    subject = objective_subject(name, hyper)
    laws = {**OBJECTIVE_LAWS, **LAWS}
    return Judgement(name, subject.objective, tuple(law(subject) for law in laws.values()))


@dataclass(frozen=True)
class _Batch:
    """The response tokens of a case, flat, as an objective takes them."""

    log_ratio_M: Tensor
    advantages_M: Tensor
    sequence_M: Tensor
    num_sequences: int
    old_logprob_M: Tensor

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> _Batch:
        """Flatten a case; the log-ratios collect gradient."""
        batch = case.tensors(dtype)
        sequence_M, old_M = batch.mask_BT.nonzero()[:, 0], batch.logp_old_BT[batch.mask_BT]
        log_ratio_M = (batch.logp_BT.detach()[batch.mask_BT] - old_M).requires_grad_()
        return cls(log_ratio_M, batch.advantages_B[sequence_M], sequence_M, len(case.responses), old_M)

    def moved(self, by: float) -> _Batch:
        """Return the same tokens at other log-ratios, pi_old unchanged."""
        moved_M = (self.log_ratio_M.detach() + by).requires_grad_()
        return _Batch(moved_M, self.advantages_M, self.sequence_M, self.num_sequences, self.old_logprob_M)

    def at(self, m: int) -> _Batch:
        """Return token m alone, as a slice of the trainer's has it."""
        log_ratio, advantage, sequence, old = (
            x[m : m + 1] for x in (self.log_ratio_M.detach(), self.advantages_M, self.sequence_M, self.old_logprob_M)
        )
        return _Batch(log_ratio, advantage, sequence, self.num_sequences, old)

    def surrogate(self, objective: Objective) -> Surrogate:
        """Evaluate an objective on these tokens."""
        return objective.surrogate(
            self.log_ratio_M, self.advantages_M, self.sequence_M, self.num_sequences, self.old_logprob_M
        )


def _guarded(check: Check) -> Check:
    """Return a check that describes an error raised by the objective in place of raising it."""

    @wraps(check)
    def guarded(case: Case) -> str:
        try:
            return check(case)
        except Exception as error:  # any error of a user's objective is its outcome
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    return guarded


def _malformed(numbers_M: Tensor, bare_M: Tensor, like_M: Tensor) -> str:
    """Describe numbers that are not one per token, finite, and the same without autograd."""
    if numbers_M.shape != like_M.shape or numbers_M.dtype != like_M.dtype:
        wanted = f"{tuple(like_M.shape)} {like_M.dtype}".replace("torch.", "")
        return f"is {tuple(numbers_M.shape)} {numbers_M.dtype} and not {wanted}".replace("torch.", "")
    if not bool(numbers_M.isfinite().all()):
        return f"is {numbers_M[~numbers_M.isfinite()][0].item()}"
    if not torch.equal(numbers_M.detach(), bare_M.detach()):
        return "has other values without autograd"
    return ""


def _first_unequal(
    what: str, got_M: Tensor, other: str, wanted_M: Tensor, *, tolerance: float = 1e-6, first: int = 0
) -> str:
    """Describe the first token at which two sets of numbers differ; `first` is the place of the first of them."""
    got, wanted = got_M.detach().double(), wanted_M.detach().double()
    wrong_M = ~torch.isclose(got, wanted, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)
    if not bool(wrong_M.any()):
        return ""
    m = int(wrong_M.nonzero()[0, 0])
    return f"the {what} of token {first + m + 1} is {got[m].item():.6g}, {other} {wanted[m].item():.6g}"
