"""Attention over shared prefixes, for any decoder that goes through transformers' attention interface.

A model loaded by `sapo.model` runs on packed tokens, shape (1, N), and hands its attention to the layout object it was
called with (`packed_layout=`). In training that is a `TreeLayout`, where each segment of tokens attends to its
ancestors and causally to itself, so that prompts are computed once for all their responses. Rollout has its own two,
for whole prompts and for one new token per row against a key-value cache (rollout/local/layouts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from sapo.data import Segment
from sapo.model.flex import TreeMask, takes_flex
from sapo.model.gather import gather_rows
from sapo.model.state_tree import KeptStates, TreeStates

ATTENTION_NAME = "sapo_shared_prefix"

# Segments share a bucket when neither side is padded to more than 4/3 of its length; tiny ones always do, since a
# kernel call costs more than the padding.
BUCKET_RATIO = 0.75
BUCKET_SLACK = 16
# From so many keys on, a bucket has siblings only. They follow the same prompt, and one row of the mask does for all.
LONG_PATH = 512
# Keys of a bucket: while the kernel runs, each of its rows has a copy of the keys and values of its prompt.
MOST_KEYS = 2**14

REPEATED = 100_000
"""Added to the number of a layer that attends once more in the same forward."""


class Layout(Protocol):
    """Tell a packed forward how the queries of a layer find their keys."""

    calls: dict[int, int]
    """Number of times that each layer has attended in the present forward. `Policy.hidden` resets it."""

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
        """Map (N, heads, D) queries and (N, kv heads, D) keys and values to (N, heads, D).

        Args:
            layer: under which the engine keeps keys and values.
            sinks_H: a score of each head that takes part in the softmax and has no value (gpt-oss).
        """
        ...


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_layout: Layout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it: query (1, heads, N, D) -> (1, N, heads, D).

    Raises:
        ValueError: for what it does not compute (a call without layout, dropout), since the alternative is a silently
            different model.
    """
    if packed_layout is None:
        raise ValueError(
            "its attention was called without packed_layout=..., which a decoder must hand down; for transformers' own "
            "generate() call model.set_attn_implementation('sdpa') first"
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0 in policy optimization; got {dropout}")
    output_NHD = packed_layout.attend(
        _call_number(packed_layout, int(module.layer_idx)),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window,
        softcap,
        s_aux,
    )
    return output_NHD.unsqueeze(0), None


def _call_number(layout: Layout, layer: int) -> int:
    """Return the number of a layer's attention; one that attends twice in a forward (DiffLlama) has two numbers."""
    before = layout.calls.get(layer, 0)
    layout.calls[layer] = before + 1
    return layer + before * REPEATED


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)


def attention(
    query_bHQD: Tensor,
    key_bhKD: Tensor,
    value_bhKD: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute (b, H, Q, D) softmax(scaling q k + mask) v; scores are c tanh(x / c) if capped (Gemma 2)."""
    repeats = query_bHQD.shape[1] // key_bhKD.shape[1]
    plain = softcap is None and sinks_H is None
    # On a GPU grouped heads beside a mask would be left to the kernel that keeps all scores.
    grouped = repeats > 1 and plain and query_bHQD.device.type != "cuda"
    key, value = (t if grouped or repeats == 1 else t.repeat_interleave(repeats, dim=1) for t in (key_bhKD, value_bhKD))
    if plain:
        return F.scaled_dot_product_attention(query_bHQD, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    scores = query_bHQD @ key.transpose(-1, -2) * (scaling / (softcap or 1.0))
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    sinks = None if sinks_H is None else sinks_H[:, None, None]
    return softmax_with_sinks(scores + mask, sinks) @ value


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Compute the softmax over the keys, the last axis, of (..., K) scores.

    Args:
        sinks: (..., 1) scores that take part in it and are left out of the result; None for an ordinary softmax.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    joined = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(joined, dim=-1)[..., :-1]


@dataclass(frozen=True)
class Bucket:
    """Segments of similar size, padded to one rectangle for the attention kernel only."""

    query_index: Tensor
    """(b * Q,) packed positions of the queries, padded with the segment's last one."""
    key_index: Tensor
    """(b * K,) packed positions of each segment's path from the root through itself, padded likewise."""
    prefix_b: Tensor
    """Length of each segment's ancestors; one number where it is that of all, whose masks are then one."""
    length_b: Tensor
    """Length of each segment, or the largest."""
    size: tuple[int, int, int]
    """(b, Q, K)."""
    padding: Tensor
    """Rows among the b * Q queries that pad."""

    @property
    def mask_numbers(self) -> int:
        """Count the numbers of the mask."""
        return len(self.prefix_b) * self.size[1] * self.size[2]

    def mask(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """Make the additive mask, (b, 1, Q, K), or (1, 1, Q, K) for all: query j of a segment sees path positions up to
        prefix + j, and no further back than the window."""
        _, num_queries, num_keys = self.size
        device = self.query_index.device
        # A padded query sees what the segment's last one sees: within a window it might else see no key at all, and
        # what a kernel makes of such a row, 0 or NaN, would reach the gradient.
        own_bQ = torch.minimum(torch.arange(num_queries, device=device), self.length_b[:, None] - 1)
        at_b1Q1 = (self.prefix_b[:, None] + own_bQ)[:, None, :, None]
        path_K = torch.arange(num_keys, device=device)
        hidden = path_K > at_b1Q1
        if sliding_window is not None:
            hidden |= path_K <= at_b1Q1 - sliding_window
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


class TreeLayout:
    """Segments that attend to their ancestors and causally to themselves.

    Padding exists only inside the attention kernel: every other operation of the model runs on exactly N tokens. On a
    GPU that kernel takes the tree as it is (flex.py); elsewhere segments of similar size are put side by side.

    Args:
        segments: in packed order, parents before children; they cover positions 0..N-1 without gaps.
        device: where the indices are needed.
        on_keys: called with (layer, keys, values) of shape (N, kv heads, D).
        keep: is given what each segment leaves behind in recurrent layers.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device | str = "cpu",
        on_keys: Callable[[int, Tensor, Tensor], None] | None = None,
        keep: KeptStates | None = None,
    ) -> None:
        self.segments = tuple(segments)
        self.paths = _paths(self.segments)
        self.on_keys = on_keys
        self.keep = keep
        self.device = torch.device(device)
        self.calls: dict[int, int] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._tree_mask: TreeMask | None = None

    @cached_property
    def _bucketed(self) -> tuple[list[Bucket], Tensor]:
        return _buckets(self.segments, self.paths, self.device)

    @property
    def buckets(self) -> list[Bucket]:
        """Return the segments side by side, made when first asked for: a GPU's kernel does without."""
        return self._bucketed[0]

    @property
    def output_index(self) -> Tensor:
        """Return where each packed token's output stands among those of the buckets."""
        return self._bucketed[1]

    @property
    def was_asked(self) -> bool:
        """Return whether a layer of the present forward has asked for its attention, or any for its states."""
        return bool(self.calls) or "states" in vars(self)

    @cached_property
    def states(self) -> TreeStates:
        """Return where recurrent layers find their states."""
        return TreeStates(self.segments, self.paths, self.device, keep=self.keep)

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
        """See `Layout.attend`: a token sees its own segment up to itself, and the segments on the way to the root."""
        if self.on_keys is not None:
            self.on_keys(layer, key, value)
        if takes_flex(query, key, value, softcap is not None, sinks_H is not None):
            if self._tree_mask is None:
                self._tree_mask = TreeMask(self.segments, query.device)
            return self._tree_mask.attend(query, key, value, scaling, sliding_window, softcap, sinks_H)
        if softcap is None and _has_kernel(query, value):
            masks = [self._mask(i, sliding_window, query.dtype) for i in range(len(self.buckets))]
            return _TreeAttention.apply(query, key, value, sinks_H, self.buckets, self.output_index, scaling, *masks)
        outputs = []
        for i, bucket in enumerate(self.buckets):
            num_rows, num_queries, num_keys = bucket.size
            query_bHQD = gather_rows(query, bucket.query_index).unflatten(0, (num_rows, num_queries)).transpose(1, 2)
            key_bhKD = gather_rows(key, bucket.key_index).unflatten(0, (num_rows, num_keys)).transpose(1, 2)
            value_bhKD = gather_rows(value, bucket.key_index).unflatten(0, (num_rows, num_keys)).transpose(1, 2)
            mask = self._mask(i, sliding_window, query.dtype)
            output_bHQD = attention(query_bHQD, key_bhKD, value_bhKD, mask, scaling, softcap, sinks_H)
            outputs.append(output_bHQD.transpose(1, 2).flatten(0, 1))
        return gather_rows(torch.cat(outputs), self.output_index)

    def _mask(self, bucket: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        key = (bucket, sliding_window, dtype)
        if key not in self._masks:  # one per layout, not one per layer
            self._masks[key] = self.buckets[bucket].mask(sliding_window, dtype)
        return self._masks[key]


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's attention kernel for processors can be called by its two halves."""
    return (
        query.device.type in ("cpu", "meta")  # on the meta device, what it would keep is counted
        and query.shape[-1] == value.shape[-1]
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    )


class _TreeAttention(torch.autograd.Function):
    """A layer's attention on a processor, all buckets: what is kept for the backward pass is packed.

    Autograd would keep each response's copy of the keys and values of its prompt, and bring their gradients back copy
    by copy. Kept are queries, keys, values and outputs of N tokens and the log-normalizers of the softmax, and the
    copies are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks_H: Tensor | None,
        buckets: list[Bucket],
        output_index: Tensor,
        scaling: float,
        *masks: Tensor,
    ) -> Tensor:
        outputs, normalizers = [], []
        for bucket, mask in zip(buckets, masks, strict=True):
            output_bHQD, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_padded(bucket, query, key, value), 0.0, False, attn_mask=mask, scale=scaling
            )
            if sinks_H is not None:  # one score more in the normalizer, and no value
                whole = torch.logaddexp(normalizer, sinks_H.to(normalizer.dtype)[:, None])
                share = torch.exp(normalizer - whole)[..., None]
                output_bHQD, normalizer = (output_bHQD * share).to(output_bHQD.dtype), whole
            outputs.append(output_bHQD.transpose(1, 2).flatten(0, 1))
            normalizers.append(normalizer)
        output = _join(outputs).index_select(0, output_index)
        ctx.save_for_backward(query, key, value, output, sinks_H, *masks, *normalizers)
        ctx.buckets, ctx.output_index, ctx.scaling = buckets, output_index, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With the sink in output and normalizer the kernel's backward is that of the keys beside a sink. With s the
        # sink's score, d s = -sum over queries of exp(s - normalizer) (d o . o).
        query, key, value, output, sinks_H, *rest = ctx.saved_tensors
        masks, normalizers = rest[: len(ctx.buckets)], rest[len(ctx.buckets) :]
        # The kernel for bfloat16 takes three times as long as float32's on a processor with AVX-512.
        given = query.dtype
        dtype = torch.float32 if given in (torch.bfloat16, torch.float16) else given
        query, key, value, output, grad = (x.to(dtype) for x in (query, key, value, output, grad))
        grads_query: list[Tensor] = []
        grad_key, grad_value = (torch.zeros(x.shape, dtype=dtype) for x in (key, value))
        grad_sinks = None if sinks_H is None else torch.zeros(sinks_H.shape, dtype=dtype)
        for bucket, mask, normalizer in zip(ctx.buckets, masks, normalizers, strict=True):
            grad_bHQD, output_bHQD = (_padded_queries(bucket, x) for x in (grad, output))
            grad_bHQD.transpose(1, 2).flatten(0, 1).index_fill_(0, bucket.padding, 0.0)
            if grad_sinks is not None:
                weight_bHQ = torch.exp(sinks_H.to(normalizer.dtype)[:, None] - normalizer)
                grad_sinks -= (weight_bHQ * (grad_bHQD * output_bHQD).sum(-1)).sum((0, 2)).to(dtype)
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_bHQD,
                *_padded(bucket, query, key, value),
                output_bHQD,
                normalizer,
                0.0,
                False,
                attn_mask=mask.to(dtype),
                scale=ctx.scaling,
            )
            grads_query.append(of_query.transpose(1, 2).flatten(0, 1))
            for total, part in ((grad_key, of_key), (grad_value, of_value)):
                _add_rows(total, bucket.key_index, part.transpose(1, 2).flatten(0, 1))
        grad_query = _join(grads_query).index_select(0, ctx.output_index)
        nothing = (None,) * (3 + len(masks))
        of_sinks = None if grad_sinks is None else grad_sinks.to(sinks_H.dtype)
        return (*(x.to(given) for x in (grad_query, grad_key, grad_value)), of_sinks, *nothing)


def _padded(bucket: Bucket, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copy (b, H, Q, D) queries, (b, h, K, D) keys and values of a bucket out of the packed ones."""
    num_rows, _, num_keys = bucket.size
    keys, values = (
        x.index_select(0, bucket.key_index).unflatten(0, (num_rows, num_keys)).transpose(1, 2) for x in (key, value)
    )
    return _padded_queries(bucket, query), keys, values


def _padded_queries(bucket: Bucket, packed: Tensor) -> Tensor:
    num_rows, num_queries, _ = bucket.size
    return packed.index_select(0, bucket.query_index).unflatten(0, (num_rows, num_queries)).transpose(1, 2)


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows at indices, by the backward of an embedding: on a CPU several times faster than index_add_."""
    flat = rows.reshape(rows.shape[0], -1)
    total += torch.ops.aten.embedding_dense_backward(flat, index, total.shape[0], -1, False).view_as(total)


def _paths(segments: tuple[Segment, ...]) -> list[np.ndarray]:
    """List the packed positions of each segment's tokens, from the root through itself."""
    paths: list[np.ndarray] = []
    covered = 0
    for i, segment in enumerate(segments):
        assert segment.start == covered, f"segment {i} leaves a gap: {segment}"
        assert segment.length > 0, f"segment {i} is empty"
        assert segment.parent < i, f"segment {i} comes before its parent {segment.parent}"
        covered = segment.stop
        own = np.arange(segment.start, segment.stop)
        paths.append(np.concatenate([paths[segment.parent], own]) if segment.parent >= 0 else own)
    return paths


def _buckets(
    segments: tuple[Segment, ...], paths: list[np.ndarray], device: torch.device
) -> tuple[list[Bucket], Tensor]:
    """Group segments of similar size; also where each packed token's output stands in the concatenated outputs."""
    order = sorted(range(len(segments)), key=lambda i: _rank(segments[i], len(paths[i])), reverse=True)
    members: list[list[int]] = []
    for i in order:
        if (
            members
            and _fits(segments, paths, members[-1][0], i)
            and (len(members[-1]) + 1) * len(paths[members[-1][0]]) <= MOST_KEYS
        ):
            members[-1].append(i)
        else:
            members.append([i])
    output_index = np.empty(sum(s.length for s in segments), dtype=np.int64)
    buckets, offset = [], 0
    for bucket in members:
        num_queries = max(segments[i].length for i in bucket)
        num_keys = len(paths[bucket[0]])
        query_index = np.empty((len(bucket), num_queries), dtype=np.int64)
        key_index = np.empty((len(bucket), num_keys), dtype=np.int64)
        for row, i in enumerate(bucket):
            segment, path = segments[i], paths[i]
            query_index[row, : segment.length] = path[-segment.length :]
            query_index[row, segment.length :] = path[-1]
            key_index[row, : len(path)] = path
            key_index[row, len(path) :] = path[-1]
            output_index[segment.start : segment.stop] = offset + row * num_queries + np.arange(segment.length)
        length = np.array([segments[i].length for i in bucket])
        prefix = np.array([len(paths[i]) for i in bucket]) - length
        padding = np.flatnonzero(np.arange(num_queries) >= length[:, None])
        if (prefix == prefix[0]).all():  # a padded query sees padded keys then; nothing comes of either
            prefix, length = prefix[:1], np.array([num_queries])
        offset += query_index.size
        buckets.append(
            Bucket(
                query_index=torch.from_numpy(query_index.ravel()).to(device),
                key_index=torch.from_numpy(key_index.ravel()).to(device),
                prefix_b=torch.from_numpy(prefix).to(device),
                length_b=torch.from_numpy(length).to(device),
                size=(len(bucket), num_queries, num_keys),
                padding=torch.from_numpy(padding).to(device),
            )
        )
    return buckets, torch.from_numpy(output_index).to(device)


def _rank(segment: Segment, path: int) -> tuple[int, ...]:
    """Return what segments are ordered by, those first whose paths are longest; of long ones, siblings together."""
    if path < LONG_PATH:
        return (0, path, segment.length)
    return (1, path - segment.length, segment.parent, segment.length)


def _fits(segments: tuple[Segment, ...], paths: list[np.ndarray], first: int, other: int) -> bool:
    def close(small: int, large: int) -> bool:
        small, large = min(small, large), max(small, large)
        return small >= BUCKET_RATIO * large or large - small <= BUCKET_SLACK

    if len(paths[first]) >= LONG_PATH and segments[first].parent != segments[other].parent:
        return False
    return close(len(paths[other]), len(paths[first])) and close(segments[other].length, segments[first].length)


def attend_by(model: Any, implementation: str) -> None:
    """Let the decoder of a model attend by an implementation; a vision tower keeps scaled-dot-product attention.

    A tower that were given packed attention would ask for a layout that it has not, with the first picture.
    """
    parts = getattr(model.config, "sub_configs", None) or {}
    if "text_config" in parts:
        model.set_attn_implementation({**dict.fromkeys(parts, "sdpa"), "": "sdpa", "text_config": implementation})
    else:
        model.set_attn_implementation(implementation)
