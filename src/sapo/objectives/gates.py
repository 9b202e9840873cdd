"""Gates: they attenuate a token's update as its ratio r = pi_theta / pi_old leaves 1.

A gate is a value f(r), which is maximised, and a weight f'(r), which multiplies the gradient: d f / d log pi = f'(r) r.
Admissible gates (https://arxiv.org/abs/2602.19345) are C1, have weight 1 at r = 1 at any temperature, fall
monotonically on either side, and satisfy r f'(r) -> 0. The hard clip of GRPO is not admissible: it is only C0.

Everything here is a pure elementwise function of float64 ratios, in closed form. Values are differentiable by
autograd. Weights are their derivatives, written so that no tail overflows.

Departure: `side="drift"` is ours, after the one-sided gates of the neighbours. The paper's gates attenuate both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.objectives.checks import unknown_option

TAU_POS, TAU_NEG = 1.0, 1.05
"""Temperatures of the paper, for positive advantages and for the others: the defaults of every soft gate."""
SIDES = ("both", "drift")


def sech_squared(x: Tensor) -> Tensor:
    """Return sech^2(x) as 4 sigmoid(2x) sigmoid(-2x): 1/cosh^2 overflows, and 1 - tanh^2 loses its tail to rounding."""
    return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)


def sigmoid_value(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return (4/tau) sigmoid(tau (r-1)), equation (6) of https://arxiv.org/abs/2511.20347."""
    return 4 / tau * torch.sigmoid(tau * (ratio - 1))


def sigmoid_weight(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return 4 p (1-p) = sech^2(tau (r-1) / 2) with p = sigmoid(tau (r-1)), equation (8)."""
    return sech_squared(tau * (ratio - 1) / 2)


def erf_value(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return 1 + sqrt(pi/2)/tau erf(tau (r-1) / sqrt 2), the integral of a Gaussian."""
    return 1 + math.sqrt(math.pi / 2) / tau * torch.erf(tau * (ratio - 1) / math.sqrt(2))


def erf_weight(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return exp(-tau^2 (r-1)^2 / 2)."""
    return torch.exp(-(tau * (ratio - 1)).square() / 2)


def arctan_value(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return 1 + atan(tau (r-1)) / tau."""
    return 1 + torch.atan(tau * (ratio - 1)) / tau


def arctan_weight(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return 1 / (1 + tau^2 (r-1)^2)."""
    return 1 / (1 + (tau * (ratio - 1)).square())


def softsign_value(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return 1 + (r-1) / sqrt(1 + tau^2 (r-1)^2), the inverse-square-root unit."""
    return 1 + (ratio - 1) / torch.sqrt(1 + (tau * (ratio - 1)).square())


def softsign_weight(ratio: Tensor, tau: Tensor) -> Tensor:
    """Return (1 + tau^2 (r-1)^2)^(-3/2)."""
    return (1 + (tau * (ratio - 1)).square()) ** -1.5


@dataclass(frozen=True)
class Gate:
    """A soft gate: its value f(ratio, tau) and its weight f'(ratio, tau), elementwise.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> GATES["sigmoid"].value(one, 2 * one).item(), GATES["sigmoid"].weight(one, 2 * one).item()
    (1.0, 1.0)
    """

    value: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]


GATES: dict[str, Gate] = {
    "sigmoid": Gate(sigmoid_value, sigmoid_weight),
    "erf": Gate(erf_value, erf_weight),
    "arctan": Gate(arctan_value, arctan_weight),
    "softsign": Gate(softsign_value, softsign_weight),
}


def apply_soft_gate(ratio: Tensor, tau: Tensor, positive: Tensor, *, gate: str, side: str) -> tuple[Tensor, Tensor]:
    """Compute value and weight of a soft gate at each ratio.

    Args:
        ratio: r, float64, any shape; the value is differentiable in it.
        tau: temperature of each element, float64, the same shape.
        positive: whether the advantage is > 0, bool, the same shape.
        gate: a name in GATES.
        side: "both" attenuates wherever r != 1. "drift" attenuates only where r has moved in the direction of the
            advantage (up for a positive one, down otherwise), and has weight 1 elsewhere.

    Returns:
        f(r) and f'(r); the weight carries no gradient.
    """
    soft = GATES[gate]
    value, weight = soft.value(ratio, tau), soft.weight(ratio.detach(), tau)
    if side == "both":
        return value, weight
    drifted = torch.where(positive, ratio > 1, ratio < 1)
    # The line meets the gate at r = 1 in value, f(1), and in slope, 1: the joint function stays C1.
    line = soft.value(torch.ones_like(tau), tau) + (ratio - 1)
    return torch.where(drifted, value, line), torch.where(drifted, weight, torch.ones_like(weight))


def apply_hard_clip(ratio: Tensor, positive: Tensor, *, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """Compute value and weight of the clip of GRPO, equations (13) and (24) of https://arxiv.org/abs/2511.20347.

    f(r) = min(r, 1 + eps_high) for a positive advantage, max(r, 1 - eps_low) otherwise; f' is 1 inside the band, edge
    included, and 0 outside it.

    Args:
        ratio: r, float64, any shape; the value is differentiable in it.
        positive: whether the advantage is > 0, bool, the same shape.
        eps_low: distance below 1 beyond which the gradient is 0 when the advantage is not positive.
        eps_high: distance above 1 beyond which the gradient is 0 when the advantage is positive.
    """
    edge = torch.full_like(ratio, 1 - eps_low).masked_fill(positive, 1 + eps_high)
    clipped = torch.where(positive, ratio > edge, ratio < edge)
    # where() and not minimum(): at a tie minimum() halves the gradient, and (24) keeps the edge whole.
    return torch.where(clipped, edge, ratio), (~clipped).to(ratio.dtype)


def require_gate(gate: str, side: str) -> None:
    """Refuse an unknown gate or side with a ValueError that names the nearest."""
    if gate not in GATES:
        raise unknown_option("gate", gate, GATES)
    if side not in SIDES:
        raise unknown_option("side", side, SIDES)
