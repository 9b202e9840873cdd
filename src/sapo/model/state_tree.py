"""States and causal convolutions over a tree of segments: what a shared prompt leaves behind is computed once.

A recurrent layer reads its tokens in order and carries a state from one to the next. In a tree the state at the end of
a segment is the first state of each of its children, so the segments are scanned level by level: preamble, prompts,
responses. Those of a level are put side by side and padded to one rectangle. Padding is 0 in every input, which leaves
the state of all scans in recurrent.py as it is. Autograd goes back through the states, so a prompt gets the gradients
of all its responses.

A convolution looks back K - 1 tokens along the path of each token. It needs no levels: every token gathers its own.

    segments   [ preamble | prompt | response a | response b | prompt | response c ]
    levels     0: preamble;  1: both prompts, from its last state;  2: a and b from the first prompt's, c from the
               second's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapo.data import Segment
from sapo.model.gather import gather_rows

Place = tuple[int, int]
"""A layer, and which of its convolutions or scans."""

# Segments of a level share a rectangle when the shorter is padded to no more than 4/3 of its length; short ones always
# do, since a scan pads to whole chunks anyway and each call of one costs some fifty operations.
BUCKET_RATIO = 0.75
BUCKET_SLACK = 64


@dataclass(frozen=True)
class Sequences:
    """Hold the sequences, side by side, that a scan is run on."""

    inputs: tuple[Tensor, ...]
    """Each (b, T, ...), 0 where a sequence is shorter; (1, sum of T, ...) with `offsets`."""
    initial: Tensor | None
    """(b, ...) state that each begins with; None for 0."""
    is_single: bool = False
    """One token each, without gradient: a decode step."""
    offsets: Tensor | None = None
    """(b + 1,) where each begins, of sequences that stand one after the other without padding."""


Scan = Callable[[Sequences], tuple[Tensor, Tensor]]
"""Return the outputs, (b, T, ...), and the (b, ...) state after each sequence."""


@dataclass
class KeptStates:
    """Keep what later tokens of X sequences need of earlier ones."""

    windows: dict[Place, Tensor] = field(default_factory=dict)
    """(X, K - 1, C) last inputs of each convolution, the oldest first."""
    states: dict[Place, Tensor] = field(default_factory=dict)
    """(X, ...) state after the last token, of each scan."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all of it."""
        return sum(t.numel() * t.element_size() for kept in (self.windows, self.states) for t in kept.values())


class TreeStates:
    """The states of a tree of segments, by the way its layers ask for them.

    Args:
        segments: parents before children, without gaps.
        paths: packed positions of each segment's tokens from its root on, and of its own.
        before: of one sequence that all roots continue; None where they begin.
        keep: is given what each segment leaves behind.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        paths: Sequence[np.ndarray],
        device: torch.device,
        before: KeptStates | None = None,
        keep: KeptStates | None = None,
    ) -> None:
        self.segments, self.paths, self.device = segments, paths, device
        self.before, self.keep = before, keep
        self.num_tokens = segments[-1].stop
        self.levels = [_buckets(level, segments) for level in _levels(segments)]
        self._rectangles: dict[tuple[int, ...], _Rectangle] = {}
        self._windows: dict[int, Tensor] = {}

    def convolve(self, place: Place, input_NC: Tensor, weight_CK: Tensor) -> Tensor:
        """Return the (N, C) causal convolution of each channel along the paths, in the precision of the weight."""
        size = weight_CK.shape[1]
        before = input_NC.new_zeros(size - 1, input_NC.shape[1])
        if self.before is not None:
            before = self.before.windows[place][0].flip(0).to(input_NC.dtype)
        reached = torch.cat([input_NC, before])
        index_NK = self._window_index(size)
        if self.keep is not None:
            ends = torch.tensor([s.stop - 1 for s in self.segments], device=self.device)
            self.keep.windows[place] = reached[index_NK[ends][:, 1:]]
        output: Tensor = _Convolution.apply(reached.to(weight_CK.dtype), weight_CK, index_NK)
        return output

    def _window_index(self, size: int) -> Tensor:
        """Return (N, K) packed positions of the tokens K - 1 .. 0 back; N + j is the one j + 1 before the roots."""
        if size not in self._windows:
            index_NK = np.empty((self.num_tokens, size), dtype=np.int64)
            for segment, path in zip(self.segments, self.paths, strict=True):
                own = len(path) - segment.length + np.arange(segment.length)
                at = own[:, None] - np.arange(size - 1, -1, -1)
                index_NK[segment.start : segment.stop] = np.where(
                    at >= 0, path[np.maximum(at, 0)], self.num_tokens - 1 - at
                )
            self._windows[size] = torch.from_numpy(index_NK).to(self.device)
        return self._windows[size]

    def scan(self, place: Place, inputs: Sequence[Tensor], scan: Scan, packs: bool = False) -> Tensor:
        """Return what a scan gives of every token, (N, ...), each segment begun with its parent's last state.

        Args:
            inputs: each (N, ...).
            packs: the scan takes sequences one after the other (`Sequences.offsets`), so that nothing is padded.
        """
        last: dict[int, Tensor] = {}
        outputs = []
        for level in self.levels:
            for members in [[i for bucket in level for i in bucket]] if packs else level:
                rectangle = self._rectangle(members, packs)
                rows = tuple(rectangle.take(t) for t in inputs)
                output, states = scan(Sequences(rows, self._initial(place, members, last), False, rectangle.offsets))
                outputs.append(rectangle.put_back(output))
                last.update(zip(members, states.unbind(0), strict=True))
        if self.keep is not None:
            self.keep.states[place] = torch.stack([last[i] for i in range(len(self.segments))])
        return gather_rows(torch.cat(outputs), self._order) if len(self.segments) > 1 else outputs[0]

    def _initial(self, place: Place, members: Sequence[int], last: dict[int, Tensor]) -> Tensor | None:
        parents = [self.segments[i].parent for i in members]
        if parents[0] >= 0:
            return torch.stack([last[p] for p in parents])
        return None if self.before is None else self.before.states[place].expand(len(members), *self._shape(place))

    def _shape(self, place: Place) -> torch.Size:
        assert self.before is not None
        return self.before.states[place].shape[1:]

    def _rectangle(self, members: Sequence[int], packs: bool) -> _Rectangle:
        key = (int(packs), *members)
        if key not in self._rectangles:
            self._rectangles[key] = _Rectangle([self.segments[i] for i in members], self.device, packs)
        return self._rectangles[key]

    @cached_property
    def _order(self) -> Tensor:
        """Return where each packed token's output stands among those of all levels."""
        members = [self.segments[i] for level in self.levels for bucket in level for i in bucket]
        tokens = np.concatenate([np.arange(s.start, s.stop) for s in members])
        return torch.from_numpy(np.argsort(tokens)).to(self.device)


def _levels(segments: Sequence[Segment]) -> list[list[int]]:
    """Group the segments by how many ancestors they have."""
    depth: list[int] = []
    for segment in segments:
        depth.append(0 if segment.parent < 0 else depth[segment.parent] + 1)
    order = sorted(range(len(segments)), key=lambda i: depth[i])
    return [list(group) for _, group in groupby(order, key=lambda i: depth[i])]


def _buckets(level: Sequence[int], segments: Sequence[Segment]) -> list[list[int]]:
    """Group the segments of a level by similar length, the longest first."""
    found: list[list[int]] = []
    for i in sorted(level, key=lambda i: -segments[i].length):
        length, longest = segments[i].length, segments[found[-1][0]].length if found else 0
        if found and (length >= BUCKET_RATIO * longest or longest - length <= BUCKET_SLACK):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def num_padded(segments: Sequence[Segment], multiple: int) -> int:
    """Count the tokens that a scan runs on, each rectangle padded to a multiple of tokens."""
    buckets = [bucket for level in _levels(segments) for bucket in _buckets(level, segments)]
    return sum(len(b) * -(-segments[b[0]].length // multiple) * multiple for b in buckets)


class _Rectangle:
    """Segments side by side, padded to the longest; or one after the other.

    Args:
        segments: of a level.
        packs: one after the other.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, packs: bool) -> None:
        longest = max(s.length for s in segments)
        self.size = (1, sum(s.length for s in segments)) if packs else (len(segments), longest)
        self.offsets: Tensor | None = None
        if packs:
            ends = np.cumsum([0, *(s.length for s in segments)])
            self.offsets = torch.from_numpy(ends).to(device)
        # One segment is a slice and needs no copy.
        self.slice = slice(segments[0].start, segments[0].stop) if len(segments) == 1 else None
        # Padded with the segment's last token, which `take` sets to 0.
        own = [np.arange(s.start, s.stop) for s in segments]
        index = np.concatenate(own if packs else [np.pad(o, (0, longest - len(o)), mode="edge") for o in own])
        self.index = torch.from_numpy(index).to(device)
        self.padding: Tensor | None = None
        self.real: Tensor | None = None
        if not packs and any(s.length < longest for s in segments):
            is_padding = np.arange(longest) >= np.array([s.length for s in segments])[:, None]
            self.padding = torch.from_numpy(is_padding).to(device)
            self.real = torch.from_numpy(np.flatnonzero(~is_padding)).to(device)

    def take(self, packed_NX: Tensor) -> Tensor:
        """Return the rows of these segments, (b, T, ...)."""
        if self.slice is not None:
            return packed_NX[self.slice][None]
        rows = gather_rows(packed_NX, self.index).unflatten(0, self.size)
        if self.padding is None:
            return rows
        return rows.masked_fill(self.padding.view(*self.size, *[1] * (packed_NX.ndim - 1)), 0)

    def put_back(self, output: Tensor) -> Tensor:
        """Return the tokens that are not padding, segment after segment."""
        flat = output.flatten(0, 1)
        return flat if self.real is None else gather_rows(flat, self.real)


class _Convolution(torch.autograd.Function):
    """Products of K tokens with the weights of their places: kept are the inputs, not K copies of them."""

    @staticmethod
    def forward(ctx: Any, reached: Tensor, weight_CK: Tensor, index_NK: Tensor) -> Tensor:
        ctx.save_for_backward(reached, weight_CK, index_NK)
        num_tokens, size = index_NK.shape
        wide = _wide(reached.dtype)
        output_NC = reached[:num_tokens].to(wide) * weight_CK[:, -1].to(wide)
        for k in range(size - 1):
            output_NC.addcmul_(reached.index_select(0, index_NK[:, k]).to(wide), weight_CK[:, k].to(wide))
        return output_NC.to(reached.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor | None, ...]:
        reached, weight_CK, index_NK = ctx.saved_tensors
        num_tokens, size = index_NK.shape
        wide = _wide(reached.dtype)
        grad_NC = grad_NC.to(wide)
        grad_reached = torch.zeros(reached.shape, dtype=wide, device=reached.device)
        grad_weight = torch.empty(weight_CK.shape, dtype=wide, device=reached.device)
        for k in range(size):
            is_own = k == size - 1
            inputs = reached[:num_tokens] if is_own else reached.index_select(0, index_NK[:, k])
            grad_weight[:, k] = (grad_NC * inputs.to(wide)).sum(0)
            slope = grad_NC * weight_CK[:, k].to(wide)
            if is_own:
                grad_reached[:num_tokens] += slope
            else:  # by the backward of an embedding: on a CPU several times faster than index_add_
                grad_reached += torch.ops.aten.embedding_dense_backward(
                    slope, index_NK[:, k].contiguous(), reached.shape[0], -1, False
                )
        return grad_reached.to(reached.dtype), grad_weight.to(weight_CK.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
