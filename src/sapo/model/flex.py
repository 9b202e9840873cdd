"""Attention of a packed tree in one kernel of a GPU: torch's flex_attention with the tree as its mask.

    token q sees token k  <=>  k is not behind q, k's segment is an ancestor of q's or the same,
                               and q stands less than a window further down their path

The kernel skips blocks of 128 x 128 pairs of which none is seen, so that a prompt's keys are read where they are by all
its responses, and copied for none. Which blocks those are is worked out once for a layout, from four numbers a token.

Compiled (Triton) on CUDA. On a CPU torch computes the same in plain operations and keeps all N x N scores: for tests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.utils.text import first_line

BLOCK = 128

LEAST_HEAD = 16
"""Smallest heads the kernel takes."""

MOST_SHAPES = 64
"""Lengths, windows and head shapes that one process may compile for; beyond torch's 8 it would compute uncompiled."""


def takes_flex(query_NHD: Tensor, value_NhD: Tensor) -> bool:
    """Return whether flex_attention computes a layer's attention; SAPO_FLEX=0 computes it bucket by bucket."""
    return (
        query_NHD.device.type == "cuda"
        and query_NHD.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and min(query_NHD.shape[-1], value_NhD.shape[-1]) >= LEAST_HEAD
        and os.environ.get("SAPO_FLEX", "1") != "0"
    )


class TreeMask:
    """Who sees whom, for a whole layout.

    Args:
        segments: of the layout, parents before children.
        device: where the masks are needed.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.num_tokens = segments[-1].stop
        self.padded = padded_length(self.num_tokens)
        enter, leave, depth = _intervals(segments)
        # Padding is a segment of its own that nobody sees: every row of the kernel has a key.
        total = self.padded - self.num_tokens
        columns = [
            np.concatenate([np.repeat(values, [s.length for s in segments]), np.full(total, of_padding)])
            for values, of_padding in ((enter, len(segments)), (leave, len(segments) + 1))
        ]
        place = np.concatenate([d + np.arange(s.length) for d, s in zip(depth, segments, strict=True)])
        columns.append(np.concatenate([place, np.arange(total)]))
        self.enter_N, self.leave_N, self.depth_N = torch.from_numpy(np.stack(columns).astype(np.int32)).to(device)
        self._blocks: dict[int | None, Any] = {}

    def sees(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Apply the rule of visibility as flex_attention asks for it, of (batch, head, query, key)."""
        enter_N, leave_N, depth_N = self.enter_N, self.leave_N, self.depth_N

        def on_the_path(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            below = (enter_N[key] <= enter_N[query]) & (enter_N[query] < leave_N[key])
            return below & (key <= query)

        def within_the_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return on_the_path(b, h, query, key) & (depth_N[query] - depth_N[key] < window)

        return on_the_path if window is None else within_the_window

    def blocks(self, window: int | None) -> Any:
        """Return the `BlockMask`: which blocks of keys each block of queries sees in part, and which as a whole."""
        if window not in self._blocks:
            self._blocks[window] = self._find_blocks(window)
        return self._blocks[window]

    def _find_blocks(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        sees = self.sees(window)
        key_N = torch.arange(self.padded, device=self.enter_N.device)
        some, whole = [], []
        nothing = key_N.new_zeros(())
        for start in range(0, self.padded, BLOCK):  # row by row: all pairs at once would be N x N
            seen_QN = sees(nothing, nothing, key_N[start : start + BLOCK, None], key_N)
            seen_QBK = seen_QN.unflatten(1, (-1, BLOCK))
            some.append(seen_QBK.any(dim=2).any(dim=0))
            whole.append(seen_QBK.all(dim=2).all(dim=0))
        some_QK, whole_QK = torch.stack(some), torch.stack(whole)
        return BlockMask.from_kv_blocks(
            *_listed(some_QK & ~whole_QK), *_listed(whole_QK), BLOCK_SIZE=BLOCK, mask_mod=sees
        )

    def attend(
        self,
        query_NHD: Tensor,
        key_NhD: Tensor,
        value_NhD: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Compute attention over the tree; see `Layout.attend`. Differentiable.

        Raises:
            ModelError: on CUDA, when the forward kernel cannot be compiled or run.
        """
        missing = self.padded - self.num_tokens
        padded = (F.pad(t, (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None] for t in (query_NHD, key_NhD, value_NhD))
        options: dict[str, Any] = {
            "score_mod": None if softcap is None else _capped(softcap),
            "block_mask": self.blocks(window),
            "scale": scaling,
            "enable_gqa": query_NHD.shape[1] != key_NhD.shape[1],
        }
        compiled = query_NHD.device.type == "cuda"
        if sinks_H is None:
            output_1HND = _attend(compiled, *padded, **options)
        else:  # which takes exp(s) of the sum that normalizes the keys' weights
            output_1HND, normalizer_1HN = _attend(compiled, *padded, return_lse=True, **options)
            share_1HN = torch.sigmoid(normalizer_1HN - sinks_H.to(normalizer_1HN.dtype)[:, None])
            output_1HND = output_1HND * share_1HN[..., None].to(output_1HND.dtype)
        return output_1HND[0].transpose(0, 1)[: self.num_tokens]


def padded_length(num_tokens: int) -> int:
    """Return the length to pad to, so that few are compiled: blocks of 128, a power of two of them or 3/2 of one.

    >>> [padded_length(n) for n in (1, 129, 300, 8192, 8193)]
    [128, 256, 384, 8192, 12288]
    """
    blocks = -(-num_tokens // BLOCK)
    power = 1 << (blocks - 1).bit_length()
    return BLOCK * (power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power)


def _attend(compiled: bool, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    if not compiled:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, **options)
    import torch._dynamo as dynamo

    try:
        with dynamo.config.patch(recompile_limit=MOST_SHAPES):
            return _compiled()(query, key, value, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch.compile and Triton raise is one
        raise ModelError(
            f"flex_attention could not be compiled or run for this model and GPU ({first_line(error)}); "
            "SAPO_FLEX=0 does without it"
        ) from error


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Whole or not at all: the way out of a compiler that gives up is N x N scores.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Cap scores to c tanh(x / c)."""

    def cap(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return cap


def _intervals(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return when a walk down the tree enters each segment and has left all below it, and its first position.

    Segment k is an ancestor of q, or q itself, exactly when enter[k] <= enter[q] < leave[k].
    """
    size, depth = np.ones(len(segments), dtype=np.int64), np.zeros(len(segments), dtype=np.int64)
    for i in range(len(segments) - 1, -1, -1):  # children before parents
        if segments[i].parent >= 0:
            size[segments[i].parent] += size[i]
    enter = np.zeros(len(segments), dtype=np.int64)
    free: dict[int, int] = {-1: 0}  # by parent: when its next child is entered
    for i, segment in enumerate(segments):
        enter[i] = free[segment.parent]
        free[segment.parent] += int(size[i])
        free[i] = int(enter[i]) + 1
        if segment.parent >= 0:
            depth[i] = depth[segment.parent] + segments[segment.parent].length
    return enter, enter + size, depth


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Count the blocks of keys of each row, (1, 1, Q), and list them first of all, (1, 1, Q, K)."""
    index_QK = torch.argsort(chosen_QK.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen_QK.sum(dim=-1, dtype=torch.int32)[None, None], index_QK.to(torch.int32)[None, None]
