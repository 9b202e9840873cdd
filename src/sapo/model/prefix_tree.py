"""Prompts as a tree whose common beginning is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapo.data import Segment

# A common beginning of all prompts shorter than this is not worth a segment of its own.
MIN_PREAMBLE = 16


@dataclass(frozen=True)
class PrefixTree:
    """Prompts as a tree [preamble | prompt 1 .. P], packed.

    >>> tree = prefix_tree([(5, 6), (5, 7, 8)])
    >>> tree.token_ids, tree.position_ids, tree.leaves
    ([5, 6, 5, 7, 8], [0, 1, 0, 1, 2], [0, 1])
    """

    token_ids: list[int]
    position_ids: list[int]
    segments: list[Segment]
    leaves: list[int]
    """Which segment ends each prompt."""

    @property
    def preamble(self) -> int:
        """Tokens that all prompts begin with and that are there once."""
        return self.segments[self.leaves[0]].start


def prefix_tree(prompts: Sequence[tuple[int, ...]], min_preamble: int = MIN_PREAMBLE) -> PrefixTree:
    """Pack prompts, what they all begin with (a system prompt, few-shot examples) only once.

    Args:
        prompts: token ids, at least one each.
        min_preamble: a shorter common beginning is left with each prompt.
    """
    shared = _common_prefix(prompts) if len(prompts) > 1 else 0
    if shared < min_preamble:
        shared = 0
    token_ids = list(prompts[0][:shared])
    position_ids = list(range(shared))
    segments = [Segment(0, shared, -1)] if shared else []
    root = 0 if shared else -1
    leaves = []
    for prompt in prompts:
        leaves.append(len(segments))
        segments.append(Segment(len(token_ids), len(prompt) - shared, root))
        token_ids += prompt[shared:]
        position_ids += range(shared, len(prompt))
    return PrefixTree(token_ids, position_ids, segments, leaves)


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens all prompts begin with; at least one token stays with each prompt."""
    first, last = min(prompts), max(prompts)  # in lexical order the extremes differ first
    limit = min(len(p) for p in prompts) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared
