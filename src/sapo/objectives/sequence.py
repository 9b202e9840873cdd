"""Objectives that gate a whole sequence.

GSPO, GSPO-token, LUSPO, GMPO and SAPO's sequence form gate by s_i = exp(mean_t log r_it). RLOO and VESPO gate by the
ratio of the whole response, W_i = exp(sum_t log r_it).

The slope of a token depends on every token of its sequence, so a micro-batch must hold whole sequences. The bound on
log-ratios applies to the mean or the sum, which is what enters exp(): one extreme token in a sequence near the policy
is not cut. GMPO bounds each token.

W_i gives one value for a response, F(W_i) A_i. Its tokens share it evenly, value_it = F(W_i) A_i / |y_i|: under weights
constant within a sequence their sum is the response's value, and slope_it = W_i F'(W_i) A_i has no |y_i| in it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from sapo.objectives.checks import require_clip, require_positive
from sapo.objectives.gates import TAU_NEG, TAU_POS, apply_hard_clip, sech_squared
from sapo.objectives.surrogates import (
    Factors,
    Objective,
    Ratios,
    Surrogate,
    Tokens,
    bound_log_ratio,
    choose_temperature,
    make_surrogate,
)
from sapo.objectives.theory import sequence_mean, sequence_sum


@dataclass(frozen=True, kw_only=True)
class SequenceObjective(Objective):
    """Base class of the objectives with one gate per sequence: value_i = f(s_i) A_i, or F(W_i) A_i of a response.

    All tokens of a sequence carry the same value, slope and weight. Advantages are shared within a sequence; if they
    differ, their mean is used.
    """

    coupled: ClassVar[bool] = True
    shared_advantage: ClassVar[bool] = True
    whole_response: ClassVar[bool] = False
    """False: the ratio is s_i = exp(mean_t log r_it). True: it is W_i = exp(sum_t log r_it), and the tokens share the
    value of the response."""

    def evaluate(self, tokens: Tokens) -> Surrogate:
        """Gate each sequence, and give its tokens what the gate says."""
        sequence_M, num_sequences = tokens.sequence_M, tokens.num_sequences
        reduce = sequence_sum if self.whole_response else sequence_mean
        advantages_B = sequence_mean(tokens.advantages_M, sequence_M, num_sequences)
        at = Ratios.of(reduce(tokens.log_ratio_M, sequence_M, num_sequences), advantages_B)
        value_B, slope_B, weight_B = self.factors(at)
        value_B = value_B * advantages_B
        if self.whole_response:
            value_B = value_B / torch.bincount(sequence_M, minlength=num_sequences).clamp(min=1)
        slope_M, weight_M = (slope_B * advantages_B)[sequence_M], weight_B[sequence_M]
        return make_surrogate(value_B[sequence_M], slope_M, weight_M, at.inside[sequence_M], tokens.dtype)

    @abstractmethod
    def factors(self, at: Ratios) -> Factors:
        """Compute f(s), f'(s) s and f'(s) of each sequence; all (B,) float64, f differentiable in log s."""


@dataclass(frozen=True, kw_only=True)
class GSPO(SequenceObjective):
    """Group Sequence Policy Optimization, equations (3), (4) and (14) of https://arxiv.org/abs/2511.20347; first in
    https://arxiv.org/abs/2507.18071.

        value_i = f(s_i) A_i with f the clip of GRPO,   slope_it = f'(s_i) s_i A_i,   s_i = exp(mean_t log r_it).

    Defaults are those of the GSPO paper.
    """

    name: ClassVar[str] = "gspo"

    eps_low: float = 3e-4
    """Distance below 1 at which the sequence ratio loses its gradient when A <= 0. Far below GRPO's: the ratio is a
    mean over the sequence."""
    eps_high: float = 4e-4
    """Distance above 1 at which the sequence ratio loses its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, type(self).eps_low)
        require_clip("eps_high", self.eps_high, type(self).eps_high)

    def factors(self, at: Ratios) -> Factors:
        """Clip the ratio of each sequence."""
        value, weight = apply_hard_clip(at.ratio, at.positive, eps_low=self.eps_low, eps_high=self.eps_high)
        return value, weight * at.ratio, weight


@dataclass(frozen=True, kw_only=True)
class GSPOToken(Objective):
    """GSPO with an advantage of its own for each token, equation (11) of https://arxiv.org/abs/2511.20347.

        value_it = f(s_it) A_it,   s_it = sg[s_i] pi(y_it) / sg[pi(y_it)],   slope_it = f'(s_i) s_i A_it.

    sg stops the gradient: s_it equals s_i in value, and its gradient is that of token t alone. With advantages shared
    within a sequence this is GSPO in value, clip and gradient.
    """

    name: ClassVar[str] = "gspo_token"
    coupled: ClassVar[bool] = True

    eps_low: float = GSPO.eps_low
    """Distance below 1 at which the sequence ratio loses its gradient when A <= 0."""
    eps_high: float = GSPO.eps_high
    """Distance above 1 at which the sequence ratio loses its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, type(self).eps_low)
        require_clip("eps_high", self.eps_high, type(self).eps_high)

    def evaluate(self, tokens: Tokens) -> Surrogate:
        """Gate by the ratio of the sequence, with the advantage of the token."""
        means_B = sequence_mean(tokens.log_ratio_M.detach(), tokens.sequence_M, tokens.num_sequences)
        log_ratio_B, inside_B = bound_log_ratio(means_B)
        log_ratio, inside = tokens.log_ratio_M.double(), inside_B[tokens.sequence_M]
        # log pi/sg[pi] is 0 in value; constant beyond the limit, where inf - inf would be NaN.
        own = torch.where(inside, log_ratio - log_ratio.detach(), torch.zeros_like(log_ratio))
        advantages, ratio = tokens.advantages_M.double(), (log_ratio_B[tokens.sequence_M] + own).exp()
        value, weight = apply_hard_clip(ratio, advantages > 0, eps_low=self.eps_low, eps_high=self.eps_high)
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class SAPOSequence(SequenceObjective):
    """The sequence gate that SAPO approaches, equations (17)-(23) of https://arxiv.org/abs/2511.20347.

        value_i = (2/tau) tanh((tau/2) log s_i) A_i,   slope_it = g(log s_i) A_i,   g(z) = sech^2((tau/2) z).

    The paper states the gradient (23) only. The value is its integral, 0 on policy. Departure: the slope has no factor
    s_i, for the reduction assumes r near 1 (A1) and gates log r; compare SAPO, whose slope is f'(r) r A.
    """

    name: ClassVar[str] = "sapo_seq"

    tau_pos: float = TAU_POS
    """Temperature where A > 0."""
    tau_neg: float = TAU_NEG
    """Temperature where A <= 0."""

    def __post_init__(self) -> None:
        require_positive("tau_pos", self.tau_pos, TAU_POS)
        require_positive("tau_neg", self.tau_neg, TAU_NEG)

    def factors(self, at: Ratios) -> Factors:
        """Gate the log-ratio of each sequence softly."""
        tau_B = choose_temperature(at.advantages, self.tau_pos, self.tau_neg)
        weight_B = sech_squared(tau_B * at.log_ratio / 2)
        return 2 / tau_B * torch.tanh(tau_B * at.log_ratio / 2), weight_B, weight_B


@dataclass(frozen=True, kw_only=True)
class LUSPO(GSPO):
    """Length-Unbiased Sequence Policy Optimization, https://arxiv.org/abs/2602.05261: GSPO times |y_i|.

    mean_i |y_i| f(s_i) A_i is GSPO's value summed over the tokens of a response and not averaged: `sequence_sum`. With
    `sequence_mean` this is GSPO with a wider clip, 2e-3 / 2.5e-3.
    """

    name: ClassVar[str] = "luspo"
    normalizer: ClassVar[str] = "sequence_sum"

    eps_low: float = 2e-3
    """Distance below 1 at which the sequence ratio loses its gradient when A <= 0."""
    eps_high: float = 2.5e-3
    """Distance above 1 at which the sequence ratio loses its gradient when A > 0."""


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """Geometric-Mean Policy Optimization, https://arxiv.org/abs/2507.20673: the clip of a token inside the mean.

        value_i = exp(mean_t c(z_it)) A_i,   c(z) = min(z, log_high) if A_i > 0, else max(z, -log_low),
        slope_it = f'_it exp(mean_t c(z_it)) A_i,   f'_it = 1 where c(z_it) = z_it, else 0.

    The clip acts on the log-ratio, on the side that the advantage pushes to. A clipped token gives its sequence a
    constant factor and gets no gradient. The edge of the band belongs to the band. Default: ratios within
    (e^-0.4, e^0.4).
    """

    name: ClassVar[str] = "gmpo"
    coupled: ClassVar[bool] = True
    shared_advantage: ClassVar[bool] = True

    log_low: float = 0.4
    """Distance below 0 at which the log-ratio of a token loses its gradient when A <= 0."""
    log_high: float = 0.4
    """Distance above 0 at which the log-ratio of a token loses its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_positive("log_low", self.log_low, 0.4)
        require_positive("log_high", self.log_high, 0.4)

    def evaluate(self, tokens: Tokens) -> Surrogate:
        """Clip the log-ratio of each token, and give a sequence the geometric mean of its ratios."""
        log_ratio, inside = bound_log_ratio(tokens.log_ratio_M)
        where = tokens.sequence_M, tokens.num_sequences
        advantages = sequence_mean(tokens.advantages_M, *where)[tokens.sequence_M]
        positive = advantages > 0
        edge = torch.full_like(log_ratio, -self.log_low).masked_fill(positive, self.log_high)
        clipped = torch.where(positive, log_ratio > edge, log_ratio < edge)
        bounded = torch.where(clipped, edge, log_ratio)
        ratio, weight = sequence_mean(bounded, *where).exp()[tokens.sequence_M], (~clipped).double()
        return make_surrogate(ratio * advantages, weight * ratio * advantages, weight, inside, tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class RLOO(SequenceObjective):
    """REINFORCE Leave-One-Out, https://arxiv.org/abs/2402.14740, with the clip that TRL gives it off policy.

        value_it = f(W_i) A_i / |y_i|,   slope_it = f'(W_i) W_i A_i,   f the clip of GRPO,

    with A_i = R_i - mean of the other rewards of the group (`leave_one_out`) and the response as one action
    (`sequence_sum`). On policy it is REINFORCE under another baseline. The paper is on policy; the clip is TRL's.
    """

    name: ClassVar[str] = "rloo"
    whole_response: ClassVar[bool] = True
    normalizer: ClassVar[str] = "sequence_sum"
    advantage: ClassVar[str] = "leave_one_out"

    eps_low: float = 0.2
    """Distance below 1 at which the ratio of the response loses its gradient when A <= 0."""
    eps_high: float = 0.2
    """Distance above 1 at which the ratio of the response loses its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, type(self).eps_low)
        require_clip("eps_high", self.eps_high, type(self).eps_high)

    def factors(self, at: Ratios) -> Factors:
        """Clip the ratio of each response."""
        value, weight = apply_hard_clip(at.ratio, at.positive, eps_low=self.eps_low, eps_high=self.eps_high)
        return value, weight * at.ratio, weight


@dataclass(frozen=True, kw_only=True)
class VESPO(SequenceObjective):
    """Variational Sequence-level Soft Policy Optimization, https://arxiv.org/abs/2602.10693: a Gamma weight on W_i.

        slope_it = phi(W_i) A_i,   phi(W) = W^k exp(lambda (1 - W)),   (k, lambda) by the sign of A_i,
        value_it = F(W_i) A_i / |y_i|,   F(W) = exp(lambda) lambda^-k gamma(k, lambda W),   f' = phi(W) / W.

    Departure: the paper's loss, -sg(phi(W)) A log pi, has this gradient; F is its integral over log W, and gamma the
    lower incomplete Gamma function. phi(1) = 1, but its maximum is (k/lambda)^k exp(lambda - k), 1.21 and 1.24 by
    default, at W = k/lambda; the gate weight f' exceeds 1 too. `token_mean` is what TRL divides by.
    """

    name: ClassVar[str] = "vespo"
    whole_response: ClassVar[bool] = True
    normalizer: ClassVar[str] = "token_mean"

    k_pos: float = 2.0
    """Exponent where A >= 0; larger attenuates W < 1 more."""
    lambda_pos: float = 3.0
    """Rate where A >= 0; larger attenuates W > 1 more."""
    k_neg: float = 3.0
    """Exponent where A < 0; larger attenuates W < 1 more."""
    lambda_neg: float = 2.0
    """Rate where A < 0; larger attenuates W > 1 more."""

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            require_positive(name, getattr(self, name), getattr(type(self), name))

    def factors(self, at: Ratios) -> Factors:
        """Weigh each response by the Gamma weight, and integrate it for the value."""
        k_B = torch.full_like(at.advantages, self.k_pos).masked_fill(at.advantages < 0, self.k_neg)
        lambda_B = torch.full_like(at.advantages, self.lambda_pos).masked_fill(at.advantages < 0, self.lambda_neg)
        scale_B = torch.exp(lambda_B - k_B * lambda_B.log() + torch.lgamma(k_B))
        value_B = scale_B * torch.special.gammainc(k_B, lambda_B * at.ratio)
        # In logarithms: W^k alone would overflow where exp(-lambda W) makes it 0.
        exponent_B = lambda_B * (1 - at.ratio)
        phi_B = (k_B * at.log_ratio + exponent_B).exp()
        return value_B, phi_B, ((k_B - 1) * at.log_ratio + exponent_B).exp()
