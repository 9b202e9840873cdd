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
        self._lines, self._size, self._dtype = rows * kv_heads, size, dtype
        self.length, self.layers = self._allocate(layers, length)
        self.place_R = np.arange(rows)

    def _allocate(self, layers: int, length: int) -> tuple[int, list[torch.Tensor]]:
        length = -(-length // LANES) * LANES
        shape = (2, self._lines * length * self._size)
        memory = fresh_memory(layers * 2 * shape[1] * self._dtype.itemsize)
        return length, list(memory.view(self._dtype).view(layers, *shape))

    def grow(self, length: int) -> None:
        """Make room for so many tokens of each row; those that are there stay, as blocks follow each other in order."""
        if length <= self.length:
            return
        before = self.layers
        self.length, self.layers = self._allocate(len(before), length)
        for source, target in zip(before, self.layers, strict=True):
            held = source.view(2, self._lines, -1)
            target.view(2, self._lines, -1)[:, :, : held.shape[2]] = held

    def deepen(self, rows: int) -> None:
        """Make room for so many rows; those that are there stay."""
        have = len(self.place_R)
        if rows <= have:
            return
        before, held = self.layers, self._lines
        self._lines = held // have * rows
        self.length, self.layers = self._allocate(len(before), self.length)
        for source, target in zip(before, self.layers, strict=True):
            target.view(2, self._lines, -1)[:, :held] = source.view(2, held, -1)
        self.place_R = np.concatenate([self.place_R, np.arange(have, rows)])

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Move rows `source` to rows `target`, which give them their places."""
        self.place_R[target], self.place_R[source] = self.place_R[source], self.place_R[target]
