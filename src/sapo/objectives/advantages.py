"""Group-relative advantages, equation (2) of https://arxiv.org/abs/2511.20347: A_i = (R_i - mean R) / std R.

Departures: the standard deviation is torch.std's unbiased estimate (G - 1 below), as in the peers TRL and verl; the
paper does not say which. No epsilon is added to it, so advantages do not depend on the scale of the rewards. An epsilon
would protect zero-variance groups only; these get advantages of exactly 0 instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sapo.objectives.checks import unknown_option
from sapo.utils.rewards import ROUNDING

ADVANTAGES = ("group_std", "group_mean", "leave_one_out")


def group_advantages(rewards_G: Tensor, kind: str = "group_std") -> Tensor:
    """Compute the advantage of each of the G samples of one prompt.

    Args:
        rewards_G: rewards, (..., G); leading dimensions index groups.
        kind: "group_std" is equation (2); "group_mean" leaves out the division, as Dr.GRPO
            (https://arxiv.org/abs/2503.20783) and MiniRL (https://arxiv.org/abs/2512.01374) do; "leave_one_out" is
            R_i minus the mean of the others, RLOO's baseline (https://arxiv.org/abs/2402.14740), which does not depend
            on R_i and so leaves the gradient unbiased.

    Returns:
        Tensor of the same shape, in the dtype of the rewards (float32 for integers). It is exactly 0 for zero-variance
        groups, those whose rewards are all equal but for ROUNDING; a group of one sample is one.

    Raises:
        ValueError: unknown kind, no samples, or a reward that is not finite.
    """
    if kind not in ADVANTAGES:
        raise unknown_option("advantages", kind, ADVANTAGES)
    if rewards_G.dim() == 0 or rewards_G.shape[-1] == 0:
        raise ValueError(
            f"rewards must hold at least one sample per group; got shape {tuple(rewards_G.shape)}; pass (..., G)"
        )
    rewards = rewards_G.detach().double()
    if not bool(torch.isfinite(rewards).all()):
        bad = rewards[~torch.isfinite(rewards)][0].item()
        raise ValueError(f"rewards must be finite; got {bad}; give a failed verification a reward of its own")
    dtype = rewards_G.dtype if rewards_G.is_floating_point() else torch.float32
    spread = rewards.amax(-1, keepdim=True) - rewards.amin(-1, keepdim=True)
    spread = torch.where(spread > ROUNDING * rewards.abs().amax(-1, keepdim=True), spread, torch.zeros_like(spread))
    centred = rewards - rewards.mean(-1, keepdim=True)
    samples = rewards.shape[-1]
    if kind == "leave_one_out" and samples > 1:
        # R_i - (sum - R_i) / (G - 1) = G / (G - 1) (R_i - mean).
        centred = centred * (samples / (samples - 1))
    if kind == "group_std" and samples > 1:
        # Divide by the spread first, so that squares inside std() can neither underflow nor overflow.
        scaled = centred / spread
        centred = scaled / scaled.std(-1, keepdim=True)
    # Exactly 0, where the division gave 0/0 and the subtraction may have left a rounding error.
    return torch.where(spread > 0, centred, torch.zeros_like(centred)).to(dtype)


def turn_advantages(turn_rewards: Sequence[Sequence[float]], returns_G: Tensor, kind: str) -> list[list[float]]:
    """Compute an advantage for each turn of the G episodes of one prompt: reward-to-go against the group's baseline.

        A_ik = (r_ik + ... + r_iK - b_i) / s

    with baseline b_i and scale s of the whole returns R_i, as `group_advantages` has them: their mean and deviation
    (group_std), their mean and 1 (group_mean), the mean of the others and 1 (leave_one_out). The rewards of earlier
    turns are left out, since a later turn cannot have caused them. The baseline does not depend on the turn: means over
    the k-th turns of a group would compare episodes that have come to different places.

    Args:
        turn_rewards: r_i1 .. r_iK of each episode; K may differ. Zeros for an episode that was judged as a whole.
        returns_G: R_i, (G,). What it is beyond the sum of r_ik, as a penalty on the length, is earned at the end.
        kind: see `group_advantages`.

    Returns:
        For each episode as many advantages as it has rewards. All are 0 for a single episode, and under group_std where
        all returns are equal but for ROUNDING.

    >>> turn_advantages([[1.0, 0.0], [0.0, 0.0]], torch.tensor([1.0, 0.0]), "group_mean")
    [[0.5, -0.5], [-0.5, -0.5]]
    """
    whole_G = group_advantages(returns_G.double(), kind)
    samples = len(turn_rewards)
    returns = returns_G.double().tolist()
    if samples == 1 or (kind == "group_std" and not bool(whole_G.any())):
        return [[0.0] * len(rewards) for rewards in turn_rewards]
    mean, scale = math.fsum(returns) / samples, 1.0
    if kind == "group_std":
        scale = math.sqrt(math.fsum((r - mean) ** 2 for r in returns) / (samples - 1))
    found = []
    for whole, rewards in zip(returns, turn_rewards, strict=True):
        baseline = (mean * samples - whole) / (samples - 1) if kind == "leave_one_out" else mean
        earned = itertools.accumulate((0.0, *rewards[:-1]))
        found.append([(whole - before - baseline) / scale for before in earned])
    return found
