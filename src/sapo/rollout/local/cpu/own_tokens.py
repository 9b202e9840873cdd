"""The rows' own keys and values as packed.c has them.

Blocks of LANES keys whose numbers lie side by side, so that a step reads memory in order; in the model's own precision,
which the kernel widens as it reads. Rows stay where they are when others leave: `place_R` says where each one is.
"""

from __future__ import annotations

import numpy as np
import torch

from sapo.rollout.local.cpu.native import LANES
from sapo.rollout.local.cpu.packed import fresh_memory


class OwnTokens:
    """Keys and values of the tokens that rows have drawn.

    Args:
        rows, length: sequences and most tokens of each.
        layers, kv_heads, size: of the model, all layers alike.
        dtype: of the model.
    """

    def __init__(self, rows: int, length: int, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
        self.length = -(-length // LANES) * LANES
        shape = (2, rows * kv_heads * self.length * size)
        memory = fresh_memory(layers * 2 * shape[1] * dtype.itemsize)
        self.layers = list(memory.view(dtype).view(layers, *shape))
        self.place_R = np.arange(rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Move rows `source` to rows `target`, which give them their places."""
        self.place_R[target], self.place_R[source] = self.place_R[source], self.place_R[target]
