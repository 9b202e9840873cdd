"""The key-value cache of the local engine: allocated once per call, one row per sequence, no padding, no concatenation.

Rows in use are always the first ones, so that a decode step works on plain slices; when a row finishes, the last row in
use moves into its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapo.model.attention import attention


class KVCache:
    """Keys and values of up to `rows` sequences of up to `length` tokens, per layer.

    A layer's tensors are allocated when its first keys arrive, since only they tell its heads and dtype.
    """

    def __init__(self, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write_prefix(self, layer: int, row: int, count: int, key_KhD: Tensor, value_KhD: Tensor) -> None:
        """Give `count` rows from `row` on the same prefix: keys and values (K, kv heads, D)."""
        keys, values = self._layer(layer, key_KhD, value_KhD)
        stop = key_KhD.shape[0]
        keys[row : row + count, :, :stop] = key_KhD.transpose(0, 1)
        values[row : row + count, :, :stop] = value_KhD.transpose(0, 1)

    def append(self, layer: int, length_R: Tensor, key_RhD: Tensor, value_RhD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token per row at its length; return the layer's (rows, kv heads, length, D) tensors."""
        keys, values = self._layer(layer, key_RhD, value_RhD)
        row_R = torch.arange(length_R.shape[0], device=length_R.device)
        keys[row_R, :, length_R] = key_RhD
        values[row_R, :, length_R] = value_RhD
        return keys, values

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy rows `source` over rows `target`, their first `length` tokens."""
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            self.layers[layer] = (
                key.new_zeros(self.rows, key.shape[1], self.length, key.shape[2]),
                value.new_zeros(self.rows, value.shape[1], self.length, value.shape[2]),
            )
        return self.layers[layer]


class DecodeLayout:
    """One new token for each of the first R rows of a cache.

    Args:
        cache: where the new keys and values are written.
        length_R: tokens each row holds before this one: the position the new token is written to.
    """

    def __init__(self, cache: KVCache, length_R: Tensor) -> None:
        self.cache = cache
        self.length_R = length_R
        self.num_keys = int(length_R.max()) + 1
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        keys, values = self.cache.append(layer, self.length_R, key, value)
        rows = query.shape[0]
        output_RH1D = attention(
            query[:, :, None],
            keys[:rows, :, : self.num_keys],
            values[:rows, :, : self.num_keys],
            self._mask(sliding_window, query.dtype),
            scaling,
            softcap,
        )
        return output_RH1D[:, :, 0]

    def _mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        if (sliding_window, dtype) not in self._masks:
            position_K = torch.arange(self.num_keys, device=self.length_R.device)
            hidden_RK = position_K > self.length_R[:, None]
            if sliding_window is not None:
                hidden_RK |= position_K <= self.length_R[:, None] - sliding_window
            mask_RK = torch.zeros(hidden_RK.shape, dtype=dtype, device=hidden_RK.device)
            self._masks[sliding_window, dtype] = mask_RK.masked_fill_(hidden_RK, float("-inf"))[:, None, None]
        return self._masks[sliding_window, dtype]
