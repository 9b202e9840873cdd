"""The base class of the objectives, the surrogate that each of them returns, and the bounds they share.

An objective turns log-ratios and advantages of M response tokens into a `Surrogate`: a value to maximise, the slope of
that value and the gate weight of each token. The weights of the loss are constant within a sequence
(sapo.objectives.normalizers). Under that contract

    loss = -(weights_B[sequence_M] * value_M).sum(),     d loss / d log pi_m = -weights_B[sequence_M][m] * slope_m.

This holds too for objectives that couple the tokens of a sequence: the slope of token m contains its effect on the
values of the others. Autograd of the value gives the same gradient; the tests compare the two.

Some objectives are published as a loss -sg(w) A log pi. Their slope is w A, and their value is the integral of that
slope over log r. The value of the published loss has another derivative.

Departure from the papers: the log-ratio is bounded before exp(), see LOG_RATIO_LIMIT.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on |log r| before exp(), so that a mismatch between trainer and sampler cannot overflow. In float32 exp(89) is
inf, and inf times a gate weight or an advantage of 0 is NaN. exp(20) = 4.9e8 is beyond any ratio of use in training.
Beyond the bound the value is constant and the slope exactly 0, by autograd and in closed form. The gate weight is that
at the bound."""


@dataclass(frozen=True)
class Surrogate:
    """Value, slope and gate weight of M tokens; all (M,), in the dtype of the log-ratios.

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


@dataclass(frozen=True)
class Tokens:
    """The M response tokens that an objective is evaluated on.

    Two tokens of sequence 0 and one of sequence 1, on policy:

    >>> import torch
    >>> three = Tokens(torch.zeros(3), torch.tensor([0.5, 0.5, -1.0]), torch.tensor([0, 0, 1]), 2)
    >>> three.dtype
    torch.float32
    """

    log_ratio_M: Tensor
    """log pi_theta - log pi_old of each token, in the caller's dtype; the value is differentiable in it."""
    advantages_M: Tensor
    """Advantage of each token; no gradient."""
    sequence_M: Tensor
    """Sequence of each token, int64 in [0, num_sequences)."""
    num_sequences: int
    """Number of sequences, empty ones included."""
    old_probability_M: Tensor | None = None
    """pi_old of each token, float64, no gradient; None unless the objective needs it."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the surrogate: that of the log-ratios."""
        return self.log_ratio_M.dtype


@dataclass(frozen=True)
class Ratios:
    """Bounded ratios of M tokens or of B sequences, with the advantage of each; float64.

    >>> import torch
    >>> Ratios.of(torch.tensor([0.0, 1000.0]), torch.tensor([0.5, -1.0])).log_ratio.tolist()
    [0.0, 20.0]
    """

    log_ratio: Tensor
    """log r within LOG_RATIO_LIMIT; differentiable."""
    ratio: Tensor
    """r = exp(log r); differentiable."""
    advantages: Tensor
    inside: Tensor
    """Where the log-ratio was within the limit already; bool."""
    old_probability: Tensor | None = None
    """pi_old, as in Tokens."""

    @classmethod
    def of(cls, log_ratio: Tensor, advantages: Tensor, old_probability: Tensor | None = None) -> Ratios:
        """Bound log-ratios and put their advantages beside them."""
        bounded, inside = bound_log_ratio(log_ratio)
        return cls(bounded, bounded.exp(), advantages.double(), inside, old_probability)

    @property
    def positive(self) -> Tensor:
        """Return where the advantage is > 0; bool."""
        return self.advantages > 0


Factors = tuple[Tensor, Tensor, Tensor]
"""f(r), its derivative in log r, f'(r) r, and the gate weight f'(r): an objective's value and slope for A = 1."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """Base class of the objectives: a frozen dataclass of hyperparameters with the method `surrogate`.

    A subclass has a `name`, the class variables in which it differs from those below, its hyperparameters as fields
    with defaults, and `evaluate`. Most derive from `token.TokenObjective` or `sequence.SequenceObjective`, which ask
    for `factors` alone.
    """

    name: ClassVar[str]
    coupled: ClassVar[bool] = False
    """True when the slope of a token depends on the other tokens of its sequence."""
    shared_advantage: ClassVar[bool] = False
    """True when the objective is defined only for one advantage per sequence."""
    needs_old_logprob: ClassVar[bool] = False
    """True when the gate depends on pi_old itself, and not only on the ratio: `old_logprob_M` is then required."""
    normalizer: ClassVar[str] = "sequence_mean"
    """The name in NORMALIZERS that its source uses: the default of a caller who names none."""
    advantage: ClassVar[str] = "group_std"
    """The name in ADVANTAGES that its source uses: the default of a caller who names none."""

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Compute value, slope and weight of each token.

        Args:
            log_ratio_M: log pi_theta - log pi_old of each response token, (M,); the value is differentiable in it.
                A NaN comes out as NaN, so that the trainer can stop on it.
            advantages_M: advantage of each token, (M,); no gradient flows into it.
            sequence_M: sequence of each token, int64 in [0, num_sequences).
            num_sequences: number of sequences, empty ones included.
            old_logprob_M: log pi_old of each token, (M,), a constant. Since pi = pi_old r, an objective that gates by
                probability reads it, and its value is still a function of the log-ratios alone. Other objectives
                ignore it.

        Raises:
            ValueError: `old_logprob_M` is missing for an objective that needs it.
        """
        old_M = require_old_logprob(self.name, old_logprob_M) if self.needs_old_logprob else None
        return self.evaluate(Tokens(log_ratio_M, advantages_M.detach(), sequence_M, num_sequences, old_M))

    @abstractmethod
    def evaluate(self, tokens: Tokens) -> Surrogate:
        """Compute the surrogate of some tokens; `make_surrogate` finishes it."""


def require_old_logprob(name: str, old_logprob_M: Tensor | None) -> Tensor:
    """Return pi_old of each token in float64, without gradient.

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
    """Clamp log-ratios to LOG_RATIO_LIMIT, in float64; return also where they were within it already.

    Written with where() and not clamp() alone: the gradient is then exactly 0 beyond the limit and 1 at it, and a NaN
    stays a NaN in value and in gradient.
    """
    log_ratio = log_ratio.double()
    beyond = log_ratio.abs() > LOG_RATIO_LIMIT
    limit = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(beyond, limit, log_ratio), ~beyond


def choose_temperature(advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """Return tau_pos where A > 0 and tau_neg where A <= 0, equation (6); in the dtype and shape of the advantages."""
    return torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)


def make_surrogate(value: Tensor, slope: Tensor, weight: Tensor, inside: Tensor, dtype: torch.dtype) -> Surrogate:
    """Finish a surrogate: slope 0 beyond the limit, weight NaN where the value is, everything in the caller's dtype."""
    slope = torch.where(inside, slope, torch.zeros_like(slope)).detach()
    # A comparison with NaN is False, so a clip would call a NaN "inside the band": say NaN instead.
    weight = torch.where(value.isnan(), torch.full_like(weight, torch.nan), weight).detach()
    return Surrogate(value.to(dtype), slope.to(dtype), weight.to(dtype))
