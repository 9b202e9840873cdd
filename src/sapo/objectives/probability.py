"""Objectives that gate each token by its probability as well as by its ratio: DPPO-TV and MASPO.

What moves a policy is the mass that changes hands, pi - pi_old = pi_old (r - 1), and not the ratio: r = 3 is nothing to
a token of one in a million and everything to one of one in three. Both read log pi_old, a constant, so that value,
slope and weight stay functions of the log-ratio.

Departure: DPPO is published as a loss -sg(w) A log pi, of which only the gradient, w A grad log pi, is meant; MASPO's
gate is stopped likewise. Here the value is the integral of that slope over log r, so that value, autograd and slope
agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapo.objectives.checks import require_cap, require_not_negative, require_positive
from sapo.objectives.gates import apply_soft_gate
from sapo.objectives.surrogates import Surrogate, bound_log_ratio, make_surrogate, require_old_logprob

RISK_BOUNDS = (0.1, 10.0)
"""MASPO's factor of an advantage stays within these, as in its authors' code."""


@dataclass(frozen=True, kw_only=True)
class DPPO:
    """Divergence Proximal Policy Optimization with the binary total variation, https://arxiv.org/abs/2602.04879.

        slope_it = min(r_it, c) A_i where kept, else 0,   f'(r) = min(1, c / r) where kept, else 0,
        kept: pi_it - pi_old_it <= tv_high if A_i > 0, else pi_it - pi_old_it >= -tv_low.

    The clip of GRPO with an edge of each token's own, 1 + tv_high / pi_old or 1 - tv_low / pi_old, on CISPO's capped
    weight. A rare token may grow many times over, and a token of pi_old <= tv_low may fall to nothing. The edge
    belongs to the band. c is the paper's truncation of the ratio, a large one. Defaults and `token_mean` are those of
    verl's `dppo_tv`. The probability is that of the policy that is differentiated: at the sampling temperature.
    """

    name: ClassVar[str] = "dppo_tv"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = True
    normalizer: ClassVar[str] = "token_mean"
    advantage: ClassVar[str] = "group_std"

    tv_low: float = 0.2
    """Probability a token may have lost while it keeps its gradient when A <= 0."""
    tv_high: float = 0.2
    """Probability a token may have won while it keeps its gradient when A > 0."""
    ratio_cap: float = 20.0
    """c, the largest importance weight: at least 1."""

    def __post_init__(self) -> None:
        require_positive("tv_low", self.tv_low, 0.2)
        require_positive("tv_high", self.tv_high, 0.2)
        require_cap("ratio_cap", self.ratio_cap, 20.0)

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        old_M = require_old_logprob(self.name, old_logprob_M)
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio, cap = advantages_M.detach().double(), log_ratio.exp(), self.ratio_cap
        positive, won_M = advantages > 0, old_M * (ratio.detach() - 1)
        cut = torch.where(positive, won_M > self.tv_high, won_M < -self.tv_low)
        # Only where cut is the edge read, and there pi_old is not 0.
        edge = 1 + torch.full_like(old_M, -self.tv_low).masked_fill(positive, self.tv_high) / old_M
        capped = torch.where(ratio > cap, cap * (1 + log_ratio - math.log(cap)), ratio)
        capped_edge = torch.where(edge > cap, cap * (1 + edge.clamp(min=cap).log() - math.log(cap)), edge)
        kept = (~cut).double()
        value, weight = torch.where(cut, capped_edge, capped), kept * (cap / ratio).clamp(max=1)
        slope = kept * ratio.clamp(max=cap) * advantages
        return make_surrogate(value * advantages, slope, weight, inside, log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class MASPO:
    """Mass-Adaptive Soft Policy Optimization, https://arxiv.org/abs/2602.17550: a Gaussian gate as wide as a token is
    rare and its advantage to be trusted.

        f'(r) = exp(-(r-1)^2 / (2 sigma_it^2)) where (A_i > 0, r > 1) or (A_i < 0, r < 1), else 1;
        slope_it = f'(r_it) r_it A_i,   sigma_it = clip(sigma pi_old_it^-alpha, sigma, sigma_max) b(A_i),
        b(A) = 1 + beta_pos A if A > 0, else 1 / (1 - beta_neg A), within RISK_BOUNDS.

    SAPO's gate "erf" on the side of drift with a temperature of each token's own, 1 / sigma_it. The limiter (alpha)
    opens it for rare tokens; the risk controller (beta) opens it for a large advantage and narrows it for a very
    negative one. alpha = beta_pos = beta_neg = 0 leaves one Gaussian for all. Defaults, the bounds and `token_mean` are
    those of the authors' code, https://github.com/FlyTune/MASPO-RL; it recommends alpha 0.3 to 0.5.
    """

    name: ClassVar[str] = "maspo"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = True
    normalizer: ClassVar[str] = "token_mean"
    advantage: ClassVar[str] = "group_std"

    sigma: float = 1.0
    """Width of the Gaussian in r for a token of probability 1; the paper's sigma_base."""
    alpha: float = 0.3
    """How much wider for a rare token: sigma pi_old^-alpha."""
    beta_pos: float = 0.03
    """How much wider for a positive advantage."""
    beta_neg: float = 0.03
    """How much narrower for a negative one."""
    sigma_max: float = 10.0
    """Largest width the limiter gives."""

    def __post_init__(self) -> None:
        require_positive("sigma", self.sigma, 1.0)
        for name in ("alpha", "beta_pos", "beta_neg"):
            require_not_negative(name, getattr(self, name), getattr(type(self), name))
        require_positive("sigma_max", self.sigma_max, 10.0)
        if self.sigma_max < self.sigma:
            raise ValueError(f"sigma_max must be at least sigma, {self.sigma}; got {self.sigma_max}; raise sigma_max")

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        old_M = require_old_logprob(self.name, old_logprob_M)
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio = advantages_M.detach().double(), log_ratio.exp()
        positive = advantages > 0
        risk = torch.where(positive, 1 + self.beta_pos * advantages, 1 / (1 - self.beta_neg * advantages))
        width = (self.sigma * old_M**-self.alpha).clamp(self.sigma, self.sigma_max) * risk.clamp(*RISK_BOUNDS)
        value, weight = apply_soft_gate(ratio, 1 / width, positive, gate="erf", side="drift")
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, log_ratio_M.dtype)
