"""Objectives that gate each token by its own ratio: SAPO, and GRPO, which is the same surrogate with a hard gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sapo.objectives.checks import require_clip, require_temperature
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

    tau_pos: float = 1.0
    """Temperature where A > 0; larger attenuates faster."""
    tau_neg: float = 1.05
    """Temperature where A <= 0; larger than tau_pos, for such a token raises the rest of the vocabulary (9)."""
    gate: str = "sigmoid"
    """A name in sapo.objectives.gates.GATES."""
    side: str = "both"
    """"both" sides of r = 1 are attenuated, or only the "drift" the advantage pushes along."""

    def __post_init__(self) -> None:
        require_temperature("tau_pos", self.tau_pos, 1.0)
        require_temperature("tau_neg", self.tau_neg, 1.05)
        require_gate(self.gate, self.side)

    def surrogate(self, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Surrogate:
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
    eps_low is DAPO's clip-higher. No KL term. Dr.GRPO and DAPO are this objective under another normalizer.
    """

    name: ClassVar[str] = "grpo"
    coupled: ClassVar[bool] = False
    shared_advantage: ClassVar[bool] = False

    eps_low: float = 0.2
    """How far below 1 a ratio keeps its gradient when A <= 0."""
    eps_high: float = 0.27
    """How far above 1 a ratio keeps its gradient when A > 0."""

    def __post_init__(self) -> None:
        require_clip("eps_low", self.eps_low, 0.2)
        require_clip("eps_high", self.eps_high, 0.27)

    def surrogate(self, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Surrogate:
        """Each token for itself; `sequence_M` is not read. Shapes as in surrogates.Objective."""
        log_ratio, inside = bound_log_ratio(log_ratio_M)
        advantages, ratio = advantages_M.detach().double(), log_ratio.exp()
        value, weight = apply_hard_clip(ratio, advantages > 0, eps_low=self.eps_low, eps_high=self.eps_high)
        return make_surrogate(value * advantages, weight * ratio * advantages, weight, inside, log_ratio_M.dtype)
