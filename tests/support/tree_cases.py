"""Random trees of segments, and what each token of one may see, by definition."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from sapo.data import Segment


def chain(lengths: list[int], parents: list[int]) -> tuple[Segment, ...]:
    """Segments one after another."""
    segments, start = [], 0
    for length, parent in zip(lengths, parents, strict=True):
        segments.append(Segment(start, length, parent))
        start += length
    return tuple(segments)


LENGTHS = st.integers(1, 40)


@st.composite
def forests(draw: st.DrawFn) -> tuple[Segment, ...]:
    """Any tree or forest: each segment continues any earlier one or none."""
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=12))
    return chain(lengths, [draw(st.integers(-1, i - 1)) for i in range(len(lengths))])


@st.composite
def groups(draw: st.DrawFn) -> tuple[Segment, ...]:
    """What training packs: up to three preambles in a row, prompts below the last, many responses below each."""
    depth = draw(st.integers(0, 3))
    parents = [i - 1 for i in range(depth)]
    for _ in range(draw(st.integers(1, 2))):
        parents.append(depth - 1)
        parents += [len(parents) - 1] * draw(st.integers(1, 8))
    return chain([draw(LENGTHS) for _ in parents], parents)


TREES = st.one_of(forests(), groups())


def path_of(segments: tuple[Segment, ...], index: int) -> list[int]:
    """Packed positions from the root through the segment, walked up from the leaf."""
    path: list[int] = []
    while index >= 0:
        segment = segments[index]
        path = [*range(segment.start, segment.start + segment.length), *path]
        index = segment.parent
    return path


def leaves_of(segments: tuple[Segment, ...]) -> list[int]:
    parents = {s.parent for s in segments}
    return [i for i in range(len(segments)) if i not in parents]


def positions_of(segments: tuple[Segment, ...]) -> Tensor:
    """(N,) position of each packed token on its path."""
    position_N = torch.empty(segments[-1].stop, dtype=torch.int64)
    for i in range(len(segments)):
        path = path_of(segments, i)
        position_N[path] = torch.arange(len(path))
    return position_N


def visible_NN(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """visible[a, b]: token b stands on a's path, not after it, and less than a window before it."""
    num_tokens = segments[-1].stop
    visible = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for i, segment in enumerate(segments):
        path = path_of(segments, i)
        for a in range(segment.start, segment.stop):
            at = path.index(a)
            visible[a, path[0 if window is None else max(0, at - window + 1) : at + 1]] = True
    return visible
