"""The tokens of one update as the diagnostics read them: float64 arrays on the CPU, fetched and exponentiated once.

numpy and not torch: there are some hundred small reductions for each update, and what torch adds to each of them would
be a share of a tiny model's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapo.objectives import LOG_RATIO_LIMIT
from sapo.training.update_result import UpdateResult

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

SIDES = ("pos", "neg")


@dataclass(frozen=True)
class GatedTokens:
    """M response tokens that the objective's gate weighed, those of a sequence beside each other.

    With a KL penalty the tokens of zero-variance groups carry its gradient. They are not here.

    >>> one = np.ones(3)
    >>> tokens = GatedTokens(np.log([1.0, 2.0, 0.5]), one, one, np.array([1.0, 1.0, -1.0]), np.array([0, 0, 1]), (0, 4))
    >>> tokens.lengths_B.tolist(), tokens.starts_B.tolist(), tokens.positive_B.tolist(), tokens.ratio_M.tolist()
    ([2, 1], [0, 2], [True, False], [1.0, 2.0, 0.5])
    """

    log_ratio_M: Floats
    weight_M: Floats
    """Gate weight f'(r)."""
    slope_M: Floats
    """d value / d log pi."""
    advantage_M: Floats
    sequence_M: Places
    """Sequence of each token, ascending without gaps."""
    sequence_ids: tuple[int, ...]
    """Where each of those sequences stands in the mini-batch."""
    entropy_M: Floats | None = None
    loss_weight_M: Floats | None = None
    old_logprob_M: Floats | None = None

    def __len__(self) -> int:
        return len(self.log_ratio_M)

    @cached_property
    def ratio_M(self) -> Floats:
        """Return r, within what the objectives bound it to."""
        return np.exp(np.clip(self.log_ratio_M, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))

    @cached_property
    def lengths_B(self) -> Places:
        """Return the tokens of each sequence."""
        return np.bincount(self.sequence_M, minlength=len(self.sequence_ids))

    @cached_property
    def starts_B(self) -> Places:
        """Return the first token of each sequence."""
        starts: Places = np.cumsum(self.lengths_B) - self.lengths_B
        return starts

    @cached_property
    def positive_B(self) -> NDArray[np.bool_]:
        """Return the sequences with A > 0."""
        return self.advantage_M[self.starts_B] > 0

    @cached_property
    def sides(self) -> dict[str, NDArray[np.bool_]]:
        """Yield the tokens with A > 0 and with A <= 0, as the temperatures tell them apart, where there are any."""
        positive_M = self.advantage_M > 0
        return {name: side for name, side in zip(SIDES, (positive_M, ~positive_M), strict=True) if side.any()}

    def sequence_mean(self, values_M: Floats) -> Floats:
        """Average over the tokens of each sequence. (M,) -> (B,)."""
        means: Floats = np.add.reduceat(values_M, self.starts_B) / self.lengths_B
        return means


def gated_tokens(result: UpdateResult) -> GatedTokens:
    """Collect what the objective's gate weighed in an update."""
    arrays: dict[str, Floats | None] = {
        name: _array(getattr(result, name))
        for name in ("log_ratio_M", "weight_M", "slope_M", "advantage_M", "entropy_M", "loss_weight_M", "old_logprob_M")
    }
    sequence_M, sequence_ids = result.sequence_M.cpu().numpy(), result.sequence_ids
    if result.kl_M is not None:
        kept_M = arrays["advantage_M"] != 0
        numbers, sequence_M = np.unique(sequence_M[kept_M], return_inverse=True)
        sequence_ids = tuple(sequence_ids[i] for i in numbers.tolist())
        arrays = {name: None if values is None else values[kept_M] for name, values in arrays.items()}
    return GatedTokens(sequence_M=sequence_M, sequence_ids=sequence_ids, **arrays)  # type: ignore[arg-type]


def _array(tensor: Tensor | None) -> Floats | None:
    return None if tensor is None else tensor.detach().double().cpu().numpy()
