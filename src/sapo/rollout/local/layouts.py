"""How the engine's tokens find their keys in the cache: whole prompts in prefill, one new token a row in a decode step.

A decode step multiplies the queries of a whole group with its prompt at once, those of all rows with the preamble, and
each row's with its suffix; one softmax joins the three. On a CPU one kernel does a layer's step (cpu/native.py) where
there is a compiler; otherwise, on a GPU and for capped scores, torch's operations do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sapo.data import Segment
from sapo.model.attention import attention, softmax_with_sinks
from sapo.model.products import wide_support
from sapo.model.state_tree import KeptStates, TreeStates
from sapo.rollout.local.cache import KVCache, Pool, cache_dtype
from sapo.rollout.local.cpu.native import LANES, kernels
from sapo.rollout.local.cpu.packed import Places
from sapo.rollout.local.places import NativeStep
from sapo.rollout.local.row_states import DecodeStates


class PrefillLayout:
    """Whole prompts, packed one after the other, behind a preamble computed before.

    Args:
        cache: where their keys and values are stored.
        groups: whose prompts, in packed order; None for the preamble itself.
    """

    def __init__(self, cache: KVCache, groups: Sequence[int] | None, device: torch.device) -> None:
        self.preamble = cache.preamble if groups is not None and cache.preamble.length else None
        lengths = [cache.preamble.length] if groups is None else [int(cache.prompt_length[g]) for g in groups]
        starts = np.cumsum([0, *lengths])
        self.parts: list[tuple[Pool, Tensor, Tensor, tuple[int, int]]] = []
        output = np.empty(starts[-1], dtype=np.int64)
        offset = 0
        for pool in [cache.preamble] if groups is None else cache.pools:
            inside = [0] if groups is None else [i for i, g in enumerate(groups) if cache.pool_of[g] is pool]
            if not inside:
                continue
            longest = max(lengths[i] for i in inside)
            # Padded with the last token: it comes after all else, so that nothing reads what padding computes.
            index = np.stack([starts[i] + np.minimum(np.arange(longest), lengths[i] - 1) for i in inside])
            for row, i in enumerate(inside):
                output[starts[i] : starts[i + 1]] = offset + row * longest + np.arange(lengths[i])
            offset += index.size
            slots = [0] if groups is None else [pool.groups.index(groups[i]) for i in inside]
            place = torch.from_numpy(index.ravel()).to(device)
            self.parts.append((pool, torch.tensor(slots, device=device), place, (len(inside), longest)))
        self.output = torch.from_numpy(output).to(device)
        self.calls: dict[int, int] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._lengths, self._device = lengths, device
        self._before = cache.preamble_states if self.preamble is not None else None
        self.kept = KeptStates()
        """The states that the forward leaves behind, of each prompt."""

    @cached_property
    def states(self) -> TreeStates:
        """Return where recurrent layers find the preamble's states, and leave those of each prompt."""
        starts = np.cumsum([0, *self._lengths]).tolist()
        prompts = [Segment(start, length, -1) for start, length in zip(starts, self._lengths, strict=False)]
        paths = [np.arange(p.start, p.stop) for p in prompts]
        return TreeStates(prompts, paths, self._device, before=self._before, keep=self.kept)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attend causally from each prompt to the preamble and to itself; see `Layout.attend`."""
        outputs = []
        for pool, slots, place, size in self.parts:
            query_bQHD, key_bKhD, value_bKhD = (
                t.index_select(0, place).unflatten(0, size) for t in (query, key, value)
            )
            pool.write(layer, slots, key_bKhD, value_bKhD)
            if self.preamble is not None:
                keys_hDK, values_hKD = self.preamble.read(layer)
                keys, values = keys_hDK.permute(2, 0, 1).to(key.dtype), values_hKD.transpose(0, 1).to(value.dtype)
                key_bKhD = torch.cat([keys.expand(size[0], -1, -1, -1), key_bKhD], dim=1)
                value_bKhD = torch.cat([values.expand(size[0], -1, -1, -1), value_bKhD], dim=1)
            output_bHQD = attention(
                query_bQHD.transpose(1, 2),
                key_bKhD.transpose(1, 2),
                value_bKhD.transpose(1, 2),
                self._mask(size[1], sliding_window, query),
                scaling,
                softcap,
                sinks_H,
            )
            outputs.append(output_bHQD.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.output)

    def _mask(self, length: int, sliding_window: int | None, like: Tensor) -> Tensor:
        if (length, sliding_window, like.dtype) not in self._masks:  # one per layout, not one per layer
            before = 0 if self.preamble is None else self.preamble.length
            at_Q1 = before + torch.arange(length, device=like.device)[:, None]
            at_K = torch.arange(before + length, device=like.device)
            hidden_QK = at_K > at_Q1
            if sliding_window is not None:
                hidden_QK |= at_K <= at_Q1 - sliding_window
            mask_QK = torch.zeros(hidden_QK.shape, dtype=like.dtype, device=like.device)
            self._masks[length, sliding_window, like.dtype] = mask_QK.masked_fill_(hidden_QK, float("-inf"))[None, None]
        return self._masks[length, sliding_window, like.dtype]


@dataclass(frozen=True)
class Part:
    """The rows of one pool, gathered by group.

    Two groups of two rows and one: slots 0 and 1, gathered as rows 0, 1 and 2, 2, the last of them padding.
    """

    pool: Pool
    gather: Tensor
    """(groups * G,) rows of each group, padded with one of its own."""
    groups: int
    num_keys: int
    """Tokens of the longest prompt of these rows."""


class Arrangement:
    """Tell which rows belong to which prompts: made anew when rows come or go, not at every step.

    Args:
        cache: whose slots are meant.
        group_R: the group of each row in use.
    """

    def __init__(self, cache: KVCache, group_R: np.ndarray, device: torch.device) -> None:
        self.cache = cache
        self.device = device
        self.prompt_R = cache.prompt_length[group_R]
        self._group_R, self._order = group_R.copy(), np.argsort(group_R, kind="stable")
        native = kernels(device, torch.float32) is not None
        self.native = NativeStep(cache, self._group_R, self._order) if native else None

    @cached_property
    def gathered(self) -> tuple[list[Part], Tensor]:
        """Gather the rows of each pool in use, and (R,) where each row stands among those: for torch's operations."""
        cache, group_R, order = self.cache, self._group_R, self._order
        parts: list[Part] = []
        inverse = np.empty(len(group_R), dtype=np.int64)
        groups, first, count = np.unique(group_R[order], return_index=True, return_counts=True)
        rows_of = {int(g): order[f : f + c] for g, f, c in zip(groups, first, count, strict=True)}
        offset = 0
        for pool in cache.pools:
            # Groups just prefilled have the last slots, and no row that decodes yet. Those between that have none,
            # because all their rows are parked, are given one that nobody reads.
            used = max((slot + 1 for slot, g in enumerate(pool.groups) if g in rows_of), default=0)
            if not used:
                continue
            present = pool.groups[:used]
            widest = max(len(rows_of[g]) for g in present if g in rows_of)
            gather = np.empty((used, widest), dtype=np.int64)
            for slot, g in enumerate(present):
                rows = rows_of.get(g, order[:0])
                gather[slot, : len(rows)], gather[slot, len(rows) :] = rows, (*rows, order[0])[0]
                inverse[rows] = offset + slot * widest + np.arange(len(rows))
            offset += gather.size
            num_keys = max(int(cache.prompt_length[g]) for g in present if g in rows_of)
            parts.append(Part(pool, torch.from_numpy(gather.ravel()).to(self.device), len(present), num_keys))
        return parts, torch.from_numpy(inverse).to(self.device)

    @property
    def even(self) -> bool:
        """Return whether every row's prompt has the same length, so that none is padded."""
        return bool((self.prompt_R == self.prompt_R[0]).all())


class _Joined(ABC):
    """Attention of each of the first R rows to preamble, prompt and suffix, in torch's operations.

    Args:
        cache: where the suffixes are, to which the new tokens are added.
        parts: the rows of each pool in use.
        inverse_R: where a row stands among the gathered rows of all parts.
        place: tokens each row has stored before this one; a number where it is the same for all.
        num_own: tokens of a row's suffix that are looked at, this one included.
    """

    def __init__(
        self, cache: KVCache, parts: Sequence[Part], inverse_R: Tensor, place: Tensor | int, num_own: int
    ) -> None:
        self.cache, self.parts, self.inverse, self.place, self.num_own = cache, parts, inverse_R, place, num_own
        self.num_keys = max(part.num_keys for part in parts)
        self.row_index: Tensor | None = None  # made once for all layers, where rows have places of their own
        if isinstance(place, Tensor):
            self.row_index = torch.arange(len(place), device=place.device)
        self.calls: dict[int, int] = {}

    @abstractmethod
    def _mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the (R, 1, 1, K) additive mask; None where every row sees every key."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """See `Layout.attend`."""
        keys, values = self.cache.append(layer, self.place, key, value, self.row_index)
        rows, heads, size = query.shape
        kv_heads = key.shape[1]
        halved = keys.dtype in (torch.bfloat16, torch.float16)
        scaled_RHD = query.to(keys.dtype) if halved else query.to(keys.dtype) * scaling
        query_RhrD = scaled_RHD.reshape(rows, kv_heads, heads // kv_heads, size)
        own_RhrK = _product(query_RhrD, keys[:rows, :, :, : self.num_own])
        scores_RhrK = torch.cat([*self._prefix_scores(layer, query_RhrD), own_RhrK], dim=-1)
        mask = self._mask(sliding_window, scores_RhrK.dtype)
        # Scores are float32 where a scaled query would have been rounded once more.
        late = scaling if halved else 1.0
        if softcap is not None:
            scores_RhrK = (
                scores_RhrK.mul_(late / softcap).tanh_().mul_(softcap) if halved else _cap(scores_RhrK, softcap)
            )
            late = 1.0
        if mask is not None and late != 1.0:
            scores_RhrK = torch.add(mask, scores_RhrK, alpha=late)
        elif mask is not None:
            scores_RhrK += mask
        elif late != 1.0:
            scores_RhrK *= late
        sinks_hr1 = None if sinks_H is None else sinks_H.view(kv_heads, -1, 1)
        weight_RhrK = softmax_with_sinks(scores_RhrK, sinks_hr1).to(values.dtype)
        output_RhrD = _product(weight_RhrK[..., -self.num_own :], values[:rows, :, : self.num_own])
        self._add_prefix(layer, weight_RhrK, output_RhrD)
        return output_RhrD.reshape(rows, heads, value.shape[2]).to(query.dtype)

    def _prefix_scores(self, layer: int, query_RhrD: Tensor) -> list[Tensor]:
        """Compute the scores of the preamble, if there is one, and of the prompts, (R, kv heads, heads of each, K)."""
        rows, kv_heads, repeats, size = query_RhrD.shape
        found = []
        if self.cache.preamble.length:
            keys_hDK, _ = self.cache.preamble.read(layer)
            scores_hRrK = _product(query_RhrD.transpose(0, 1).reshape(kv_heads, rows * repeats, size), keys_hDK)
            found.append(scores_hRrK.unflatten(1, (rows, repeats)).transpose(0, 1))
        parts = []
        for part in self.parts:
            keys_ghDK = part.pool.layers[layer][0][: part.groups, :, :, : part.num_keys]
            query_ghXD = _by_group(query_RhrD, part)
            scores = _product(query_ghXD, keys_ghDK).unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)
            missing = self.num_keys - part.num_keys
            parts.append(torch.nn.functional.pad(scores, (0, missing)) if missing else scores)
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        found.append(together.index_select(0, self.inverse))
        return found

    def _add_prefix(self, layer: int, weight_RhrK: Tensor, output_RhrD: Tensor) -> None:
        """Add what the preamble and the prompts give, in place."""
        rows, kv_heads, repeats, _ = weight_RhrK.shape
        before = self.cache.preamble.length
        if before:
            _, values_hKD = self.cache.preamble.read(layer)
            weight_hXK = weight_RhrK[..., :before].transpose(0, 1).reshape(kv_heads, rows * repeats, before)
            output_RhrD += _product(weight_hXK, values_hKD).unflatten(1, (rows, repeats)).transpose(0, 1)
        parts = []
        for part in self.parts:
            values_ghKD = part.pool.layers[layer][1][: part.groups, :, : part.num_keys]
            weight_ghXK = _by_group(weight_RhrK[..., before : before + part.num_keys], part)
            parts.append(_product(weight_ghXK, values_ghKD).unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1))
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        output_RhrD += together.index_select(0, self.inverse)


class DecodeLayout:
    """One new token for each of the first R rows of a cache.

    Args:
        arrangement: of those rows.
        length_R: tokens each row has drawn and stored before this one, on the host.
    """

    def __init__(self, arrangement: Arrangement, length_R: np.ndarray) -> None:
        self.arrangement = arrangement
        self.length_R = length_R
        self.calls: dict[int, int] = {}

    @cached_property
    def states(self) -> DecodeStates:
        """Return the states of the rows."""
        return DecodeStates(self.arrangement.cache.row_states.kept)

    @cached_property
    def _by_torch(self) -> _DecodeByTorch:
        return _DecodeByTorch(self.arrangement, self.length_R)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attend by the compiled kernel where it can be used; see `Layout.attend`."""
        native = self.arrangement.native
        if native is not None and softcap is None and sinks_H is None and _suits_kernel(query, key, value):
            return native.attend(layer, self.length_R, query, key, value, scaling, sliding_window)
        return self._by_torch.attend(layer, query, key, value, scaling, sliding_window, softcap, sinks_H)

    def places(self, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> Places:
        """See `sapo.rollout.local.cpu.packed.OneTokenEach`."""
        assert self.arrangement.native is not None, "packed.c is compiled where kernels.c is"
        return self.arrangement.native.places(layers, kv_heads, size, dtype)


class _DecodeByTorch(_Joined):
    """Compute what `DecodeLayout` leaves to torch's operations, with its arguments."""

    def __init__(self, arrangement: Arrangement, length_R: np.ndarray) -> None:
        self.arrangement, self.length_R = arrangement, length_R
        self.uniform = bool((length_R == length_R[0]).all())
        place = int(length_R[0]) if self.uniform else torch.from_numpy(length_R).to(arrangement.device)
        super().__init__(arrangement.cache, *arrangement.gathered, place, int(length_R.max()) + 1)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor | None] = {}

    def _mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor | None:
        if (sliding_window, dtype) not in self._masks:
            mask = None
            if sliding_window is not None or not (self.uniform and self.arrangement.even):
                hidden_RK = torch.from_numpy(self._hidden(sliding_window))
                mask = torch.zeros(hidden_RK.shape, dtype=dtype).masked_fill_(hidden_RK, float("-inf"))[:, None, None]
                mask = mask.to(self.inverse.device)
            self._masks[sliding_window, dtype] = mask
        return self._masks[sliding_window, dtype]

    def _hidden(self, sliding_window: int | None) -> np.ndarray:
        """Return (R, K) bool: keys beyond a row's prompt or suffix, or further back than the window."""
        before, prompt_R1 = self.cache.preamble.length, self.arrangement.prompt_R[:, None]
        prompt_K, own_K = np.arange(self.num_keys), np.arange(self.num_own)
        hidden_RK = np.zeros((len(self.length_R), before + len(prompt_K) + len(own_K)), dtype=bool)
        hidden_RK[:, before : -len(own_K)] = prompt_K >= prompt_R1
        hidden_RK[:, -len(own_K) :] = own_K > self.length_R[:, None]
        if sliding_window is not None:
            at_R1 = before + prompt_R1 + self.length_R[:, None]
            at_RK = np.empty(hidden_RK.shape, dtype=np.int64)
            at_RK[:, : before + len(prompt_K)] = np.arange(before + len(prompt_K))
            at_RK[:, -len(own_K) :] = before + prompt_R1 + own_K
            hidden_RK |= at_RK <= at_R1 - sliding_window
        return hidden_RK


class StaticLayout(_Joined):
    """Attend as `DecodeLayout` does, from numbers that stay on the device, in shapes that do not depend on them.

    What a CUDA graph repeats (device_steps.py): `DecodeLayout` reads lengths on the host to compute no more than it
    must; this one computes on whole prompts and on `num_own` tokens of each row, and masks what is not there.

    Args:
        prompt_R: tokens of each row's prompt, the preamble left out.
        place_R: tokens each row has stored before this one, below `num_own`.
        live_R: which rows store the new token: the others have ended, or wait in their places (`KVCache.spare`).
    """

    def __init__(
        self,
        cache: KVCache,
        parts: Sequence[Part],
        inverse_R: Tensor,
        prompt_R: Tensor,
        place_R: Tensor,
        live_R: Tensor,
        num_own: int,
    ) -> None:
        super().__init__(cache, parts, inverse_R, place_R, num_own)
        assert cache.spare, "rows that do not live need a place to write to"
        assert self.row_index is not None
        self.row_index = torch.where(live_R, self.row_index, cache.rows)
        self.prompt_R, self.place_R = prompt_R, place_R
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def _mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        if (sliding_window, dtype) not in self._masks:
            hidden_RK = self._hidden(sliding_window)
            mask_RK = torch.zeros(hidden_RK.shape, dtype=dtype, device=hidden_RK.device)
            self._masks[sliding_window, dtype] = mask_RK.masked_fill_(hidden_RK, float("-inf"))[:, None, None]
        return self._masks[sliding_window, dtype]

    def _hidden(self, sliding_window: int | None) -> Tensor:
        """Return (R, K) bool; see `_DecodeByTorch._hidden`."""
        before, device, rows = self.cache.preamble.length, self.place_R.device, len(self.place_R)
        prompt_R1, place_R1 = self.prompt_R[:, None], self.place_R[:, None]
        shared_K = torch.arange(before + self.num_keys, device=device)
        own_K = torch.arange(self.num_own, device=device)
        hidden_RK = torch.cat([shared_K >= before + prompt_R1, own_K > place_R1], dim=1)
        if sliding_window is not None:
            at_RK = torch.cat([shared_K.expand(rows, -1), before + prompt_R1 + own_K], dim=1)
            hidden_RK |= at_RK <= before + prompt_R1 + place_R1 - sliding_window
        return hidden_RK


def _suits_kernel(query_RHD: Tensor, key_RhD: Tensor, value_RhD: Tensor) -> bool:
    """Return whether the kernel reads a cache of such keys and values: float32, in whole vector registers."""
    size = query_RHD.shape[2]
    kept = {cache_dtype(t.dtype, t.device) for t in (key_RhD, value_RhD)}
    return kept == {torch.float32} and size == value_RhD.shape[2] and size % LANES == 0


def _product(left_XQK: Tensor, right_XKD: Tensor) -> Tensor:
    """Multiply batches, left @ right, half precision in float32: the kernels of training keep scores and sums so."""
    if left_XQK.dtype not in (torch.bfloat16, torch.float16):
        return left_XQK @ right_XKD
    if left_XQK.device.type != "cuda" or "bmm" not in wide_support(left_XQK.device, left_XQK.dtype):
        return left_XQK.float() @ right_XKD.float()
    product = torch.bmm(left_XQK.flatten(0, -3), right_XKD.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, left_XQK.shape[:-2])


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap)


def _by_group(source_RhrX: Tensor, part: Part) -> Tensor:
    """Arrange as (groups, kv heads, rows of a group * heads of each, X): a group's rows side by side."""
    by_row = source_RhrX.index_select(0, part.gather).unflatten(0, (part.groups, -1))
    return by_row.transpose(1, 2).flatten(2, 3)
