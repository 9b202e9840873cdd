"""The key-value cache of the local engine: what a prompt's samples share is kept once, and each row keeps only its own.

    preamble    what all prompts of the call begin with: once
    prompt      the rest of each prompt: once for its group, in a pool of prompts of similar length
    suffix      the tokens a row has drawn: one row per sequence, no padding, no concatenation

Rows and slots in use are always the first ones, so that a step works on plain slices: when one is freed, the last in
use moves into its place.

Keys lie transposed, (heads, D, tokens), tokens padded to whole vector registers: both products of a step (layouts.py)
then read memory in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sapo.model.state_tree import KeptStates
from sapo.rollout.local.cpu.native import LANES
from sapo.rollout.local.cpu.own_tokens import OwnTokens
from sapo.rollout.local.row_states import RowStates

# Prompts share a pool when the shorter would be padded to no more than twice its length; short ones always do, since a
# call of a kernel costs more than the padding.
POOL_RATIO = 0.5
POOL_SLACK = 32

# Slots for each group that the rows would hold whole: a group keeps its slot until its last row has finished, and the
# rows that its others left are given to further groups meanwhile.
SLOTS_PER_GROUP = 2


WASTE = 1.5
"""How much longer than the longest prompt of another call a pool may be that is used again for it."""


@dataclass
class Pool:
    """Prompts of similar length, one slot each, padded to the longest of the pool.

    The first `len(groups)` slots are in use; `groups` says by which group. A layer's tensors, keys (slots, kv heads, D,
    length) and values (slots, kv heads, length, D), are allocated when its first keys arrive, since only they tell its
    heads and dtype.
    """

    slots: int
    length: int
    groups: list[int] = field(default_factory=list)
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def write(self, layer: int, slots: Tensor, key_bKhD: Tensor, value_bKhD: Tensor) -> None:
        """Store the keys and values of whole prompts, one slot each."""
        if layer not in self.layers:
            self.layers[layer] = _allocate(self.slots, self.length, key_bKhD[0, 0], value_bKhD[0, 0])
        keys, values = self.layers[layer]
        stop = key_bKhD.shape[1]
        keys[slots, :, :, :stop] = key_bKhD.permute(0, 2, 3, 1).to(keys.dtype)
        values[slots, :, :stop] = value_bKhD.transpose(1, 2).to(values.dtype)

    def read(self, layer: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys (kv heads, D, length) and values (kv heads, length, D) of one slot, without the padding."""
        keys, values = self.layers[layer]
        return keys[slot, :, :, : self.length], values[slot, :, : self.length]

    def release(self, group: int) -> None:
        """Free the slot of a group; the last slot in use takes its place."""
        slot, last = self.groups.index(group), len(self.groups) - 1
        if slot != last:
            for keys, values in self.layers.values():
                keys[slot], values[slot] = keys[last], values[last]
            self.groups[slot] = self.groups[last]
        self.groups.pop()


class KVCache:
    """Keys and values of up to `rows` sequences of some groups that share their prompts, per layer.

    Args:
        rows: sequences decoded together.
        new_tokens: most tokens a row draws.
        prompt_lengths: tokens of each group's prompt, the preamble left out.
        samples: rows of each group, at most `rows`.
        preamble: tokens that all prompts begin with.
        rounded: pools have one of few sizes, so that those of another call are likely to be the same (`begin`).
        spare: one more row, which nobody reads, is there for what rows that do not live would store (device_steps.py).
    """

    def __init__(
        self,
        rows: int,
        new_tokens: int,
        prompt_lengths: Sequence[int],
        samples: Sequence[int],
        preamble: int = 0,
        rounded: bool = False,
        spare: bool = False,
    ) -> None:
        self.rows = rows
        self.rounded, self.spare = rounded, spare
        self.length = max(1, new_tokens - 1)  # no later token attends to the last one drawn
        self.prompt_length = np.asarray(prompt_lengths, dtype=np.int64)
        self.preamble = Pool(1, preamble)
        self.pools: list[Pool] = []
        self.pool_of: dict[int, Pool] = {}
        """Of the groups that wait for a slot or have one."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.preamble_states, self.row_states = KeptStates(), RowStates(rows)
        self.own_tokens: OwnTokens | None = None
        """Replaces `layers` where packed.c decodes."""
        self._pool(range(len(samples)), samples)

    def _pool(self, groups: Sequence[int], samples: Sequence[int]) -> None:
        """Make pools for the prompts of some groups, whose rows are given."""
        for members, slots, length in self._plan(groups, samples):
            pool = Pool(slots, length)
            self.pools.append(pool)
            self.pool_of.update((groups[i], pool) for i in members)

    def _plan(self, groups: Sequence[int], samples: Sequence[int]) -> list[tuple[list[int], int, int]]:
        """Return the pools for some groups: whose prompts, of how many slots and which length."""
        plan = []
        for members in _similar(self.prompt_length[list(groups)]):
            slots = min(len(members), SLOTS_PER_GROUP * (self.rows // min(samples[i] for i in members)))
            length = int(self.prompt_length[[groups[i] for i in members]].max())
            plan.append(
                (members, _round_size(slots), _round_size(length)) if self.rounded else (members, slots, length)
            )
        return plan

    def begin(self, prompt_lengths: Sequence[int], samples: Sequence[int], preamble: int) -> bool:
        """Serve the groups of another call with the pools there are; return whether they hold them.

        What was stored stays and is not read. Where they do not hold them, nothing has changed.
        """
        before = self.prompt_length
        self.prompt_length = np.asarray(prompt_lengths, dtype=np.int64)
        groups = range(len(samples))
        plan = self._plan(groups, samples)
        fits = preamble == self.preamble.length and len(plan) == len(self.pools)
        for (_, slots, length), pool in zip(plan, self.pools, strict=False):
            fits = fits and slots <= pool.slots and length <= pool.length <= WASTE * length
        if not fits:
            self.prompt_length = before
            return False
        self.pool_of = {}
        for (members, _, _), pool in zip(plan, self.pools, strict=True):
            pool.groups.clear()
            self.pool_of.update((groups[i], pool) for i in members)
        return True

    def add(self, prompt_lengths: Sequence[int], samples: Sequence[int]) -> None:
        """Take up further groups, behind those there are; pools that no group uses any more are given back."""
        first = len(self.prompt_length)
        self.prompt_length = np.concatenate([self.prompt_length, np.asarray(prompt_lengths, dtype=np.int64)])
        used = {id(pool) for pool in self.pool_of.values()}
        self.pools = [pool for pool in self.pools if id(pool) in used]
        self._pool(range(first, len(self.prompt_length)), samples)

    def grow(self, new_tokens: int) -> None:
        """Make room for so many new tokens of each row; those that are there stay."""
        length = max(1, new_tokens - 1)
        if length <= self.length:
            return
        self.length = length
        if self.own_tokens is not None:
            self.own_tokens.grow(length)
        for layer, (keys, values) in self.layers.items():
            more = _padded(length) - keys.shape[3]
            if more > 0:
                pad = torch.nn.functional.pad
                self.layers[layer] = pad(keys, (0, more)), pad(values, (0, 0, 0, more))

    def deepen(self, rows: int) -> None:
        """Make room for so many rows; those that are there stay."""
        more = rows - self.rows
        if more <= 0:
            return
        self.rows = rows
        if self.own_tokens is not None:
            self.own_tokens.deepen(rows)
        self.row_states.deepen(rows)
        for layer, pair in self.layers.items():
            keys, values = (torch.cat([held, held.new_zeros(more, *held.shape[1:])]) for held in pair)
            self.layers[layer] = keys, values

    @property
    def num_places(self) -> int:
        """Return the tokens that a layer has room for."""
        pools = [self.preamble, *self.pools]
        own = (self.rows + self.spare) * _padded(self.length)
        return sum(p.slots * _padded(p.length) for p in pools if p.length) + own

    @property
    def nbytes(self) -> int:
        """Return the bytes of the keys and values there are."""
        kept = [self.layers, *(pool.layers for pool in (self.preamble, *self.pools))]
        return sum(tensor.nbytes for layers in kept for pair in layers.values() for tensor in pair)

    def has_slot(self, group: int) -> bool:
        """Return whether a slot is free for a group's prompt."""
        pool = self.pool_of[group]
        return len(pool.groups) < pool.slots

    def admit(self, group: int) -> None:
        """Give a group a slot for its prompt."""
        pool = self.pool_of[group]
        assert self.has_slot(group), f"no slot is free for group {group}"
        pool.groups.append(group)

    def forget(self, group: int) -> None:
        """Leave out a group that waits for a slot."""
        del self.pool_of[group]

    def release(self, group: int) -> None:
        """Free the slot of a group whose rows have all finished."""
        self.pool_of.pop(group).release(group)

    def append(
        self,
        layer: int,
        length_R: Tensor | int,
        key_RhD: Tensor,
        value_RhD: Tensor,
        row_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write one token for each of the first R rows behind what it holds; return the layer's keys and values.

        Args:
            length_R: tokens each row holds; a number where it is the same for all, which is several times cheaper.
            row_R: 0 .. R - 1, for those who have it; `rows`, the spare one, of a row that stores nothing.
        """
        keys, values = self.own(layer, key_RhD, value_RhD)
        rows = key_RhD.shape[0]
        if isinstance(length_R, int):
            keys[:rows, :, :, length_R].copy_(key_RhD)
            values[:rows, :, length_R].copy_(value_RhD)
        else:
            row_R = torch.arange(rows, device=length_R.device) if row_R is None else row_R
            keys[row_R, :, :, length_R] = key_RhD.to(keys.dtype)
            values[row_R, :, length_R] = value_RhD.to(values.dtype)
        return keys, values

    def own(self, layer: int, key_RhD: Tensor, value_RhD: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's suffixes: keys (rows, kv heads, D, length) and values (rows, kv heads, length, D)."""
        if layer not in self.layers:
            self.layers[layer] = _allocate(self.rows + self.spare, self.length, key_RhD[0], value_RhD[0])
        return self.layers[layer]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy rows `source` over rows `target`, their first `length` tokens."""
        if self.own_tokens is not None:
            self.own_tokens.move(source.numpy(), target.numpy())
        self.row_states.move(source, target)
        for keys, values in self.layers.values():
            keys[target, :, :, :length] = keys[source, :, :, :length]
            values[target, :, :length] = values[source, :, :length]


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision that keys and values are kept in.

    On a CPU products of bfloat16 round their results to bfloat16, scores too, where the attention kernels of training
    keep them in float32. The values stay those of the model.
    """
    return torch.float32 if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else dtype


def _round_size(count: int) -> int:
    """Round up to four sizes in each doubling.

    >>> [_round_size(n) for n in (1, 9, 33, 200, 256, 257)]
    [1, 10, 40, 224, 256, 320]
    """
    unit = 1 << max(0, (count - 1).bit_length() - 3) if count else 1
    return -(-count // unit) * unit


def _padded(length: int) -> int:
    """Return a length in whole vector registers, an odd number of them.

    At a distance of a power of two, the dimensions of a key would compete for the same few places of the processor's
    cache.
    """
    return (-(-length // LANES) | 1) * LANES


def _allocate(count: int, length: int, key_hD: Tensor, value_hD: Tensor) -> tuple[Tensor, Tensor]:
    dtype = cache_dtype(key_hD.dtype, key_hD.device)
    length = _padded(length)
    return (
        key_hD.new_zeros(count, *key_hD.shape, length, dtype=dtype),
        value_hD.new_zeros(count, value_hD.shape[0], length, value_hD.shape[1], dtype=dtype),
    )


def _similar(lengths: np.ndarray) -> list[list[int]]:
    """Group indices of similar lengths, the longest first."""
    members: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[members[-1][0]] if members else 0
        if members and (lengths[i] >= POOL_RATIO * longest or longest - lengths[i] <= POOL_SLACK):
            members[-1].append(i)
        else:
            members.append([i])
    return members
