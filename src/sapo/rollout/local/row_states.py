"""Recurrent states in decoding: each row of the engine has its own, beside its keys and values.

A prompt's states are computed once, in its prefill, and copied to the rows of its samples. A decode step reads and
writes the first R rows; rows that move take their states along (cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapo.model.state_tree import KeptStates, Place, Scan, Sequences


class RowStates:
    """The states of up to so many rows.

    Args:
        rows: sequences decoded together.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.kept = KeptStates()

    def fill(self, rows_R: Tensor, prompts: KeptStates, prompt_R: Tensor) -> None:
        """Let rows begin with what their prompts left behind.

        Args:
            rows_R: which rows.
            prompt_R: the prompt of each, among `prompts`.
        """
        for mine, theirs in ((self.kept.windows, prompts.windows), (self.kept.states, prompts.states)):
            for place, values in theirs.items():
                if place not in mine:
                    mine[place] = values.new_zeros(self.rows, *values.shape[1:])
                mine[place][rows_R] = values[prompt_R]

    def deepen(self, rows: int) -> None:
        """Make room for so many rows; those that are there stay."""
        for kept in (self.kept.windows, self.kept.states):
            for place, values in kept.items():
                kept[place] = torch.cat([values, values.new_zeros(rows - self.rows, *values.shape[1:])])
        self.rows = rows

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others."""
        for kept in (self.kept.windows, self.kept.states):
            for values in kept.values():
                values[target] = values[source]


class DecodeStates:
    """The states of a decode step, one new token for each of the first R rows."""

    def __init__(self, kept: KeptStates) -> None:
        self.kept = kept

    def convolve(self, place: Place, input_NC: Tensor, weight_CK: Tensor) -> Tensor:
        """See `sapo.model.recurrent.States`."""
        window_RKC = self.kept.windows[place][: len(input_NC)]
        reached_RKC = torch.cat([window_RKC, input_NC[:, None].to(window_RKC.dtype)], dim=1)
        window_RKC.copy_(reached_RKC[:, 1:])
        # 16-bit products are summed in float32, as in training.
        wide = torch.float32 if weight_CK.element_size() < 4 else weight_CK.dtype
        return (reached_RKC.to(wide) * weight_CK.T.to(wide)).sum(1).to(weight_CK.dtype)

    def scan(self, place: Place, inputs: Sequence[Tensor], scan: Scan, packs: bool = False) -> Tensor:
        """See `sapo.model.recurrent.States`."""
        states = self.kept.states[place][: len(inputs[0])]
        output, last = scan(Sequences(tuple(t[:, None] for t in inputs), states, is_single=True))
        states.copy_(last)
        return output[:, 0]
