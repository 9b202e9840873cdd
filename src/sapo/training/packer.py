"""The driver's side of a trainer: groups to the packed batches it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sapo.data import Group
from sapo.training.batch import pack
from sapo.training.ranks import Shares


@dataclass(frozen=True)
class Packer:
    """Packs the groups of a run, with the settings that its recipe gives.

    >>> packer = Packer(normalizer="token_mean", tokens_per_microbatch=8192, max_new_tokens=64)
    >>> packer.pack([]).of_rank
    ((),)
    """

    normalizer: str
    """How the tokens of a mini-batch are weighted; see `sapo.objectives.sequence_weights`."""
    tokens_per_microbatch: int
    """Packed tokens of one forward pass: bounds memory and never changes the result."""
    max_new_tokens: int
    """Longest completion there can be: the constant of the `constant_length` normalizer."""
    device: torch.device | str = "cpu"
    """Where the packed tensors are put: where the trainer computes."""
    include_flat: bool = False
    """Pack zero-variance groups too: with a KL penalty the reference still pulls on them."""
    ranks: int = 1
    """Ranks of the training group that the groups are dealt to."""
    picture_tokens_per_microbatch: int | None = None
    """Picture tokens of one forward pass: bounds the memory of the vision tower and never changes the result."""

    def pack(self, groups: Sequence[Group], include_all: bool = False) -> Shares:
        """Pack the groups of one mini-batch.

        Args:
            include_all: pack whatever there is, masked completions too, for measurements over all of it.
        """
        return pack(
            groups,
            normalizer=self.normalizer,
            tokens_per_microbatch=self.tokens_per_microbatch,
            max_new_tokens=self.max_new_tokens,
            device=self.device,
            include_flat=self.include_flat,
            include_all=include_all,
            ranks=self.ranks,
            picture_tokens_per_microbatch=self.picture_tokens_per_microbatch,
        )
