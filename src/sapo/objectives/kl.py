"""KL penalty towards a reference policy: three estimators of KL(pi || pi_ref) from the sampled tokens alone.

With d = log pi(y) - log pi_ref(y) of a sampled token y (http://joschu.net/blog/kl-approx.html):

| name | value | coefficient on grad log pi | whose expectation, y ~ pi, is the gradient of |
|---|---|---|---|
| k1 | d | d | KL(pi &#124;&#124; pi_ref) |
| k2 | d^2 / 2 | d | KL(pi &#124;&#124; pi_ref) |
| k3 | exp(-d) - 1 + d | 1 - exp(-d) | KL(pi_ref &#124;&#124; pi), at the same point |

k3 is GRPO's (https://arxiv.org/abs/2402.03300). Departure: k1's coefficient is that of a penalty on the reward,
d grad log pi, as in PPO for language models. Its own derivative is 1, and E[grad log pi] = 0: as a loss its gradient
would be pure noise. The penalty is added token by token, with the weight of the policy term at that token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sapo.objectives.checks import unknown_option
from sapo.objectives.surrogates import LOG_RATIO_LIMIT

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, kw_only=True)
class KLPenalty:
    """A penalty on the loss, coefficient x KL.

    >>> penalty = KLPenalty(coefficient=0.1, estimator="k2")
    >>> value_M, slope_M = penalty.value_and_slope(torch.tensor([0.0, 0.2], dtype=torch.float64))
    >>> value_M.tolist(), slope_M.tolist()
    ([0.0, 0.020000000000000004], [0.0, 0.2])
    """

    coefficient: float
    """Factor of the estimate; positive."""
    estimator: str = "k3"
    """A name in KL_ESTIMATORS: k1, k2 or k3."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(
                f"coefficient must be positive and finite; got {self.coefficient}; without a penalty leave it out"
            )
        if self.estimator not in KL_ESTIMATORS:
            raise unknown_option("KL estimator", self.estimator, KL_ESTIMATORS)

    def value_and_slope(self, difference_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate of each token, in nats, and its coefficient on grad log pi.

        Both are (M,) float64 without gradient. Neither is multiplied by `coefficient`.

        Args:
            difference_M: log pi - log pi_ref of each sampled token, (M,). It is clamped to LOG_RATIO_LIMIT, so that
                exp() stays finite. Unlike a gate's slope, the coefficient is not 0 there: it leads back.
        """
        difference = difference_M.detach().double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        if self.estimator == "k1":
            return difference, difference
        if self.estimator == "k2":
            return difference.square() / 2, difference
        return torch.expm1(-difference) + difference, -torch.expm1(-difference)
