"""Prompts as a tree whose common beginning is there once.

Where prompts show pictures, equal token ids are not enough for a common beginning: all pictures are made of the same
token id. `prefix_keys` tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sapo.data import PackedPictures, Picture, Prompt, Segment

# A common beginning of all prompts shorter than this is not worth a segment of its own.
MIN_PREAMBLE = 16

PromptSpan = tuple[Prompt, int, int]
"""A prompt, and its first token and one past its last that are meant."""


@dataclass(frozen=True)
class PromptTokens:
    """Parts of encoded prompts, end to end."""

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    """(N,), or (3, N) where there are pictures whose tokens have three positions."""
    pictures: tuple[Picture, ...] = ()
    places: tuple[NDArray[np.int64], ...] = ()
    """For each picture, the tokens that stand for it."""

    def packed_pictures(self, device: torch.device | str) -> PackedPictures | None:
        """Return the pictures for `Policy.hidden`, None where there are none."""
        if not self.pictures:
            return None
        places_I = torch.from_numpy(np.concatenate(self.places)).to(device)
        return PackedPictures(self.pictures, tuple(map(len, self.places)), places_I)


@dataclass(frozen=True)
class PrefixTree:
    """Prompts as a tree [preamble | prompt 1 .. P], packed.

    >>> tree = prefix_tree([(5, 6), (5, 7, 8)])
    >>> tree.token_ids.tolist(), tree.position_ids.tolist(), tree.leaves
    ([5, 6, 5, 7, 8], [0, 1, 0, 1, 2], [0, 1])
    """

    tokens: PromptTokens
    segments: list[Segment]
    leaves: list[int] = field(default_factory=list)
    """Index of the segment that ends each prompt."""

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Return the packed token ids."""
        return self.tokens.token_ids

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """Return their positions, (N,) or (3, N)."""
        return self.tokens.position_ids

    @property
    def preamble(self) -> int:
        """Count the tokens that all prompts begin with and that are packed once."""
        return self.segments[self.leaves[0]].start


def prefix_tree(prompts: Sequence[tuple[int, ...]], min_preamble: int = MIN_PREAMBLE) -> PrefixTree:
    """Pack token ids; see `prompt_tree`."""
    return prompt_tree([Prompt(i, "", "", token_ids=ids) for i, ids in enumerate(prompts)], min_preamble)


def prompt_tree(prompts: Sequence[Prompt], min_preamble: int = MIN_PREAMBLE) -> PrefixTree:
    """Pack prompts, what they all begin with (a system prompt, few-shot examples, a picture) only once.

    Args:
        prompts: encoded, at least one token each.
        min_preamble: a shorter common beginning is left with each prompt.
    """
    shared = common_beginning(prompts, min_preamble)
    segments = [Segment(0, shared, -1)] if shared else []
    root, start = (0, shared) if shared else (-1, 0)
    leaves = []
    for prompt in prompts:
        leaves.append(len(segments))
        segments.append(Segment(start, len(prompt.token_ids) - shared, root))
        start += len(prompt.token_ids) - shared
    spans = [(prompts[0], 0, shared)] if shared else []
    return PrefixTree(join_spans([*spans, *((p, shared, len(p.token_ids)) for p in prompts)]), segments, leaves)


def common_beginning(prompts: Sequence[Prompt], min_preamble: int = MIN_PREAMBLE) -> int:
    """Count the tokens that all prompts begin with, pictures included, 0 where they are too few.

    At least one token stays with each prompt, and no picture is cut in two.
    """
    shared = _common_prefix(prefix_keys(prompts)) if len(prompts) > 1 else 0
    for prompt in prompts:
        for places in () if prompt.picture_tokens is None else prompt.picture_tokens.places:
            if places[0] < shared <= places[-1]:
                shared = places[0]
    return shared if shared >= min_preamble else 0


def prefix_keys(prompts: Sequence[Prompt]) -> list[NDArray[np.int64]]:
    """Return numbers for the tokens of each prompt, equal only where the model computes the same of equal beginnings.

    They are the token ids, and for the tokens of a picture a negative number that its content alone has among these
    prompts.
    """
    number = {sha: -1 - i for i, sha in enumerate(dict.fromkeys(p.sha256 for q in prompts for p in q.pictures))}
    keys = []
    for prompt in prompts:
        ids = np.array(prompt.token_ids, np.int64)
        if prompt.picture_tokens is not None:
            for picture, places in zip(prompt.pictures, prompt.picture_tokens.places, strict=True):
                ids[list(places)] = number[picture.sha256]
        keys.append(ids)
    return keys


def join_spans(spans: Sequence[PromptSpan]) -> PromptTokens:
    """Join parts of prompts end to end, none of which cuts a picture in two."""
    token_ids = [np.array(prompt.token_ids[start:stop], np.int64) for prompt, start, stop in spans]
    pictures: list[Picture] = []
    joined: list[NDArray[np.int64]] = []
    offset = 0
    for (prompt, start, stop), ids in zip(spans, token_ids, strict=True):
        if prompt.picture_tokens is not None:
            for picture, own in zip(prompt.pictures, prompt.picture_tokens.places, strict=True):
                if start <= own[0] < stop:
                    assert own[-1] < stop, "a picture is cut in two"
                    pictures.append(picture)
                    joined.append(np.array(own, np.int64) - start + offset)
        offset += len(ids)
    positions = [_positions(*span) for span in spans]
    if pictures and any(p.ndim == 2 for p in positions):
        positions = [np.broadcast_to(p, (3, p.shape[-1])) for p in positions]
    else:  # a token of text has one position, whichever pictures came before it
        positions = [p if p.ndim == 1 else p[0] for p in positions]
    return PromptTokens(np.concatenate(token_ids), np.concatenate(positions, axis=-1), tuple(pictures), tuple(joined))


def _positions(prompt: Prompt, start: int, stop: int) -> NDArray[np.int64]:
    if prompt.picture_tokens is None or prompt.picture_tokens.positions is None:
        return np.arange(start, stop)
    return np.array([axis[start:stop] for axis in prompt.picture_tokens.positions], np.int64)


def _common_prefix(prompts: Sequence[NDArray[np.int64]]) -> int:
    """Count the tokens all prompts begin with; at least one token stays with each prompt."""
    shared = min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differs = prompts[0][:shared] != prompt[:shared]
        if differs.any():
            shared = int(differs.argmax())
    return shared
