"""Objectives that gate each token by its probability as well as by its ratio: DPPO-TV and MASPO.

A policy changes by probability mass, pi - pi_old = pi_old (r - 1), and not by ratios: r = 3 hardly changes it at a
token of probability 1e-6, and makes a token of probability 1/3 certain. Both objectives read log pi_old. It is a
constant, so value, slope and weight stay functions of the log-ratio.

Departure: DPPO is published as a loss -sg(w) A log pi, of which only the gradient, w A grad log pi, is meant; MASPO's
gate is stopped likewise. Here the value is the integral of that slope over log r, so that value, autograd and slope
agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sapo.objectives.checks import require_cap, require_not_negative, require_positive
from sapo.objectives.gates import apply_soft_gate
from sapo.objectives.surrogates import Factors, Ratios
from sapo.objectives.token import TokenObjective

RISK_BOUNDS = (0.1, 10.0)
"""Bounds of MASPO's factor b(A), as in its authors' code."""


@dataclass(frozen=True, kw_only=True)
class DPPO(TokenObjective):
    """Divergence Proximal Policy Optimization with the binary total variation, https://arxiv.org/abs/2602.04879.

        slope_it = min(r_it, c) A_i where kept, else 0,   f'(r) = min(1, c / r) where kept, else 0,
        kept: pi_it - pi_old_it <= tv_high if A_i > 0, else pi_it - pi_old_it >= -tv_low.

    This is the clip of GRPO on CISPO's capped weight, with an edge for each token, 1 + tv_high / pi_old or
    1 - tv_low / pi_old. A rare token may grow many times over, and a token of pi_old <= tv_low may fall to 0. The edge
    belongs to the band. c is the paper's truncation of the ratio, a large one. Defaults and `token_mean` are those of
    verl's `dppo_tv`. Probabilities are at the sampling temperature, as in the loss.
    """

    name: ClassVar[str] = "dppo_tv"
    needs_old_logprob: ClassVar[bool] = True
    normalizer: ClassVar[str] = "token_mean"

    tv_low: float = 0.2
    """Loss of probability beyond which a token has no gradient when A <= 0."""
    tv_high: float = 0.2
    """Gain of probability beyond which a token has no gradient when A > 0."""
    ratio_cap: float = 20.0
    """c, the largest importance weight: at least 1."""

    def __post_init__(self) -> None:
        require_positive("tv_low", self.tv_low, 0.2)
        require_positive("tv_high", self.tv_high, 0.2)
        require_cap("ratio_cap", self.ratio_cap, 20.0)

    def factors(self, at: Ratios) -> Factors:
        """Clip the change of probability of each token, and cap its ratio."""
        old_M, ratio, cap = at.old_probability, at.ratio, self.ratio_cap
        assert old_M is not None
        won_M = old_M * (ratio.detach() - 1)
        cut = torch.where(at.positive, won_M > self.tv_high, won_M < -self.tv_low)
        # Only where cut is the edge read, and there pi_old is not 0.
        edge = 1 + torch.full_like(old_M, -self.tv_low).masked_fill(at.positive, self.tv_high) / old_M
        capped = torch.where(ratio > cap, cap * (1 + at.log_ratio - math.log(cap)), ratio)
        capped_edge = torch.where(edge > cap, cap * (1 + edge.clamp(min=cap).log() - math.log(cap)), edge)
        kept = (~cut).double()
        return torch.where(cut, capped_edge, capped), kept * ratio.clamp(max=cap), kept * (cap / ratio).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class MASPO(TokenObjective):
    """Mass-Adaptive Soft Policy Optimization, https://arxiv.org/abs/2602.17550: a Gaussian gate, wider for rare tokens
    and large advantages.

        f'(r) = exp(-(r-1)^2 / (2 sigma_it^2)) where (A_i > 0, r > 1) or (A_i < 0, r < 1), else 1;
        slope_it = f'(r_it) r_it A_i,   sigma_it = clip(sigma pi_old_it^-alpha, sigma, sigma_max) b(A_i),
        b(A) = 1 + beta_pos A if A > 0, else 1 / (1 - beta_neg A), within RISK_BOUNDS.

    This is SAPO's gate "erf" on the side of drift with a temperature for each token, 1 / sigma_it. The limiter (alpha)
    widens it for rare tokens. The risk controller (beta) widens it for a large advantage and narrows it for a very
    negative one. alpha = beta_pos = beta_neg = 0 is one Gaussian for all tokens. Defaults, the bounds and `token_mean`
    are those of the authors' code, https://github.com/FlyTune/MASPO-RL, which recommends alpha 0.3 to 0.5.
    """

    name: ClassVar[str] = "maspo"
    needs_old_logprob: ClassVar[bool] = True
    normalizer: ClassVar[str] = "token_mean"

    sigma: float = 1.0
    """Width of the Gaussian in r for a token of probability 1; the paper's sigma_base."""
    alpha: float = 0.3
    """Exponent of the limiter: the width of a token is sigma pi_old^-alpha."""
    beta_pos: float = 0.03
    """Widening per unit of a positive advantage."""
    beta_neg: float = 0.03
    """Narrowing per unit of a negative advantage."""
    sigma_max: float = 10.0
    """Largest width that the limiter gives."""

    def __post_init__(self) -> None:
        require_positive("sigma", self.sigma, 1.0)
        for name in ("alpha", "beta_pos", "beta_neg"):
            require_not_negative(name, getattr(self, name), getattr(type(self), name))
        require_positive("sigma_max", self.sigma_max, 10.0)
        if self.sigma_max < self.sigma:
            raise ValueError(f"sigma_max must be at least sigma, {self.sigma}; got {self.sigma_max}; raise sigma_max")

    def factors(self, at: Ratios) -> Factors:
        """Gate the drift of each token by a Gaussian of its own width."""
        old_M, advantages = at.old_probability, at.advantages
        assert old_M is not None
        risk = torch.where(at.positive, 1 + self.beta_pos * advantages, 1 / (1 - self.beta_neg * advantages))
        width = (self.sigma * old_M**-self.alpha).clamp(self.sigma, self.sigma_max) * risk.clamp(*RISK_BOUNDS)
        value, weight = apply_soft_gate(at.ratio, 1 / width, at.positive, gate="erf", side="drift")
        return value, weight * at.ratio, weight
