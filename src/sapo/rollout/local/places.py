"""Addresses of all the keys and values that a decode step reads, as the kernels of kernels.c and packed.c take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sapo.rollout.local.cpu.native import kernels
from sapo.rollout.local.cpu.own_tokens import OwnTokens
from sapo.rollout.local.cpu.packed import Places

if TYPE_CHECKING:
    from sapo.rollout.local.cache import KVCache


class NativeStep:
    """An arrangement as the kernel `attend` of kernels.c reads it.

    Args:
        order: rows in the order of their groups, whose prompts then stay in the processor's cache.
    """

    def __init__(self, cache: KVCache, group_R: np.ndarray, order: np.ndarray) -> None:
        self.cache = cache
        self.pools = [pool for pool in cache.pools if pool.groups]
        place_of = {g: (number, slot) for number, pool in enumerate(self.pools) for slot, g in enumerate(pool.groups)}
        places_R2 = np.array([place_of[group] for group in group_R.tolist()], dtype=np.int64)
        self.order = np.ascontiguousarray(order)
        self.pool_R, self.slot_R = np.ascontiguousarray(places_R2.T)
        self.prompt_R = cache.prompt_length[group_R]
        self.longest = cache.preamble.length + int(self.prompt_R.max()) + cache.length
        self._found: dict[int, np.ndarray] = {}
        self._places: Places | None = None

    def attend(
        self,
        layer: int,
        length_R: np.ndarray,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Compute the (R, H, D) attention of each row to preamble, prompt and its own tokens, the new one included.

        Args:
            length_R: tokens that each row has stored before this one.
        """
        query_RHD, key_RhD, value_RhD = (_rows_of_float(t) for t in (query, key, value))
        keys, values = self.cache.own(layer, key_RhD, value_RhD)
        rows, heads, size = query_RHD.shape
        kv_heads = key_RhD.shape[1]
        output_RHD = torch.empty(rows, heads, size)
        before = self.cache.preamble
        before_keys, before_values = before.layers[layer] if before.length else (keys, values)
        factor = np.array([scaling], dtype=np.float32)
        length_R = np.ascontiguousarray(length_R, dtype=np.int64)
        # In the order of the enumeration in kernels.c.
        numbers = np.array(
            [
                *(t.data_ptr() for t in (query_RHD, key_RhD, value_RhD, output_RHD)),
                *(t.stride(0) for t in (query_RHD, key_RhD, value_RhD)),
                *(rows, kv_heads, heads // kv_heads, size, factor.ctypes.data, sliding_window or 0),
                *(torch.get_num_threads(), keys.data_ptr(), values.data_ptr(), keys.shape[3]),
                *(a.ctypes.data for a in (length_R, self.order, self.pool_R, self.slot_R, self.prompt_R)),
                *(self.bases(layer).ctypes.data, before_keys.data_ptr(), before_values.data_ptr()),
                *(before_keys.shape[3], before.length, self.longest),
            ],
            dtype=np.int64,
        )
        native = kernels(output_RHD.device, torch.float32)
        assert native is not None
        native.attend(numbers)
        return output_RHD.to(query.dtype)

    def bases(self, layer: int) -> np.ndarray:
        """Return the addresses of each pool's keys and values, and the tokens they have room for."""
        if layer not in self._found:
            layers = [pool.layers[layer] for pool in self.pools]
            self._found[layer] = np.array([(k.data_ptr(), v.data_ptr(), k.shape[3]) for k, v in layers])
        return self._found[layer]

    def places(self, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> Places:
        """See `sapo.rollout.local.cpu.packed.OneTokenEach`."""
        if self._places is None:
            self._places = places_of(self, layers, kv_heads, size, dtype)
        return self._places


def _rows_of_float(tensor_RHD: Tensor) -> Tensor:
    """Return each row's heads one after the other, in float32."""
    tensor_RHD = tensor_RHD.float()
    _, _, size = tensor_RHD.shape
    return tensor_RHD if tensor_RHD.stride()[1:] == (size, 1) else tensor_RHD.contiguous()


def places_of(step: NativeStep, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> Places:
    """Return what packed.c is told of an arrangement; the same until rows come or go."""
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
