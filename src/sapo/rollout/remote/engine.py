"""The driver's side of engines elsewhere: an `Engine` over channels to workers.

A worker that dies, or is too slow, is started again, given the weights that it had, and asked again: requests draw the
same noise whenever they are asked. With several channels each draws whole requests, and with one the batch goes there
whole, so that it comes out as in the run's own process, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ClassVar, TypeVar

from torch import Tensor

from sapo.data import Completion, Group
from sapo.data.messages import Message
from sapo.errors import EngineError, Interrupted
from sapo.rollout.engine import Capabilities, Request, Weights
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams
from sapo.rollout.remote.calls import generate_message, note_experts, raise_error, read_completions
from sapo.rollout.remote.channel import Channel, ChannelError

T = TypeVar("T")

HELLO_TIMEOUT = 1800.0
"""Seconds for a worker to start: imports, the engine's own start, compilation."""
CALL_TIMEOUT = 600.0
"""Seconds for a call that draws nothing."""
BUCKET = 256 * 2**20
"""Bytes of weights of one message, unless one parameter has more."""


class RemoteEngine:
    """Draws completions by engines elsewhere.

    Args:
        channels: one or more, each to a worker that has not been spoken to.
        hello: the first message to each (`building.hello_message`).
        timeout: seconds that a worker may take for its part of one `generate`.
        max_restarts: how often workers are started again, all of them together.
        on_restart: given a sentence on what died, each time one is.
        way_out: what to do, for the message when no restart is left.

    Raises:
        EngineError: a worker does not start.
        ConfigError, ModelError: its engine refuses the recipe or the model.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    """Those of the engine that draws there, once it is known."""

    def __init__(
        self,
        channels: Sequence[Channel],
        hello: Message,
        *,
        timeout: float,
        max_restarts: int = 0,
        on_restart: Callable[[str], None] = lambda _: None,
        way_out: str = "start again",
    ) -> None:
        self.version = 0
        self.way_out = way_out
        self.channels = list(channels)
        self._hello = hello
        self._timeout = timeout
        self._max_restarts = max_restarts
        self._on_restart = on_restart
        self._restarts = 0
        self._lock = threading.Lock()
        self._held: dict[str, Tensor] | None = None
        """The weights last set, until sleep: what a worker that is started again is given."""
        self._awake = False
        try:
            answers = self._on_all(self._set_up)
        except BaseException as error:
            self.close()
            if isinstance(error, ChannelError):  # one that does not even start would die again
                raise EngineError(f"{error}; nothing was begun: give the command again") from error
            raise
        vars(self)["capabilities"] = Capabilities(**answers[0].header["capabilities"])
        lengths = [length for answer in answers if (length := answer.header["max_length"]) is not None]
        self.max_length: int | None = min(lengths, default=None)
        """Longest sequence that every one of them holds; see `max_length_of`."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`."""
        if not requests:
            return []
        shares = split_requests(requests, params, len(self.channels))

        def draw(place: int) -> list[Group]:
            if not shares[place]:
                return []
            message = generate_message([requests[i] for i in shares[place]], params, experts is not None)
            return read_completions(self._ask(place, message, self._timeout, should_stop))

        drawn: dict[int, Group] = {}
        for share, groups in zip(shares, self._on_all(draw), strict=True):
            drawn |= zip(share, groups, strict=True)
        in_order = [drawn[i] for i in range(len(requests))]
        if experts is None:
            return [group.completions for group in in_order]
        return [note_experts(experts, i, group) for i, group in enumerate(in_order)]

    def set_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.set_weights`."""
        self._held, self.version = dict(weights), version

        def load(place: int) -> None:
            assert self._held is not None
            for message in self._weight_messages(self._held):
                self._ask(place, message, CALL_TIMEOUT)

        self._on_all(load)

    def sleep(self) -> None:
        """See `Engine.sleep`. A worker that has died is noticed by the next call."""
        self._held, self._awake = None, False

        def sleep(place: int) -> None:
            with suppress(ChannelError):
                self._tell(place, Message({"call": "sleep"}), CALL_TIMEOUT)

        self._on_all(sleep)

    def wake(self) -> None:
        """See `Engine.wake`."""
        self._on_all(lambda place: self._ask(place, Message({"call": "wake"}), CALL_TIMEOUT))
        self._awake = True

    def close(self) -> None:
        """See `Engine.close`."""
        for channel in self.channels:
            channel.close()

    def _on_all(self, work: Callable[[int], T]) -> list[T]:
        """Do some work for each channel, all at a time, and wait for all of it."""
        places = range(len(self.channels))
        if len(places) == 1:
            return [work(0)]
        with ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(work, places))

    def _set_up(self, place: int) -> Message:
        """Bring a worker that knows nothing to where the others are; return its answer to hello."""
        answer = self._tell(place, self._hello, HELLO_TIMEOUT)
        if self._awake:
            self._tell(place, Message({"call": "wake"}), CALL_TIMEOUT)
        if self._held is not None:
            for message in self._weight_messages(self._held):
                self._tell(place, message, CALL_TIMEOUT)
        return answer

    def _weight_messages(self, weights: Mapping[str, Tensor]) -> Iterator[Message]:
        for bucket in buckets(weights, BUCKET):
            yield Message({"call": "weights"}, bucket)
        yield Message({"call": "set_weights", "version": self.version})

    def _ask(
        self, place: int, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False
    ) -> Message:
        """Make a call, again and again if the worker dies of it, as often as it may be started again."""
        while True:
            try:
                return self._tell(place, message, timeout, should_stop)
            except ChannelError as error:
                if should_stop():  # nobody waits for the answer, and the next call finds out
                    raise Interrupted from error
                self._revive(place, error)

    def _tell(
        self, place: int, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False
    ) -> Message:
        answer = self.channels[place].call(message, timeout, should_stop)
        if answer.header.get("interrupted"):
            raise Interrupted
        raise_error(answer, f"engine {place}")
        return answer

    def _revive(self, place: int, error: ChannelError) -> None:
        """Start a worker again and give it what it had.

        Raises:
            EngineError: it has been done as often as it may be.
        """
        while True:
            self._count_restart(error)
            try:
                self.channels[place].restart()
                self._set_up(place)
                return
            except ChannelError as another:
                error = another

    def _count_restart(self, error: ChannelError) -> None:
        with self._lock:
            if self._restarts >= self._max_restarts:
                raise EngineError(f"{error}; {self.way_out}") from error
            self._restarts += 1
            count = self._restarts
        self._on_restart(f"{error}; it is started again ({count} of at most {self._max_restarts} times)")


def split_requests(requests: Sequence[Request], params: SamplingParams, parts: int) -> list[list[int]]:
    """Split requests into parts of about equally many tokens, the longest first to the emptiest; return their places.

    A request stays whole, and each part is in the order of the requests. Tokens are those of the prompt and the most
    that its samples may have.

    >>> from sapo.data import Prompt
    >>> prompt = Prompt(id=0, task="t", text="", token_ids=(1, 2))
    >>> split_requests([Request(prompt, n) for n in (1, 4, 2)], SamplingParams(max_new_tokens=8), 2)
    [[1], [0, 2]]
    """
    if parts == 1:
        return [list(range(len(requests)))]

    def tokens(place: int) -> int:
        request = requests[place]
        return len(request.prompt.token_ids) + sum(request.limits or (params.max_new_tokens,) * request.samples)

    filled = [0] * parts
    found: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(len(requests)), key=lambda i: (-tokens(i), i)):
        emptiest = filled.index(min(filled))
        found[emptiest].append(place)
        filled[emptiest] += tokens(place)
    return [sorted(part) for part in found]


def buckets(weights: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield weights in parts of at most so many bytes, unless one tensor has more.

    >>> import torch
    >>> weights = {name: torch.zeros(3, dtype=torch.float32) for name in "abc"}
    >>> [list(part) for part in buckets(weights, 24)]
    [['a', 'b'], ['c']]
    """
    part: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights.items():
        more = tensor.nbytes
        if part and held + more > size:
            yield part
            part, held = {}, 0
        part[name] = tensor
        held += more
    if part:
        yield part
