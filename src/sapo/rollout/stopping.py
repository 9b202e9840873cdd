"""Where a completion ends: end tokens, and strings that one token holds or several tokens together complete.

A string is found in what was decoded, not in token ids, for it may be cut into tokens in many ways (SmolLM2 has 129
tokens that hold a newline). A string that names a special token, `<|im_end|>`, is found where that token is drawn. Most
tokens can never complete one; only those that can are looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo.model.policy import Policy


class StopRules:
    """The stop rules of one call of generate, a row of each table for each distinct set of stop strings.

    Args:
        policy: whose tokens are meant.
        stop_sets: distinct sets of stop strings; a decoding row names its own by number.
        stop_token_ids: what ends every completion.
    """

    def __init__(self, policy: Policy, stop_sets: Sequence[tuple[str, ...]], stop_token_ids: frozenset[int]) -> None:
        self.policy = policy
        self.stop_sets = list(stop_sets)
        self.stop_token_ids = stop_token_ids
        special = policy.special_texts()
        self.spelled = [any(text in string for text in special.values() for string in s) for s in self.stop_sets]
        """Which stop sets name a special token: their strings are looked for in texts that have these."""
        vocabulary = policy.head_weight.shape[0]
        ends_SV = torch.zeros(len(self.stop_sets), vocabulary, dtype=torch.bool)
        ends_SV[:, [t for t in stop_token_ids if t < vocabulary]] = True
        may_SV = torch.zeros_like(ends_SV)
        for number, strings in enumerate(self.stop_sets):
            texts = policy.token_texts()
            if self.spelled[number]:
                texts = [special.get(token, text) for token, text in enumerate(texts)]
            for string in strings:
                ends, may = _tokens_of(texts, string)
                ends_SV[number, ends] = True
                may_SV[number, may] = True
        self.ends_SV = ends_SV.to(policy.device)
        self.may_SV = may_SV.to(policy.device)
        self.may_stop = bool(may_SV.any())
        """Whether there is a token that may complete a string, which only what it is decoded to tells."""

    def stopped(
        self,
        set_R: Tensor,
        tokens_R: Tensor,
        history_RT: Tensor,
        generated_R: Tensor,
        start_R: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Return (R,) bool: which rows end with the token just drawn.

        Args:
            set_R: number of each row's stop set.
            tokens_R: the token just drawn.
            history_RT: tokens of each row, the new one included; `generated_R` says how many.
            start_R: where each row's present turn begins among them; 0 when None.
        """
        stopped_R = self.ends_SV[set_R, tokens_R]
        if self.may_stop:
            for row in (self.may_SV[set_R, tokens_R] & ~stopped_R).nonzero()[:, 0].tolist():
                start = 0 if start_R is None else int(start_R[row])
                stopped_R[row] = self.completed(int(set_R[row]), history_RT[row], int(generated_R[row]), start)
        return stopped_R

    def completed(self, number: int, history_T: Tensor, generated: int, start: int = 0) -> bool:
        """Return whether the last of a row's tokens has completed a string of its stop set.

        Args:
            start: where the present turn begins: what an environment said before it is no part of a stop string.
        """
        strings = self.stop_sets[number]
        # A token holds one character at least, or is part of one: so many tokens hold the whole string.
        first = max(start, generated - 4 * max(map(len, strings)))
        read = self.policy.show if self.spelled[number] else self.policy.decode
        tail = read(history_T[first:generated].tolist())
        return any(string in tail for string in strings)

    def ends(self, number: int, token_ids: Sequence[int]) -> bool:
        """Return whether the last of a sample's tokens ends it, by its id or because it completes a string."""
        token = token_ids[-1]
        if self.ends_SV[number, token]:
            return True
        return bool(self.may_SV[number, token]) and self.completed(number, torch.tensor(token_ids), len(token_ids))

    def text(self, number: int, token_ids: Sequence[int], special: bool = False) -> str:
        """Return a finished completion's text: what comes before the end token or the stop string.

        Args:
            special: with special tokens spelled out, in place of left out.
        """
        if token_ids[-1] in self.stop_token_ids:
            return self.policy.show(token_ids[:-1]) if special else self.policy.decode(token_ids[:-1])
        text = self.policy.show(token_ids) if special or self.spelled[number] else self.policy.decode(token_ids)
        found = [at for string in self.stop_sets[number] if (at := text.find(string)) >= 0]
        text = text[: min(found)] if found else text
        if self.spelled[number] and not special:
            for token in self.policy.special_texts().values():
                text = text.replace(token, "")
        return text


def _tokens_of(texts: Sequence[str], string: str) -> tuple[list[int], list[int]]:
    """Return tokens that hold the string, and tokens that may complete it because they begin with an end of it."""
    ends, may = [], []
    tails = tuple(string[i:] for i in range(1, len(string)))
    for token, text in enumerate(texts):
        part_of_a_character = "\N{REPLACEMENT CHARACTER}" in text and not string.isascii()
        if string in text:
            ends.append(token)
        elif part_of_a_character or (tails and text and text.startswith(tails)):
            may.append(token)
    return ends, may
