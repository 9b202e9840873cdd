"""The rows' own keys and values as packed.c has them, and where all that a decode step looks at is.

Blocks of LANES keys whose numbers lie side by side, so that a step reads memory in order; in the model's own precision,
which the kernel widens as it reads; and rows that stay where they are when others leave, for `place_R` says where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sapo.model.native import LANES
from sapo.model.packed import Places, fresh_memory

if TYPE_CHECKING:
    from sapo.rollout.layouts import NativeStep


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
        """Rows `source` become rows `target`, and these get their places."""
        self.place_R[target], self.place_R[source] = self.place_R[source], self.place_R[target]


def places_of(step: NativeStep, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> Places:
    """What packed.c is told of an arrangement; the same until rows come or go."""
    cache, before = step.cache, step.cache.preamble
    if cache.own_tokens is None:
        cache.own_tokens = OwnTokens(cache.rows, cache.length, layers, kv_heads, size, dtype)
    own = cache.own_tokens
    given = [before.layers[i] if before.length else () for i in range(layers)]
    return Places(
        order_R=step.order,
        pool_R=step.pool_R,
        slot_R=step.slot_R,
        prompt_R=step.prompt_R,
        place_R=own.place_R[: len(step.order)].copy(),
        bases_LP3=np.stack([step.bases(i) for i in range(layers)]),
        preamble_L2=np.array([[t.data_ptr() for t in pair] or [0, 0] for pair in given]),
        preamble_stride=before.layers[0][0].shape[3] if before.length else 0,
        preamble=before.length,
        own_L2=np.array([[t.data_ptr() for t in pair] for pair in own.layers]),
        length=own.length,
        longest=step.longest,
    )
