"""Objectives that gate each token by its own ratio: SAPO, GRPO, which is the same surrogate with a hard gate, and their
neighbours.

Departure: CISPO is published as a loss -sg(w) A log pi, of which only the gradient, w A grad log pi, is meant. Here the
value is the integral of that slope over log r, so that value, autograd and slope agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapo.objectives.checks import require_cap, require_clip, require_positive
from sapo.objectives.gates import apply_hard_clip, apply_soft_gate, require_gate
from sapo.objectives.surrogates import Surrogate, bound_log_ratio, choose_temperature, make_surrogate


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """Soft Adaptive Policy Optimization, equations (5)-(8) of https://arxiv.org/abs/2511.20347.

        value_it = f(r_it) A_i,   f(r) = (4/tau) sigmoid(tau (r-1)),   slope_it = f'(r_it) r_it A_i,
        f'(r) = sech^2(tau (r-1) / 2),   tau = tau_pos if A_i > 0 else tau_neg.

    Departures: other gates of the family of https://arxiv.org/abs/2602.19345 by name, and `side="drift"`, which leaves
    ratios on their way back to 1 unattenuated. Defaults are the paper's.

    >>> import torch
    >>> SAPO().surrogate(torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.int64), 1).weight_M.item()
    1.0
    """

    name: ClassVar[str] = "sapo"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = False
    normalizer: ClassVar[str] = "sequence_mean"
    advantage: ClassVar[str] = "group_std"

    tau_pos: float = 1.0
    """Temperature where A > 0; larger attenuates faster."""
    tau_neg: float = 1.05
    """Temperature where A <= 0; larger than tau_pos, for such a token raises the rest of the vocabulary (9)."""
    gate: str = "sigmoid"
    """A name in sapo.objectives.gates.GATES."""
    side: str = "both"
    """"both" sides of r = 1 are attenuated, or only the "drift" the advantage pushes along."""

    def __post_init__(self) -> None:
        require_positive("tau_pos", self.tau_pos, 1.0)
        require_positive("tau_neg", self.tau_neg, 1.05)
        require_gate(self.gate, self.side)

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio = advantages_M.detach().double(), log_ratio.exp()
        tau = choose_temperature(advantages, self.tau_pos, self.tau_neg)
        value, weight = apply_soft_gate(ratio, tau, advantages > 0, gate=self.gate, side=self.side)
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group Relative Policy Optimization, equations (1), (13) and (24) of https://arxiv.org/abs/2511.20347.

        value_it = min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i),   slope_it = f'(r_it) r_it A_i,
        f'(r) = 1 if A_i > 0 and r <= 1 + eps_high, or A_i <= 0 and r >= 1 - eps_low; else 0.

    The edge of the band belongs to the band. Defaults are those of https://arxiv.org/abs/2507.18071, where eps_high >
    eps_low is DAPO's clip-higher. No KL term. Dr.GRPO, DAPO and MiniRL are this objective with other settings.
    """

    name: ClassVar[str] = "grpo"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = False
    normalizer: ClassVar[str] = "sequence_mean"
    advantage: ClassVar[str] = "group_std"

    eps_low: float = 0.2
    """How far below 1 a ratio keeps its gradient when A <= 0."""
    eps_high: float = 0.27
    """How far above 1 a ratio keeps its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, type(self).eps_low)
        require_clip("eps_high", self.eps_high, type(self).eps_high)

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio = advantages_M.detach().double(), log_ratio.exp()
        value, weight = apply_hard_clip(ratio, advantages > 0, eps_low=self.eps_low, eps_high=self.eps_high)
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO Done Right, https://arxiv.org/abs/2503.20783: GRPO with two biases taken out by its settings.

    A_i = R_i - mean R, without the division by std R, and every token weighs 1 / max_length, whatever the length of its
    response: `group_mean` and `constant_length`. The clip is 0.2 on both sides.
    """

    name: ClassVar[str] = "dr_grpo"
    normalizer: ClassVar[str] = "constant_length"
    advantage: ClassVar[str] = "group_mean"

    eps_high: float = 0.2
    """How far above 1 a ratio keeps its gradient when A > 0."""


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """The loss of DAPO, https://arxiv.org/abs/2503.14476: GRPO with clip-higher, 0.2 / 0.28, and `token_mean`.

    Not here, for they are no part of the loss: refilling groups without spread, and the penalty on overlong responses.
    """

    name: ClassVar[str] = "dapo"
    normalizer: ClassVar[str] = "token_mean"

    eps_high: float = 0.28
    """How far above 1 a ratio keeps its gradient when A > 0: more than below, so that rare tokens may grow."""


@dataclass(frozen=True, kw_only=True)
class MiniRL(GRPO):
    """MiniRL, https://arxiv.org/abs/2512.01374: the token-level first-order surrogate, masked by GRPO's band.

    Its loss is -sg(r) A log pi where GRPO's gate is open and 0 where it is closed: slope f'(r) r A, that of GRPO. The
    settings are its own: A_i = R_i - mean R (`group_mean`) and no normalising by length (`sequence_sum`).
    """

    name: ClassVar[str] = "minirl"
    normalizer: ClassVar[str] = "sequence_sum"
    advantage: ClassVar[str] = "group_mean"


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """REINFORCE, https://doi.org/10.1007/BF00992696, with a token's importance ratio for updates off policy.

        value_it = r_it A_i,   slope_it = r_it A_i,   f'(r) = 1.

    On policy its gradient is the score-function estimator A_i sum_t grad log pi(y_it), with the group's mean reward as
    baseline (`group_mean`) and no normalising by length (`sequence_sum`). Off policy the ratio of a token is the
    first-order stand-in for that of the whole response, which RLOO uses; nothing bounds it but LOG_RATIO_LIMIT.
    """

    name: ClassVar[str] = "reinforce"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = False
    normalizer: ClassVar[str] = "sequence_sum"
    advantage: ClassVar[str] = "group_mean"

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio = advantages_M.detach().double(), log_ratio.exp()
        return make_surrogate(ratio * advantages, ratio * advantages, torch.ones_like(ratio), inside, log_ratio_M.dtype)


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """CISPO of MiniMax-M1, https://arxiv.org/abs/2506.13585: the importance weight is clipped, no token is dropped.

        slope_it = min(r_it, c) A_i,   f'(r) = min(1, c / r),   f(r) = r if r <= c, else c (1 + log(r / c)).

    c is the weight's upper bound itself, as in ScaleRL (https://arxiv.org/abs/2510.13786), which recommends 5, and in
    TRL; MiniMax-M1 writes it 1 + eps_high. There is no lower bound. Departure: the paper's loss is
    -sg(min(r, c)) A log pi, which has this gradient; f is its integral over log r, `reinforce`'s value up to the cap.
    """

    name: ClassVar[str] = "cispo"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False
    needs_old_logprob: ClassVar[bool] = False
    normalizer: ClassVar[str] = "token_mean"
    advantage: ClassVar[str] = "group_std"

    ratio_cap: float = 5.0
    """c, the largest importance weight: at least 1."""

    def __post_init__(self) -> None:
        require_cap("ratio_cap", self.ratio_cap, 5.0)

    def surrogate(
        self,
        log_ratio_M: Tensor,
        advantages_M: Tensor,
        sequence_M: Tensor,
        num_sequences: int,
        old_logprob_M: Tensor | None = None,
    ) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio, cap = advantages_M.detach().double(), log_ratio.exp(), self.ratio_cap
        value = torch.where(ratio > cap, cap * (1 + log_ratio - math.log(cap)), ratio)
        weight = (cap / ratio).clamp(max=1)
        return make_surrogate(value * advantages, ratio.clamp(max=cap) * advantages, weight, inside, log_ratio_M.dtype)
