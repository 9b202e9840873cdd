"""Streams of several callers, drawn in one batch: continuous batching of requests as they come.

Whoever asks for the next tokens of its stream, and has none there, takes a step for all streams that are open; the
others then find theirs. Prompts join between two steps, each request drawn by its own settings and its own noise, so
that a completion depends on what else is drawn by rounding alone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch

from sapo.rollout.engine import Drawn, Request
from sapo.rollout.params import SamplingParams

if TYPE_CHECKING:
    from sapo.rollout.local.engine import RowsInPlace

MOST_REQUESTS = 512
"""Requests that a batch takes up before another begins beside it, so that it keeps little of those that are done."""

MakeRows = Callable[[Sequence[Request], SamplingParams], "RowsInPlace"]


class SharedStream:
    """The tokens of one caller's requests, as they are drawn; see `StreamingEngine.stream`.

    Args:
        places: of its requests among those of the batch.
    """

    def __init__(self, batch: _Batch, places: range, samples: int) -> None:
        self.places = places
        self.new: deque[list[Drawn]] = deque()
        self.undone = samples
        self._batch = batch

    def __del__(self) -> None:
        # Whoever collects it may be another thread, or the interpreter's end: the rows are left at the next step.
        if self.undone:
            self._batch.abandoned.append(self.places)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Drawn]:
        while not self.new:
            if not self.undone:
                raise StopIteration
            self._batch.step()
        return self.new.popleft()

    def close(self) -> None:
        """End the draws of these requests."""
        if self.undone:
            self._batch.leave(self)
        self.new.clear()
        self.undone = 0


class SharedRows:
    """Rows that all open streams are drawn in; they live as long as a stream does.

    Args:
        make: makes rows of the first requests, by their settings.
        max_rows: sequences decoded together, unless a single request has more.
    """

    def __init__(self, make: MakeRows, max_rows: int) -> None:
        self._make, self._max_rows = make, max_rows
        self._newest: weakref.ref[_Batch] | None = None

    @torch.no_grad()
    def open(self, requests: Sequence[Request], params: SamplingParams) -> SharedStream:
        """Take up the requests of a stream; they are drawn for from the next step on."""
        batch = None if self._newest is None else self._newest()
        if batch is not None and batch.takes(params):
            return batch.join(requests, params, self._max_rows)
        batch = _Batch(self._make(requests, params))
        self._newest = weakref.ref(batch)
        return batch.stream(range(len(requests)))


class _Batch:
    """Rows, and the streams whose requests they are."""

    def __init__(self, rows: RowsInPlace) -> None:
        self.rows = rows
        self.stops = rows.params.stop_token_ids
        self.streams: weakref.WeakSet[SharedStream] = weakref.WeakSet()
        self.abandoned: list[range] = []
        """Requests of streams that were dropped without being closed."""
        self._error: BaseException | None = None

    def takes(self, params: SamplingParams) -> bool:
        """Tell whether further requests may join."""
        young = self.rows.unfinished and len(self.rows.requests) < MOST_REQUESTS
        return young and self._error is None and params.stop_token_ids == self.stops

    def join(self, requests: Sequence[Request], params: SamplingParams, max_rows: int) -> SharedStream:
        """Take up the requests of a further stream."""
        first = len(self.rows.requests)
        try:
            self.rows.join(requests, params, max_rows)
        except BaseException as error:  # Ctrl-C too
            self._error = error  # rows that have grown in part are of no use
            raise
        return self.stream(range(first, first + len(requests)))

    def stream(self, places: range) -> SharedStream:
        """Return the stream of some of the requests."""
        made = SharedStream(self, places, sum(self.rows.requests[i].samples for i in places))
        self.streams.add(made)
        return made

    @torch.no_grad()
    def step(self) -> None:
        """Draw for all streams, and give each what is its.

        Raises:
            BaseException: as this step did, or the one before that failed or was interrupted: the rows are then of no
                use to any stream.
        """
        if self._error is not None:
            raise self._error
        rows = self.rows
        try:
            while self.abandoned:
                rows.give_up(self.abandoned.pop())
            rows.admit()
            rows.make_place()
            rows.step()
            drawn = rows.take_new()
            rows.retire()
            self._hand_out(drawn)
        except BaseException as error:  # Ctrl-C too
            self._error = error
            raise

    def _hand_out(self, drawn: list[Drawn]) -> None:
        for stream in list(self.streams):
            new = [d for d in drawn if d.request in stream.places]
            if new:
                stream.new.append([self._of(stream, d) for d in new])
            if not stream.undone:
                self.streams.discard(stream)

    def _of(self, stream: SharedStream, drawn: Drawn) -> Drawn:
        """Return what was drawn of a sample as its stream numbers it, with its completion where it has one by now."""
        completion = self.rows.results[drawn.request][drawn.sample]
        if completion is not None:
            stream.undone -= 1
            self.rows.results[drawn.request][drawn.sample] = None
        return replace(drawn, request=drawn.request - stream.places.start, completion=completion)

    @torch.no_grad()
    def leave(self, stream: SharedStream) -> None:
        """Draw no more for a stream."""
        self.streams.discard(stream)
        if self._error is None:
            self.rows.give_up(stream.places)
