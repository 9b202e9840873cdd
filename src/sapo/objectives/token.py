"""Objectives that gate each token by its own ratio: SAPO, GRPO, which is the same surrogate with a hard gate, and their
neighbours.

Departure: CISPO is published as a loss -sg(w) A log pi, of which only the gradient, w A grad log pi, is meant. Here the
value is the integral of that slope over log r, so that value, autograd and slope agree.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from sapo.objectives.checks import require_cap, require_clip, require_positive
from sapo.objectives.gates import TAU_NEG, TAU_POS, apply_hard_clip, apply_soft_gate, require_gate
from sapo.objectives.surrogates import (
    Factors,
    Objective,
    Ratios,
    Surrogate,
    Tokens,
    choose_temperature,
    make_surrogate,
)


@dataclass(frozen=True, kw_only=True)
class TokenObjective(Objective):
    """Base class of the objectives that gate each token by its own ratio: value_it = f(r_it) A_it.

    A gate that closes linearly between r = 1 and r = 1 + width, and is open below 1:

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Ramp(TokenObjective):
    ...     name: ClassVar[str] = "ramp"
    ...     width: float = 0.5
    ...     def factors(self, at: Ratios) -> Factors:
    ...         over = (at.ratio - 1).clamp(0, self.width)
    ...         weight = torch.where(at.ratio > 1 + self.width, 0.0, 1 - over / self.width)
    ...         value = torch.where(at.ratio < 1, at.ratio, 1 + over - over.square() / (2 * self.width))
    ...         return value, weight * at.ratio, weight
    >>> two = torch.tensor([1.0, 1.25], dtype=torch.float64).log()
    >>> Ramp().surrogate(two, torch.ones(2), torch.tensor([0, 0]), 1).weight_M.tolist()
    [1.0, 0.5]
    """

    def evaluate(self, tokens: Tokens) -> Surrogate:
        """Gate each token for itself; `sequence_M` is not read."""
        at = Ratios.of(tokens.log_ratio_M, tokens.advantages_M, tokens.old_probability_M)
        value, slope, weight = self.factors(at)
        return make_surrogate(value * at.advantages, slope * at.advantages, weight, at.inside, tokens.dtype)

    @abstractmethod
    def factors(self, at: Ratios) -> Factors:
        """Compute f(r), f'(r) r and f'(r) of each token; all (M,) float64, f differentiable in log r."""


@dataclass(frozen=True, kw_only=True)
class SAPO(TokenObjective):
    """Soft Adaptive Policy Optimization, equations (5)-(8) of https://arxiv.org/abs/2511.20347.

        value_it = f(r_it) A_i,   f(r) = (4/tau) sigmoid(tau (r-1)),   slope_it = f'(r_it) r_it A_i,
        f'(r) = sech^2(tau (r-1) / 2),   tau = tau_pos if A_i > 0 else tau_neg.

    Departures: other gates of the family of https://arxiv.org/abs/2602.19345 by name, and `side="drift"`, which leaves
    ratios on their way back to 1 unattenuated. Defaults are the paper's.

    >>> SAPO().surrogate(torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.int64), 1).weight_M.item()
    1.0
    """

    name: ClassVar[str] = "sapo"

    tau_pos: float = TAU_POS
    """Temperature where A > 0; larger attenuates faster."""
    tau_neg: float = TAU_NEG
    """Temperature where A <= 0. Larger than tau_pos, since such a token raises the rest of the vocabulary (9)."""
    gate: str = "sigmoid"
    """A name in sapo.objectives.gates.GATES."""
    side: str = "both"
    """"both" attenuates on both sides of r = 1, "drift" only on the side that the advantage pushes to."""

    def __post_init__(self) -> None:
        require_positive("tau_pos", self.tau_pos, TAU_POS)
        require_positive("tau_neg", self.tau_neg, TAU_NEG)
        require_gate(self.gate, self.side)

    def factors(self, at: Ratios) -> Factors:
        """Gate softly, with the temperature of the sign of the advantage."""
        tau = choose_temperature(at.advantages, self.tau_pos, self.tau_neg)
        value, weight = apply_soft_gate(at.ratio, tau, at.positive, gate=self.gate, side=self.side)
        return value, weight * at.ratio, weight


@dataclass(frozen=True, kw_only=True)
class GRPO(TokenObjective):
    """Group Relative Policy Optimization, equations (1), (13) and (24) of https://arxiv.org/abs/2511.20347.

        value_it = min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i),   slope_it = f'(r_it) r_it A_i,
        f'(r) = 1 if A_i > 0 and r <= 1 + eps_high, or A_i <= 0 and r >= 1 - eps_low; else 0.

    The edge of the band belongs to the band. Defaults are those of https://arxiv.org/abs/2507.18071, where eps_high >
    eps_low is DAPO's clip-higher. No KL term. Dr.GRPO, DAPO and MiniRL are this objective with other settings.
    """

    name: ClassVar[str] = "grpo"

    eps_low: float = 0.2
    """Distance below 1 at which a ratio loses its gradient when A <= 0."""
    eps_high: float = 0.27
    """Distance above 1 at which a ratio loses its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, type(self).eps_low)
        require_clip("eps_high", self.eps_high, type(self).eps_high)

    def factors(self, at: Ratios) -> Factors:
        """Clip the ratio of each token."""
        value, weight = apply_hard_clip(at.ratio, at.positive, eps_low=self.eps_low, eps_high=self.eps_high)
        return value, weight * at.ratio, weight


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO Done Right, https://arxiv.org/abs/2503.20783: GRPO with two biases removed by its settings.

    A_i = R_i - mean R, without the division by std R (`group_mean`). Every token weighs 1 / max_length, whatever the
    length of its response (`constant_length`). The clip is 0.2 on both sides.
    """

    name: ClassVar[str] = "dr_grpo"
    normalizer: ClassVar[str] = "constant_length"
    advantage: ClassVar[str] = "group_mean"

    eps_high: float = 0.2
    """Distance above 1 at which a ratio loses its gradient when A > 0."""


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """The loss of DAPO, https://arxiv.org/abs/2503.14476: GRPO with clip-higher, 0.2 / 0.28, and `token_mean`.

    Dynamic sampling and the penalty on overlong responses are not here: they are no part of the loss.
    """

    name: ClassVar[str] = "dapo"
    normalizer: ClassVar[str] = "token_mean"

    eps_high: float = 0.28
    """Distance above 1 at which a ratio loses its gradient when A > 0. Larger than eps_low, so that rare tokens may
    grow."""


@dataclass(frozen=True, kw_only=True)
class MiniRL(GRPO):
    """MiniRL, https://arxiv.org/abs/2512.01374: the token-level first-order surrogate, masked by GRPO's band.

    Its loss is -sg(r) A log pi where GRPO's gate is open and 0 where it is closed: slope f'(r) r A, that of GRPO. The
    settings are its own: A_i = R_i - mean R (`group_mean`) and no normalisation by length (`sequence_sum`).
    """

    name: ClassVar[str] = "minirl"
    normalizer: ClassVar[str] = "sequence_sum"
    advantage: ClassVar[str] = "group_mean"


@dataclass(frozen=True, kw_only=True)
class Reinforce(TokenObjective):
    """REINFORCE, https://doi.org/10.1007/BF00992696, with a token's importance ratio for updates off policy.

        value_it = r_it A_i,   slope_it = r_it A_i,   f'(r) = 1.

    On policy its gradient is the score-function estimator A_i sum_t grad log pi(y_it), with the group's mean reward as
    baseline (`group_mean`) and no normalisation by length (`sequence_sum`). Off policy the ratio of a token is the
    first-order approximation of the ratio of the whole response, which RLOO uses. Nothing but LOG_RATIO_LIMIT bounds
    it.
    """

    name: ClassVar[str] = "reinforce"
    normalizer: ClassVar[str] = "sequence_sum"
    advantage: ClassVar[str] = "group_mean"

    def factors(self, at: Ratios) -> Factors:
        """Leave the ratio ungated."""
        return at.ratio, at.ratio, torch.ones_like(at.ratio)


@dataclass(frozen=True, kw_only=True)
class CISPO(TokenObjective):
    """CISPO of MiniMax-M1, https://arxiv.org/abs/2506.13585: the importance weight is clipped, no token is dropped.

        slope_it = min(r_it, c) A_i,   f'(r) = min(1, c / r),   f(r) = r if r <= c, else c (1 + log(r / c)).

    c is the weight's upper bound itself, as in ScaleRL (https://arxiv.org/abs/2510.13786), which recommends 5, and in
    TRL; MiniMax-M1 writes it 1 + eps_high. There is no lower bound. Departure: the paper's loss is
    -sg(min(r, c)) A log pi, which has this gradient; f is its integral over log r, `reinforce`'s value up to the cap.
    """

    name: ClassVar[str] = "cispo"
    normalizer: ClassVar[str] = "token_mean"

    ratio_cap: float = 5.0
    """c, the largest importance weight: at least 1."""

    def __post_init__(self) -> None:
        require_cap("ratio_cap", self.ratio_cap, 5.0)

    def factors(self, at: Ratios) -> Factors:
        """Cap the importance weight."""
        cap = self.ratio_cap
        value = torch.where(at.ratio > cap, cap * (1 + at.log_ratio - math.log(cap)), at.ratio)
        return value, at.ratio.clamp(max=cap), (cap / at.ratio).clamp(max=1)
