"""Conversations of a fixed script with an engine: who is spoken to when, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from sapo.data import Completion
from sapo.rollout.conversation import Conversation, begin_conversation
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams
from support.engine_cases import assert_same, random_ids

Said = Callable[[int, int, int], tuple[int, ...] | None]
"""said(place, sample, turn): what a sample hears before a turn; None when it is not asked this time."""


@dataclass
class Talk:
    """What one sample has read and drawn, and its turns."""

    first: Request
    sample: int
    ids: list[int] = field(default_factory=list)
    drawn: int = 0
    turns: list[Completion] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    """Tokens before each turn, the prompt's counted."""

    def request(self, said: Sequence[int], limit: int) -> Request:
        prompt = replace(self.first.prompt, token_ids=(*self.first.prompt.token_ids, *self.ids, *said))
        if prompt.picture_tokens is not None and prompt.picture_tokens.positions is not None:
            start = self.first.prompt.next_position
            further = range(start, start + len(self.ids) + len(said))
            positions = tuple((*axis, *further) for axis in prompt.picture_tokens.positions)
            prompt = replace(prompt, picture_tokens=replace(prompt.picture_tokens, positions=positions))
        return Request(prompt, 1, (limit,), first_sample=self.sample, drawn=self.drawn)

    def take(self, said: Sequence[int], turn: Completion) -> None:
        self.begins.append(len(self.first.prompt.token_ids) + len(self.ids) + len(said))
        self.ids += [*said, *turn.token_ids.tolist()]
        self.drawn += len(turn)
        self.turns.append(turn)


def ragged(place: int, sample: int, turn: int) -> tuple[int, ...] | None:
    """Nothing or up to seven tokens; some samples are not asked this time, and some never again."""
    if (place + sample + turn) % 7 == 3 or (place + 2 * sample) % 5 < turn - 2:
        return None
    return random_ids((place + 3 * sample + 5 * turn) % 8, seed=1000 * turn + 10 * place + sample)


def talk(
    engine: Any,
    requests: Sequence[Request],
    params: SamplingParams,
    turns: int = 5,
    said: Said = ragged,
    limit: Callable[[int], int] = lambda turn: 3 + turn,
    within: Callable[[Any, SamplingParams], Conversation] = begin_conversation,
) -> list[Talk]:
    """Hold a conversation in which all samples begin together."""
    conversation = within(engine, params)
    talks = [[Talk(r, j) for j in range(r.samples)] for r in requests]
    opening = replace(params, max_new_tokens=limit(0))
    asked = [replace(r, limits=(limit(0),) * r.samples) for r in requests]
    for samples, drawn in zip(talks, conversation.generate(asked, opening), strict=True):
        for one, completion in zip(samples, drawn, strict=True):
            one.take((), completion)
    for turn in range(1, turns):
        heard = [(one, said(i, one.sample, turn)) for i, samples in enumerate(talks) for one in samples]
        asking = [(one, ids) for one, ids in heard if ids is not None]
        later = [one.request(ids, limit(turn)) for one, ids in asking]
        answers = conversation.generate(later, replace(params, max_new_tokens=limit(turn)))
        for (one, ids), (completion,) in zip(asking, answers, strict=True):
            one.take(ids, completion)
    conversation.close()
    return [one for samples in talks for one in samples]


def assert_same_talks(ours: Sequence[Talk], theirs: Sequence[Talk]) -> None:
    """Compare conversations turn by turn: tokens exactly, log-probabilities to 1e-5."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.ids == other.ids
        for one, another in zip(mine.turns, other.turns, strict=True):
            assert_same(one, another)


@torch.no_grad()
def assert_plain(model: Any, talks: Sequence[Talk], temperature: float = 1.0) -> None:
    """Hold every log-probability against one plain forward over all that a sample has read and drawn."""
    for one in talks:
        ids = [*one.first.prompt.token_ids, *one.ids]
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / temperature, -1)
        for begin, turn in zip(one.begins, one.turns, strict=True):
            places = range(begin, begin + len(turn))
            expected = logp[[p - 1 for p in places], [ids[p] for p in places]]
            torch.testing.assert_close(torch.tensor(turn.logprobs), expected, rtol=0, atol=1e-5)
        assert all(a < b for a, b in pairwise(one.begins))
