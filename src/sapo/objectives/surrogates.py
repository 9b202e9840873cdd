"""What every objective returns, and the bounds all of them share.

An objective turns log-ratios and advantages of M response tokens into a `Surrogate`: for each token a value to
maximise, the slope of that value and the gate weight. Weights of the loss are constant within a sequence
(sapo.objectives.normalizers), and under that contract

    loss = -(weights_B[sequence_M] * value_M).sum(),     d loss / d log pi_m = -weights_B[sequence_M][m] * slope_m,

also for objectives that couple the tokens of a sequence, where `slope` already gathers what token m gives the others.
The value is differentiable by autograd with the same result, so that each is held against the other in the tests.

An objective published as a loss -sg(w) A log pi has w A as its slope, and as its value the integral of that slope: the
value of the published loss has no such derivative.

Departure from the papers: the log-ratio is bounded before exp(), see LOG_RATIO_LIMIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on |log r| before exp(). A mismatch between trainer and sampler must not overflow: in float32 exp(89) is inf,
and inf times a gate weight of 0, or an advantage of 0, is NaN. exp(20) = 4.9e8 is beyond any ratio that teaches.
Farther out the value is constant and the slope exactly 0, for autograd and closed form alike; the gate weight is that
of the bound."""


@dataclass(frozen=True)
class Surrogate:
    """What an objective makes of M tokens; all (M,), in the dtype of the log-ratios.

    On policy (r = 1) with A = 0.5, SAPO at tau = 1 gives

    >>> import torch
    >>> on_policy = Surrogate(value_M=torch.tensor([1.0]), slope_M=torch.tensor([0.5]), weight_M=torch.tensor([1.0]))
    >>> on_policy.slope_M.item()
    0.5
    """

    value_M: Tensor
    """f(r) A, to be maximised; differentiable in the log-ratios."""
    slope_M: Tensor
    """Coefficient on grad log pi of this token: f'(r) r A for token gates. No gradient."""
    weight_M: Tensor
    """The gate weight f', 1 at r = 1. No gradient."""


class Objective(Protocol):
    """A frozen dataclass of hyperparameters with one method."""

    name: ClassVar[str]
    coupled: ClassVar[bool]
    """True when the slope of a token depends on the other tokens of its sequence."""
    shared_advantage: ClassVar[bool]
    """True when the objective is defined only for one advantage per sequence."""
    needs_old_logprob: ClassVar[bool]
    """True when the gate depends on pi_old itself, and not only on the ratio: `old_logprob_M` is then required."""
    normalizer: ClassVar[str]
    """The name in NORMALIZERS that its source uses: what a caller gets who names none."""
    advantage: ClassVar[str]
    """The name in ADVANTAGES that its source uses, likewise."""

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Value, slope and weight of each token.

        Args:
            log_ratio_M: log pi_theta - log pi_old of each response token, (M,); the value is differentiable in it.
                A NaN comes out as NaN, so that the trainer can stop on it.
            advantages_M: advantage of each token, (M,); no gradient flows into it.
            sequence_M: sequence of each token, int64 in [0, num_sequences).
            num_sequences: how many sequences there are, empty ones included.
            old_logprob_M: log pi_old of each token, (M,), a constant: pi = pi_old r, so that probabilities can be had
                from it and the ratio, and the value stays a function of the log-ratios alone. Read by objectives
                that need it; the others take it from a caller who does not ask which they are.

        Raises:
            ValueError: `old_logprob_M` left out of an objective that needs it.
        """
        ...


def require_old_logprob(name: str, old_logprob_M: Tensor | None) -> Tensor:
    """pi_old of each token in float64, without gradient.

    Raises:
        ValueError: it was left out.
    """
    if old_logprob_M is None:
        raise ValueError(
            f"{name} gates a token by its probability, so log pi_old must be given; got None; pass old_logprob_M "
            "(gate_weight: logp_old_BT)"
        )
    return old_logprob_M.detach().double().exp()


def bound_log_ratio(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The log-ratio in float64 within LOG_RATIO_LIMIT, and where it was within it already.

    Written with where() and not clamp() alone, so that the gradient is exactly 0 beyond the limit, 1 at it, and a NaN
    stays a NaN in value and in gradient.
    """
    log_ratio = log_ratio.double()
    beyond = log_ratio.abs() > LOG_RATIO_LIMIT
    limit = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(beyond, limit, log_ratio), ~beyond


def choose_temperature(advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """tau_pos where A > 0, tau_neg where A <= 0, equation (6); in the dtype and shape of the advantages."""
    return torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)


def make_surrogate(value: Tensor, slope: Tensor, weight: Tensor, inside: Tensor, dtype: torch.dtype) -> Surrogate:
    """Settles what all objectives share: no slope beyond the limit, no weight for a NaN, the caller's dtype."""
    slope = torch.where(inside, slope, torch.zeros_like(slope)).detach()
    # A comparison with NaN is False, so a clip would call a NaN "inside the band": say NaN instead.
    weight = torch.where(value.isnan(), torch.full_like(weight, torch.nan), weight).detach()
    return Surrogate(value.to(dtype), slope.to(dtype), weight.to(dtype))
