"""Importance weights for the mismatch between sampler and trainer: mu, which drew the tokens, is not exactly pi_old.

With log pi_old from the trainer, the ratio r = pi_theta / pi_old measures only how far the policy has moved, and only
that is gated. The difference between mu and pi_old is corrected apart from it, by a weight on the loss of each token
that is constant in theta:

    w_it = pi_old(y_it) / mu(y_it),   rho_i = prod_t w_it,

| mode | weight of token t of response i | cap C | source |
|---|---|---|---|
| token | min(w_it, C) | 2 | truncated importance sampling; verl and TRL by token |
| sequence | min(rho_i, C) | 2 | the same over the whole response; verl by sequence |
| sequence_mean | min(rho_i^(1/&#124;y_i&#124;), C) | 2 | ours, after GSPO's ratio; for long trajectories |
| icepop | w_it if floor <= w_it <= C, else 0 | 5, floor 0.5 | IcePop |
| sequence_mask | rho_i if rho_i <= C, else 0 | 3 | TRL's sequence mask |

rho_i is a product: a sampler that is off by .001 nats at every token in the same direction has rho_i = exp(-8) after
8,000 tokens and next to no loss is left, though each token was drawn almost as it should be. Beyond LONG_TRAJECTORY
tokens `sequence_mean` weighs by the geometric mean instead, which does not depend on the length. It is not the
importance weight of the response: it removes the bias of each token on average, as GSPO's ratio does.

Departure: |log w| and |log rho| are bounded by LOG_RATIO_LIMIT before exp(), as every log-ratio here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from sapo.objectives.checks import require_cap, unknown_option
from sapo.objectives.surrogates import bound_log_ratio
from sapo.objectives.theory import sequence_mean, sequence_sum

TIS_CAPS = {"token": 2.0, "sequence": 2.0, "sequence_mean": 2.0, "icepop": 5.0, "sequence_mask": 3.0}
"""Default cap of each mode, from its source."""
ICEPOP_FLOOR = 0.5

LONG_TRAJECTORY = 1000
"""Own tokens of the mean trajectory above which a product over all of them is warned of."""


@dataclass(frozen=True)
class MismatchWeights:
    """Weights of M tokens.

    >>> import torch
    >>> tokens = torch.tensor([0.0, 1.0], dtype=torch.float64)  # log w
    >>> found = TIS().weigh(tokens, torch.tensor([0, 0]), 1)
    >>> found.weight_M.tolist(), found.clipped_M.tolist()
    ([1.0, 2.0], [False, True])
    """

    weight_M: Tensor
    """(M,) float64, no gradient."""
    clipped_M: Tensor
    """(M,) bool: where the weight is the cap or 0 in place of the importance weight."""


@dataclass(frozen=True, kw_only=True)
class TIS:
    """Truncated importance sampling and its relatives, by mode; see the table above.

    >>> TIS(mode="icepop")
    TIS(mode='icepop', cap=5.0, floor=0.5)

    Raises:
        ValueError: an unknown mode, a cap below 1, or a floor that is not IcePop's or not in (0, 1].
    """

    mode: str = "token"
    cap: float | None = None
    """C, the largest weight; that of TIS_CAPS when None."""
    floor: float | None = None
    """Smallest weight of icepop; 0.5 when None."""

    def __post_init__(self) -> None:
        if self.mode not in TIS_CAPS:
            raise unknown_option("tis mode", self.mode, TIS_CAPS)
        if self.floor is not None and self.mode != "icepop":
            raise ValueError(f"floor is for mode icepop; got {self.floor!r} with {self.mode}; leave it out")
        if self.cap is None:
            object.__setattr__(self, "cap", TIS_CAPS[self.mode])
        if self.mode == "icepop" and self.floor is None:
            object.__setattr__(self, "floor", ICEPOP_FLOOR)
        assert self.cap is not None
        require_cap("cap", self.cap, TIS_CAPS[self.mode])
        low = self.floor
        if low is not None and not (isinstance(low, Real) and math.isfinite(low) and 0 < low <= 1):
            raise ValueError(f"floor must lie in (0, 1]; got {low!r}; IcePop has {ICEPOP_FLOOR}")

    @property
    def multiplies(self) -> bool:
        """Return whether the weight is a product over the tokens of a sequence, which shrinks or grows with its length.

        >>> TIS(mode="sequence").multiplies, TIS(mode="sequence_mean").multiplies
        (True, False)
        """
        return self.mode in ("sequence", "sequence_mask")

    def weigh(self, log_mismatch_M: Tensor, sequence_M: Tensor, num_sequences: int) -> MismatchWeights:
        """Compute the weight of each token.

        Args:
            log_mismatch_M: log pi_old - log mu of each response token, (M,); a NaN comes out as NaN.
            sequence_M: sequence of each token, int64 in [0, num_sequences).
            num_sequences: number of sequences.
        """
        assert self.cap is not None
        log_w_M = log_mismatch_M.detach().double()
        if self.mode.startswith("sequence"):
            reduce = sequence_mean if self.mode == "sequence_mean" else sequence_sum
            log_w_M = reduce(log_w_M, sequence_M, num_sequences)[sequence_M]
        weight_M = bound_log_ratio(log_w_M)[0].exp()
        if self.mode in ("token", "sequence", "sequence_mean"):
            return MismatchWeights(weight_M.clamp(max=self.cap), weight_M > self.cap)
        outside_M = weight_M > self.cap
        if self.floor is not None:
            outside_M |= weight_M < self.floor
        return MismatchWeights(weight_M.masked_fill(outside_M, 0.0), outside_M)
