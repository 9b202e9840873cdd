"""Objectives that gate a whole sequence by s_i = exp(mean_t log r_it): GSPO, GSPO-token, and SAPO's sequence form.

The slope of a token depends on every token of its sequence, so these need whole sequences in a micro-batch. The bound
on log-ratios applies to the mean, which is what enters exp(); one wild token in a calm sequence is not cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapo.objectives.checks import require_clip, require_temperature
from sapo.objectives.gates import apply_hard_clip, sech_squared
from sapo.objectives.surrogates import Surrogate, bound_log_ratio, choose_temperature, make_surrogate
from sapo.objectives.theory import sequence_mean


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Group Sequence Policy Optimization, equations (3), (4) and (14) of https://arxiv.org/abs/2511.20347; first in
    https://arxiv.org/abs/2507.18071.

        value_i = f(s_i) A_i with f the clip of GRPO,   slope_it = f'(s_i) s_i A_i,   s_i = exp(mean_t log r_it).

    All tokens of a sequence carry the same value, slope and weight. Advantages are shared within a sequence; should
    they differ, their mean is used. Defaults are those of the GSPO paper.
    """

    name: ClassVar[str] = "gspo"
    coupled: ClassVar[bool] = True
    shared_advantage: ClassVar[bool] = True

    eps_low: float = 3e-4
    """How far below 1 the sequence ratio keeps its gradient when A <= 0; per sequence, hence far below GRPO's."""
    eps_high: float = 4e-4
    """How far above 1 it does when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, 3e-4)
        require_clip("eps_high", self.eps_high, 4e-4)

    def surrogate(self, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Surrogate:
        """One gate per sequence. Shapes as in surrogates.Objective."""
        log_ratio_B, inside_B = bound_log_ratio(sequence_mean(log_ratio_M, sequence_M, num_sequences))
        advantages_B, ratio_B = sequence_mean(advantages_M.detach(), sequence_M, num_sequences), log_ratio_B.exp()
        value_B, weight_B = apply_hard_clip(ratio_B, advantages_B > 0, eps_low=self.eps_low, eps_high=self.eps_high)
        value_M, slope_M = (value_B * advantages_B)[sequence_M], (weight_B * ratio_B * advantages_B)[sequence_M]
        return make_surrogate(value_M, slope_M, weight_B[sequence_M], inside_B[sequence_M], log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class GSPOToken:
    """GSPO with an advantage of its own for each token, equation (11) of https://arxiv.org/abs/2511.20347.

        value_it = f(s_it) A_it,   s_it = sg[s_i] pi(y_it) / sg[pi(y_it)],   slope_it = f'(s_i) s_i A_it.

    sg stops the gradient: s_it equals s_i in value, and its gradient is that of token t alone. With advantages shared
    within a sequence this is GSPO in value, clip and gradient.
    """

    name: ClassVar[str] = "gspo_token"
    coupled: ClassVar[bool] = True
    shared_advantage: ClassVar[bool] = False

    eps_low: float = 3e-4
    """As in GSPO."""
    eps_high: float = 4e-4
    """As in GSPO."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, 3e-4)
        require_clip("eps_high", self.eps_high, 4e-4)

    def surrogate(self, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Surrogate:
        """The gate is the sequence's, the advantage the token's. Shapes as in surrogates.Objective."""
        means_B = sequence_mean(log_ratio_M.detach(), sequence_M, num_sequences)
        log_ratio_B, inside_B = bound_log_ratio(means_B)
        log_ratio, inside = log_ratio_M.double(), inside_B[sequence_M]
        # log pi/sg[pi] is 0 in value; constant beyond the limit, where inf - inf would be NaN.
        own = torch.where(inside, log_ratio - log_ratio.detach(), torch.zeros_like(log_ratio))
        advantages, ratio = advantages_M.detach().double(), (log_ratio_B[sequence_M] + own).exp()
        value, weight = apply_hard_clip(ratio, advantages > 0, eps_low=self.eps_low, eps_high=self.eps_high)
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class SAPOSequence:
    """The sequence gate that SAPO approaches, equations (17)-(23) of https://arxiv.org/abs/2511.20347.

        value_i = (2/tau) tanh((tau/2) log s_i) A_i,   slope_it = g(log s_i) A_i,   g(z) = sech^2((tau/2) z).

    The paper states the gradient (23) only; the value is its integral, 0 on policy. Departure: no factor s_i, for the
    reduction takes r near 1 (A1) and gates log r; compare SAPO, whose slope is f'(r) r A.
    """

    name: ClassVar[str] = "sapo_seq"
    coupled: ClassVar[bool] = True
    shared_advantage: ClassVar[bool] = True

    tau_pos: float = 1.0
    """Temperature where A > 0."""
    tau_neg: float = 1.05
    """Temperature where A <= 0."""

    def __post_init__(self) -> None:
        require_temperature("tau_pos", self.tau_pos, 1.0)
        require_temperature("tau_neg", self.tau_neg, 1.05)

    def surrogate(self, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Surrogate:
        """One gate per sequence. Shapes as in surrogates.Objective."""
        log_ratio_B, inside_B = bound_log_ratio(sequence_mean(log_ratio_M, sequence_M, num_sequences))
        advantages_B = sequence_mean(advantages_M.detach(), sequence_M, num_sequences)
        tau_B = choose_temperature(advantages_B, self.tau_pos, self.tau_neg)
        value_B = 2 / tau_B * torch.tanh(tau_B * log_ratio_B / 2)
        weight_B = sech_squared(tau_B * log_ratio_B / 2)
        value_M, slope_M = (value_B * advantages_B)[sequence_M], (weight_B * advantages_B)[sequence_M]
        return make_surrogate(value_M, slope_M, weight_B[sequence_M], inside_B[sequence_M], log_ratio_M.dtype)
