"""Context parallelism: the packed tokens of a micro-batch split over the ranks of a context group (Ulysses).

Each rank runs the decoder on a slice of the tokens. Attention is the only step that mixes tokens: there an all-to-all
gives each rank all tokens of a share of the heads, and another one gives them back (https://arxiv.org/abs/2309.14509).
All attention goes through a layout, so this is a layout and no change of a model. Targets are indices of packed tokens
and are never shifted, so nothing can go wrong where slices meet.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sapo.data import PackedBatch, PackedPictures, Segment
from sapo.data.packed import PER_TARGET
from sapo.model.attention import Layout, TreeLayout


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share one micro-batch, as one of them sees them.

    >>> ContextGroup(rank=1, size=2).bounds(5)
    [0, 2, 5]
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    """Process group of the device's tensors; None for the default one."""

    def bounds(self, tokens: int) -> list[int]:
        """Return where the ranks' slices of so many tokens begin, and the end."""
        return [tokens * i // self.size for i in range(self.size + 1)]

    def whole(self, own: Tensor, at: Tensor, length: int) -> Tensor:
        """Put each rank's rows in their places of the whole, on every rank; without gradient. A collective."""
        found = own.new_zeros(length, *own.shape[1:])
        if not length:
            return found
        found[at] = own.detach()
        dist.all_reduce(found, group=self.group)  # each place is one rank's, the others' are 0
        return found


@dataclass(frozen=True)
class ContextSlice:
    """A rank's part of a micro-batch."""

    batch: PackedBatch
    """The tokens of the slice, and the response tokens that are predicted from them. Segments are of the whole."""
    at: Tensor
    """(m,) Which of the M response tokens these are."""
    layout: Layout


def check_heads(heads: int, kv_heads: int, size: int, is_recurrent: bool = False) -> str | None:
    """Return why so many ranks cannot share a model's sequences and what to do, None where they can.

    Args:
        is_recurrent: the model has layers that carry a state from token to token.
    """
    if is_recurrent and size > 1:
        return (
            "its recurrent layers carry a state from token to token, and a rank would have to wait for the one before; "
            "leave context_parallel out"
        )
    repeated = kv_heads * size // math.gcd(kv_heads, size)
    if heads % repeated:
        return (
            f"{heads} attention heads with {kv_heads} of keys and values cannot be shared evenly by {size} ranks; "
            "use a divisor"
        )
    return None


def own_slice(batch: PackedBatch, context: ContextGroup, device: torch.device) -> ContextSlice:
    """Cut a rank's slice out of a micro-batch."""
    padded = _at_least(batch, context.size)
    bounds = context.bounds(padded.num_tokens)
    low, high = bounds[context.rank], bounds[context.rank + 1]
    at = ((batch.predictor_M >= low) & (batch.predictor_M < high)).nonzero()[:, 0]
    cut: dict[str, Any] = {name: None if (t := getattr(batch, name)) is None else t[at] for name in PER_TARGET}
    cut |= {name: getattr(padded, name)[..., low:high] for name in ("token_ids_N", "position_ids_N")}
    cut |= {"predictor_M": cut["predictor_M"] - low, "pictures": _own_pictures(padded.pictures, low, high)}
    own = replace(padded, **cut)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    return ContextSlice(own, at, UlyssesLayout(TreeLayout(padded.segments, device), lengths, context))


def _at_least(batch: PackedBatch, tokens: int) -> PackedBatch:
    """Add tokens that nothing attends to and nothing is predicted from, so that no slice is empty."""
    missing = tokens - batch.num_tokens
    if missing <= 0:
        return batch
    nothing = batch.token_ids_N.new_zeros(missing)
    positions = nothing.expand(*batch.position_ids_N.shape[:-1], missing)
    return replace(
        batch,
        token_ids_N=torch.cat([batch.token_ids_N, nothing]),
        position_ids_N=torch.cat([batch.position_ids_N, positions], dim=-1),
        segments=(*batch.segments, *(Segment(batch.num_tokens + i, 1, -1) for i in range(missing))),
    )


def _own_pictures(packed: PackedPictures | None, low: int, high: int) -> PackedPictures | None:
    """Return the pictures with tokens from `low` to `high`, and which of their tokens these are.

    The tower computes a picture on every rank that has one of its tokens.
    """
    if packed is None:
        return None
    rows_I = ((packed.places_I >= low) & (packed.places_I < high)).nonzero()[:, 0]
    if not len(rows_I):
        return None
    stops = list(accumulate(packed.lengths))
    first, last = (bisect_right(stops, int(row)) for row in (rows_I[0], rows_I[-1]))
    start = stops[first] - packed.lengths[first]
    of = slice(first, last + 1)
    return PackedPictures(packed.pictures[of], packed.lengths[of], packed.places_I[rows_I] - low, rows_I - start)


class UlyssesLayout:
    """Attends over all tokens with a share of the heads, where each rank of a group holds a slice of the tokens.

    Args:
        inner: of all tokens.
        lengths: tokens of each rank's slice.
        context: the group.
    """

    def __init__(self, inner: Layout, lengths: Sequence[int], context: ContextGroup) -> None:
        self._inner = inner
        self.calls: dict[int, int] = {}
        self._lengths = list(lengths)
        self._context = context

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
        """Map this rank's (n, heads, D) queries, (n, kv heads, D) keys and values to (n, heads, D)."""
        size = self._context.size
        repeats = size // math.gcd(key.shape[1], size)
        if repeats > 1:  # fewer heads of keys than ranks: each rank needs one of its own
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        query, key, value = (self._heads_for_tokens(x) for x in (query, key, value))
        if sinks_H is not None:
            sinks_H = sinks_H.chunk(size)[self._context.rank]
        shared = self._inner.attend(layer, query, key, value, scaling, sliding_window, softcap, sinks_H)
        return self._tokens_for_heads(shared)

    def _heads_for_tokens(self, own_nHD: Tensor) -> Tensor:
        """Give away all but a share of the heads of this rank's tokens, for that share of all tokens: (N, H / c, D)."""
        size, (tokens, heads, width) = self._context.size, own_nHD.shape
        sent = own_nHD.reshape(tokens, size, heads // size, width).transpose(0, 1).flatten(0, 1)
        received: Tensor = _AllToAll.apply(sent, [tokens] * size, self._lengths, self._context.group)
        return received

    def _tokens_for_heads(self, share_NHD: Tensor) -> Tensor:
        size, tokens = self._context.size, self._lengths[self._context.rank]
        received = _AllToAll.apply(share_NHD, self._lengths, [tokens] * size, self._context.group)
        return received.unflatten(0, (size, tokens)).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group by counts; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way_back = received, sent, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradients[0], *ctx.way_back), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
