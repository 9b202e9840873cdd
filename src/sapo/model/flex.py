"""Attention of a packed tree in one kernel of a GPU: torch's flex_attention with the tree as its mask.

    token q sees token k  <=>  k is not behind q, k's segment is an ancestor of q's or the same,
                               and q stands less than a window further down their path

The kernel skips blocks of 128 x 128 pairs of which none is seen, so that a prompt's keys are read where they are by all
its responses, and copied for none. Which blocks those are is worked out once for a layout, on the host, from where its
segments and the blocks begin.

Compiled (Triton) on CUDA, for each head shape first on one block, forward and backward: what a card cannot compile is
seen when the model is loaded, and its attention is then computed bucket by bucket. On a CPU torch computes the same in
plain operations and keeps all N x N scores: for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

MOST_SHAPES = 256
"""Lengths, windows and head shapes that one process may compile for before it starts anew; torch's own limit is 8."""

KERNEL_OPTIONS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 32, "BLOCK_M2": 32, "BLOCK_N2": 32, "num_stages": 1},
)
"""What is tried, in order: torch's choice, then tiles that fit the 99 KiB of shared memory of a small card."""


def takes_flex(
    query_NHD: Tensor, key_NhD: Tensor, value_NhD: Tensor, capped: bool = False, sinks: bool = False
) -> bool:
    """Return whether flex_attention computes a layer's attention; SAPO_FLEX=0 computes it bucket by bucket."""
    return (
        query_NHD.device.type == "cuda"
        and query_NHD.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and min(query_NHD.shape[-1], value_NhD.shape[-1]) >= LEAST_HEAD
        and os.environ.get("SAPO_FLEX", "1") != "0"
        and kernel_for(Heads.of(query_NHD, key_NhD, value_NhD, capped, sinks)).usable
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
        lengths = np.array([*(s.length for s in segments), self.padded - self.num_tokens], dtype=np.int64)
        self._enter, self._leave, self._depth = (
            np.append(values, of_padding)
            for values, of_padding in ((enter, len(segments)), (leave, len(segments) + 1), (depth, 0))
        )
        self._start = np.append(0, np.cumsum(lengths))  # of each segment, and the end
        place = np.arange(self.padded) + np.repeat(self._depth - self._start[:-1], lengths)
        columns = np.stack([np.repeat(self._enter, lengths), np.repeat(self._leave, lengths), place])
        self.enter_N, self.leave_N, self.depth_N = torch.from_numpy(columns.astype(np.int32)).to(device)
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

        some_QK, whole_QK = self._seen_blocks(window)
        device = self.enter_N.device
        lists = np.concatenate([_listed(some_QK & ~whole_QK), _listed(whole_QK)], axis=1)
        at_QX = torch.from_numpy(lists).to(device)[None, None]  # one upload
        last = 1 + len(some_QK)
        return BlockMask.from_kv_blocks(
            at_QX[..., 0].contiguous(),
            at_QX[..., 1:last].contiguous(),
            at_QX[..., last].contiguous(),
            at_QX[..., last + 1 :].contiguous(),
            BLOCK_SIZE=BLOCK,
            mask_mod=self.sees(window),
        )

    def _seen_blocks(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return (Q, K) bool: the blocks of which some pairs are seen, and those of which all are.

        Blocks are cut into pieces of one segment each. All of a piece is seen, or none, but for windows and a piece's
        own diagonal.
        """
        starts = np.union1d(self._start[:-1], np.arange(0, self.padded, BLOCK))
        starts = starts[starts < self.padded]
        size = np.diff(np.append(starts, self.padded))
        of = np.searchsorted(self._start, starts, side="right") - 1
        # Parents lie before their children: the keys of another piece that is seen come before all its queries.
        enter, leave = self._enter[of], self._leave[of]
        before_PP = np.arange(len(starts))[:, None] > np.arange(len(starts))
        some_PP = before_PP & (enter <= enter[:, None]) & (enter[:, None] < leave)
        whole_PP = some_PP.copy()
        if window is not None:
            first = self._depth[of] + starts - self._start[of]
            last = first + size - 1
            some_PP &= first[:, None] - last < window
            whole_PP &= last[:, None] - first < window
        np.fill_diagonal(some_PP, True)
        np.fill_diagonal(whole_PP, size == 1)
        first_of_block = np.searchsorted(starts, np.arange(0, self.padded, BLOCK))
        some, whole = (
            join.reduceat(join.reduceat(x, first_of_block, axis=0), first_of_block, axis=1)
            for join, x in ((np.logical_or, some_PP), (np.logical_and, whole_PP))
        )
        return some, whole

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
            ModelError: on CUDA, when the kernel cannot be compiled or run.
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
        if compiled:
            heads = Heads.of(query_NHD, key_NhD, value_NhD, softcap is not None, sinks_H is not None)
            options["kernel_options"] = kernel_for(heads).options
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


@dataclass(frozen=True)
class Heads:
    """All that the kernel of a layer's attention is chosen by, but for lengths and windows.

    >>> Heads(16, 8, 128, 128, torch.bfloat16, torch.device("cuda", 0)).capped
    False
    """

    queries: int
    keys: int
    size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    capped: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, query_NHD: Tensor, key_NhD: Tensor, value_NhD: Tensor, capped: bool, sinks: bool) -> Heads:
        """Describe a layer by its inputs."""
        size, value_size = query_NHD.shape[2], value_NhD.shape[2]
        return cls(
            query_NHD.shape[1], key_NhD.shape[1], size, value_size, query_NHD.dtype, query_NHD.device, capped, sinks
        )


@dataclass(frozen=True)
class Kernel:
    """Say how a card computes the attention of some heads.

    >>> Kernel(usable=True, options=None).options is None
    True
    """

    usable: bool
    options: dict[str, Any] | None


@functools.cache
def kernel_for(heads: Heads) -> Kernel:
    """Compile the attention of one block, forward and backward, and run it, with the first options that can be.

    The backward pass would else be compiled after a whole rollout. A warning says where none can be.
    """
    reason = ""
    for options in KERNEL_OPTIONS:
        try:
            _try_block(heads, options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise what they like
            reason = reason or first_line(error)
            continue
        return Kernel(True, options)
    warnings.warn(
        f"flex_attention cannot be compiled on this GPU for heads of {heads.size} in {heads.dtype} ({reason}): "
        "attention is computed bucket by bucket, which is slower",
        stacklevel=2,
    )
    return Kernel(False, None)


def _try_block(heads: Heads, options: dict[str, Any] | None) -> None:
    mask = TreeMask([Segment(0, BLOCK - 28, -1), Segment(BLOCK - 28, 28, 0)], heads.device)
    query, key, value = (
        torch.zeros(1, count, BLOCK, size, dtype=heads.dtype, device=heads.device, requires_grad=True)
        for count, size in ((heads.queries, heads.size), (heads.keys, heads.size), (heads.keys, heads.value_size))
    )
    with torch.enable_grad():
        output = _attend(
            True,
            query,
            key,
            value,
            score_mod=_capped(30.0) if heads.capped else None,
            block_mask=mask.blocks(None),
            scale=heads.size**-0.5,
            enable_gqa=heads.queries != heads.keys,
            kernel_options=options,
            **({"return_lse": True} if heads.sinks else {}),
        )
        total = sum(x.sum() for x in output) if isinstance(output, tuple) else output.sum()
        torch.autograd.grad(total, (query, key, value))
    if heads.device.type == "cuda":
        torch.cuda.synchronize(heads.device)  # what a kernel does wrong is said by the next wait


def _attend(compiled: bool, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    if not compiled:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, **options)
    import torch._dynamo as dynamo

    def run() -> Any:
        with dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=4 * MOST_SHAPES):
            return _compiled()(query, key, value, **options)

    try:
        try:
            return run()
        except dynamo.exc.FailOnRecompileLimitHit:  # which is no RuntimeError
            warnings.warn(
                f"attention was compiled for {MOST_SHAPES} shapes; all are compiled anew as they come again. Prompts "
                "and responses of fewer lengths, or a smaller train.tokens_per_microbatch, need fewer",
                stacklevel=2,
            )
            dynamo.reset()
            return run()
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


def _listed(chosen_QK: np.ndarray) -> np.ndarray:
    """Count the blocks of keys of each row and list them first of all, (Q, 1 + K)."""
    index_QK = np.argsort(~chosen_QK, axis=-1, kind="stable")
    return np.concatenate([chosen_QK.sum(-1, keepdims=True), index_QK], axis=1).astype(np.int32)
