"""One episode, played in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import pickle
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from json.encoder import JSONEncoder
from typing import Any

from sapo.data import Prompt
from sapo.environments.base import Answer, Messages, OutOfBudget, Turn
from sapo.environments.clock import CLOCK
from sapo.environments.failures import WHILE_OPEN, check_observation, describe_failure
from sapo.tasks.base import checked_score
from sapo.tasks.workers.wire import HEADER, framed, score_to_json

_REFUSALS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}

# Bound before a user's module may put something else in their place.
_encode = JSONEncoder().encode
_unpickle = pickle.loads


def play_one(channel: socket.socket, environment: Any) -> None:
    """Play the episode that the run sends, and answer with what became of it."""
    channel.setblocking(False)
    loop = asyncio.new_event_loop()
    episode = loop.create_task(_Episode(channel, environment).run())
    loop.add_signal_handler(signal.SIGTERM, episode.cancel)
    with contextlib.suppress(OSError, asyncio.CancelledError):  # nobody waits for it
        loop.run_until_complete(episode)


class _Episode:
    def __init__(self, channel: socket.socket, environment: Any) -> None:
        self._channel, self._environment = channel, environment
        self._me = os.getpid()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        frame = await self._read()
        try:
            prompt, seed, seconds = _unpickle(frame)
        except BaseException as error:  # an object in the metadata may raise anything when it is made again
            await self.send(
                {"failed": f"its worker process cannot read the prompt: {describe_failure(error, __file__)}"}
            )
            return
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        await self.send({"began": self._me})
        answer = await self._play(prompt, seed, seconds)
        if os.getpid() != self._me:  # a child that the environment forked: only its parent may answer
            os._exit(0)
        await self.send(answer)

    async def _play(self, prompt: Prompt, seed: int, seconds: float) -> dict[str, Any]:
        clock = _Clock(self, seconds)
        ask = _Ask(self, seed, clock)
        CLOCK.set(clock)
        listening = asyncio.create_task(ask.listen())
        try:
            made = self._environment.play(prompt, ask)
            if not inspect.iscoroutine(made):
                raise TypeError(f"play must be a coroutine (async def play); got {type(made).__name__}")
            return _in_json(await made)
        except OutOfBudget as error:
            return {"spent": str(error)}
        except BaseException as error:
            return {"failed": describe_failure(error, __file__)}
        finally:
            listening.cancel()

    async def send(self, answer: dict[str, Any]) -> None:
        data = framed(_encode(answer).encode())
        async with self._sending:
            await asyncio.get_running_loop().sock_sendall(self._channel, data)

    async def receive(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = _unpickle(await self._read())
        return found

    async def _read(self) -> bytes:
        _, length = HEADER.unpack(await self._exactly(HEADER.size))
        return await self._exactly(length)

    async def _exactly(self, size: int) -> bytes:
        loop, found = asyncio.get_running_loop(), bytearray()
        while len(found) < size:
            chunk = await loop.sock_recv(self._channel, min(size - len(found), 1 << 20))
            if not chunk:
                raise ConnectionError("the run has ended the episode")
            found += chunk
        return bytes(found)


class _Ask:
    """What an environment is given; see `environments.Ask`."""

    def __init__(self, episode: _Episode, seed: int, clock: _Clock) -> None:
        self.seed = seed
        self._episode, self._clock = episode, clock
        self._open: asyncio.Future[Turn] | None = None

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        """Show the model an observation and return its answer."""
        if self._open is not None:
            raise RuntimeError(WHILE_OPEN)
        check_observation(observation)
        said = observation if isinstance(observation, str) else [dict(message) for message in observation]
        self._open = asyncio.get_running_loop().create_future()
        answer = self._open
        try:
            await self._episode.send({"ask": said, "max_tokens": max_tokens})
        except (TypeError, ValueError) as error:  # an object that is no JSON, or a circle
            self._open = None
            raise ValueError(f"a message must be made of texts, numbers, lists and objects: {error}") from error
        return await answer

    async def listen(self) -> None:
        """Hand the model's turns to whoever waits for them."""
        while True:
            kind, *what = await self._episode.receive()
            answer, self._open = self._open, None
            self._clock.begin()
            if answer is None or answer.done():  # an environment that cancelled its own ask
                continue
            if kind == "turn":
                answer.set_result(Turn(*what))
            elif kind == "spent":
                answer.set_exception(OutOfBudget(what[0]))
            else:
                answer.set_exception(_REFUSALS.get(what[0], RuntimeError)(what[1]))


class _Clock:
    """The clock of the episode; see `environments.clock.Clock`. What the run counts is its own."""

    def __init__(self, episode: _Episode, most: float) -> None:
        self.most = most
        self._episode = episode
        self._waits = 0
        self._stood = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self.begin()

    def begin(self) -> None:
        """Begin anew, with the model's turn."""
        self._since = time.perf_counter()

    def seconds(self) -> float:
        return self._stood if self._waits else time.perf_counter() - self._since

    def paused(self) -> AbstractContextManager[None]:
        return self._pause()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        if not self._waits:
            self._stood = self.seconds()
            self._tell(True)
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if not self._waits:
                self._since = time.perf_counter() - self._stood
                self._tell(False)

    def _tell(self, paused: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._episode.send({"pause": paused}))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _in_json(returned: Any) -> dict[str, Any]:
    """Return what `play` returned.

    Raises:
        TypeError, ValueError: it is neither a score nor an answer.
    """
    if not isinstance(returned, Answer):
        return {"score": score_to_json(checked_score(returned, "play"))}
    if not isinstance(returned.text, str):
        raise TypeError(f"an answer must be a text; got {type(returned.text).__name__}")
    figures = {str(name): float(value) for name, value in returned.figures.items()}
    return {"answer": returned.text, "figures": figures}
