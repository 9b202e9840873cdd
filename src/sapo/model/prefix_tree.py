"""Prompts as a tree whose common beginning is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sapo.data import Segment

# A common beginning of all prompts shorter than this is not worth a segment of its own.
MIN_PREAMBLE = 16


@dataclass(frozen=True)
class PrefixTree:
    """Prompts as a tree [preamble | prompt 1 .. P], packed.

    >>> tree = prefix_tree([(5, 6), (5, 7, 8)])
    >>> tree.token_ids.tolist(), tree.position_ids.tolist(), tree.leaves
    ([5, 6, 5, 7, 8], [0, 1, 0, 1, 2], [0, 1])
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segments: list[Segment]
    leaves: list[int]
    """Which segment ends each prompt."""

    @property
    def preamble(self) -> int:
        """Count the tokens that all prompts begin with and that are packed once."""
        return self.segments[self.leaves[0]].start


def prefix_tree(prompts: Sequence[tuple[int, ...]], min_preamble: int = MIN_PREAMBLE) -> PrefixTree:
    """Pack prompts, what they all begin with (a system prompt, few-shot examples) only once.

    Args:
        prompts: token ids, at least one each.
        min_preamble: a shorter common beginning is left with each prompt.
    """
    arrays = [np.array(p, np.int64) for p in prompts]
    shared = _common_prefix(arrays) if len(prompts) > 1 else 0
    if shared < min_preamble:
        shared = 0
    token_ids, position_ids = [arrays[0][:shared]], [np.arange(shared)]
    segments = [Segment(0, shared, -1)] if shared else []
    root, start = (0, shared) if shared else (-1, 0)
    leaves = []
    for ids in arrays:
        leaves.append(len(segments))
        segments.append(Segment(start, len(ids) - shared, root))
        start += len(ids) - shared
        token_ids.append(ids[shared:])
        position_ids.append(np.arange(shared, len(ids)))
    return PrefixTree(np.concatenate(token_ids), np.concatenate(position_ids), segments, leaves)


def _common_prefix(prompts: Sequence[NDArray[np.int64]]) -> int:
    """Count the tokens all prompts begin with; at least one token stays with each prompt."""
    shared = min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differs = prompts[0][:shared] != prompt[:shared]
        if differs.any():
            shared = int(differs.argmax())
    return shared
