"""Conversations with the local engine: between two turns a sample's row stays in the cache, with all it has computed.

What was said to it since is read token by token, one decode step each, while other rows read or draw; then it draws on.
A row whose turn has ended is parked, and all of a call wait for each other, so that which rows decode together depends
on the recipe and the seed and not on who answered first. Where there is no room for all, those parked longest are given
up, and what they had is prefilled anew when their next turn is asked for. So is what is longer to read than to prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sapo.data import Completion
from sapo.model.prefix_tree import common_beginning
from sapo.rollout.engine import Request, check_lengths
from sapo.rollout.params import SamplingParams

if TYPE_CHECKING:
    from sapo.rollout.local.engine import LocalEngine, RowsInPlace

READ_TOKENS = 64
"""An observation of so many tokens is always read in place."""

READ_SHARE = 0.25
"""A longer one is where it is no more than this share of what the row holds: a prefill of all costs more than steps."""


class LocalConversation:
    """A conversation in place.

    Args:
        engine: whose weights draw; when it is given others, what was computed with the old ones is forgotten.
        params: see `begin_conversation`.
    """

    in_place = True

    def __init__(self, engine: LocalEngine, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._rows: RowsInPlace | None = None
        self._weights = engine.weights_set

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Completion, ...]]:
        """See `Conversation.generate`."""
        assert replace(params, max_new_tokens=1) == replace(self._params, max_new_tokens=1), "one way of drawing"
        if not requests:
            return []
        check_lengths(requests, params, self._engine.policy.max_length)
        if self._weights != self._engine.weights_set:
            self.close()
            self._weights = self._engine.weights_set
        rows, places = self._begin_turns(requests, params)
        try:
            self._engine.decode(rows, should_stop)
        except BaseException:
            self.close()  # rows that were interrupted stand within their turns
            raise
        return [tuple(rows.take(*place) for place in samples) for samples in places]

    def close(self) -> None:
        """See `Conversation.close`."""
        self._rows = None

    def _begin_turns(
        self, requests: Sequence[Request], params: SamplingParams
    ) -> tuple[RowsInPlace, list[list[tuple[int, int]]]]:
        """Let rows go on and new ones wait; return the rows, and group and number of each sample of each request."""
        if self._rows is not None:
            rows = self._rows
            rows.params = params
            turns = _turns_of(rows, requests)
            new = [i for i in range(len(requests)) if i not in turns]
            if _joins(rows, [requests[i] for i in new], len(turns), self._engine.max_rows):
                return rows, self._go_on(rows, requests, turns, new)
        self._rows = self._engine.rows_for(requests, params, self._params.max_new_tokens)
        return self._rows, [[(i, j) for j in range(r.samples)] for i, r in enumerate(requests)]

    def _go_on(
        self, rows: RowsInPlace, requests: Sequence[Request], turns: dict[int, tuple[int, list[int]]], new: list[int]
    ) -> list[list[tuple[int, int]]]:
        places: list[list[tuple[int, int]]] = [[] for _ in requests]
        for i, (row, _) in turns.items():
            places[i] = [(int(rows.request[row]), int(rows.sample[row]))]
        first = len(rows.requests)
        for group, i in enumerate(new, first):
            places[i] = [(group, j) for j in range(requests[i].samples)]
        rows.widen_for(
            [int(rows.generated[row]) + len(said) + _most(requests[i], rows.params) for i, (row, said) in turns.items()]
            + [_most(requests[i], rows.params) for i in new]
        )
        rows.add([requests[i] for i in new])
        rows.resume({row: (requests[i], said) for i, (row, said) in turns.items()})
        return places


def _most(request: Request, params: SamplingParams) -> int:
    return max(request.limits) if request.limits else params.max_new_tokens


def _turns_of(rows: RowsInPlace, requests: Sequence[Request]) -> dict[int, tuple[int, list[int]]]:
    """Return which requests go on in which parked rows, and the tokens that each has to read before it draws."""
    parked: dict[tuple[str, int, int], list[int]] = {}
    held = rows.held()
    for row in held:
        first = rows.requests[rows.request[row]]
        parked.setdefault((*_name(first), first.first_sample + int(rows.sample[row])), []).append(row)
    turns: dict[int, tuple[int, list[int]]] = {}
    for i, request in enumerate(requests):
        if request.samples > 1:
            continue
        for row in parked.get((*_name(request), request.first_sample), []):
            said = _said(rows.requests[rows.request[row]], held[row], request)
            if said is not None and len(said) <= max(READ_TOKENS, READ_SHARE * len(request.prompt.token_ids)):
                parked[*_name(request), request.first_sample].remove(row)
                turns[i] = row, said
                break
    return turns


def _name(request: Request) -> tuple[str, int]:
    return request.prompt.task, request.prompt.id


def _said(first: Request, own: torch.Tensor, request: Request) -> list[int] | None:
    """Return what a request's prompt holds beyond what a row does; None where it does not begin with that.

    Args:
        first: the request that the row began with.
        own: what it has read and drawn since.
    """
    prompt, asked = first.prompt, request.prompt
    length = len(prompt.token_ids)
    if asked.token_ids[:length] != prompt.token_ids:
        return None
    if (asked.stop, asked.special_tokens, asked.pictures) != (prompt.stop, prompt.special_tokens, prompt.pictures):
        return None
    further = list(asked.token_ids[length:])
    return further[len(own) :] if further[: len(own)] == own.tolist() else None


def _joins(rows: RowsInPlace, new: Sequence[Request], going_on: int, max_rows: int) -> bool:
    """Return whether new requests can be taken up beside rows that go on, rather than all be begun anew."""
    if not new:
        return True
    samples = sum(r.samples for r in new)
    crowded = going_on + samples > rows.cache.rows and rows.cache.rows < max_rows
    if crowded or max(r.samples for r in new) > rows.cache.rows:
        return False
    first = rows.requests[0].prompt
    return not rows.preamble or all(common_beginning([first, r.prompt]) >= rows.preamble for r in new)
