"""The side of the run: start a host for each environment, and play episodes in the players that it forks.

An episode that is played elsewhere is a coroutine like any other, which tells the player what the model said and the
driver what the environment says. Nobody else reads from its player. A player that dies is started once more: the
episode is played again from its beginning, where the environment hears what the model has already said to it. It has to
say the same again, which what depends on its prompt and `ask.seed` alone does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import pickle
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from sapo.data import Prompt, Score
from sapo.environments.base import Answer, Ask, Messages, OutOfBudget, Turn
from sapo.environments.clock import off_the_clock
from sapo.errors import TaskError
from sapo.tasks.episodes.origin import Origin
from sapo.tasks.episodes.wire import ENDED, EPISODE, GRACE, LOST, MAX_FRAME, exit_code
from sapo.tasks.workers.pool import LOAD_DEADLINE
from sapo.tasks.workers.starting import Starter, end, has_ended, how_it_ended
from sapo.tasks.workers.wire import Home, NonsenseError, framed, next_answer, score_from_json
from sapo.utils.text import name_error

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "TERM"),
    *("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SAPO_CACHE"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
"""Environment variables that every player has, beside those that begin with LC_: where things are, and no secrets."""

BEGIN_DEADLINE = 120.0
"""Seconds for a player to begin, after it was sent its prompt or another player of its host began: a host forks one at
a time, and all players share the machine."""

_NO_ANSWER = "the worker wrote what is no answer; an environment must leave file descriptors of others alone"


class PlayError(Exception):
    """An environment failed in its player; the text says how."""


class _DiedError(Exception):
    """A player ended before its episode did."""


class _NothingSaidError(_DiedError):
    """Its host did not say how it ended: it has died too, or never had the socket."""


class Host:
    """A process that forks a player for every episode of one environment. It is started when it is needed.

    Args:
        origin: how it makes the environment.
        home: where it finds the modules of that.
        variables: names of the environment variables that it has beside PASSED.
    """

    def __init__(self, origin: Origin, home: Home, variables: Iterable[str] = ()) -> None:
        self._origin, self._home, self._variables = origin, home, tuple(variables)
        self._starter = Starter("sapo.tasks.episodes.host")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._begun = 0.0

    def ready(self) -> None:
        """Return when its process has loaded the environment; start one where none lives.

        Raises:
            TaskError: it could not load it.
        """
        with self._lock:
            if self._process is not None and not has_ended(self._process):
                return
            self._end()
            self._process, self._channel = self._starter.start(self._home, self._environment())
            try:
                self._channel.setblocking(True)
                self._channel.sendall(framed(pickle.dumps(self._origin)))
                self._channel.setblocking(False)
                self._await_loaded(self._process, self._channel)
            except BaseException:
                self._end()
                raise

    async def admit(self, episode: socket.socket) -> None:
        """Give the host the socket of an episode.

        Raises:
            PlayError: it died, and could not load the environment again.
        """
        while True:
            try:
                channel = self._channel
                if channel is None or self._process is None or has_ended(self._process):
                    await asyncio.to_thread(self.ready)
                    continue
                socket.send_fds(channel, [EPISODE], [episode.fileno()])
                return
            except TaskError as error:
                raise PlayError(str(error)) from error
            except BlockingIOError:  # it has not taken up those before
                await asyncio.sleep(0.005)
            except OSError:
                await asyncio.sleep(0.005)  # until its end is seen

    async def await_begin(self, line: _Line, message: bytes) -> None:
        """Send a player its prompt, and return when it begins.

        Raises:
            _DiedError: it ended before.
            PlayError: it did not begin in time, or said why it cannot; or the host could not take its socket.
        """
        beginning = asyncio.ensure_future(_begin(line, message))
        sent = time.monotonic()
        try:
            while not beginning.done():
                left = max(sent, self._begun) + BEGIN_DEADLINE - time.monotonic()
                if left <= 0:
                    raise PlayError(f"its worker process did not begin within {BEGIN_DEADLINE:g} s")
                await asyncio.wait((beginning,), timeout=left)
            said = beginning.result()
        except _NothingSaidError:
            if await self._has_lost_socket():
                raise PlayError(
                    "its worker process could not be started: the host of these processes has no file descriptor left; "
                    "raise the hard limit of open files (ulimit -Hn)"
                ) from None
            raise
        finally:
            if not beginning.done():
                beginning.cancel()
                await asyncio.wait((beginning,))
        if "began" not in said:
            raise PlayError(str(said.get("failed", _NO_ANSWER)))
        self._begun = time.monotonic()

    async def _has_lost_socket(self) -> bool:
        """Return whether the host says that the socket of an episode did not reach it; it does so a little later."""
        until = time.monotonic() + GRACE
        while not self._takes_lost():
            if self._process is None or has_ended(self._process) or time.monotonic() > until:
                return False
            await asyncio.sleep(0.005)
        return True

    def _takes_lost(self) -> bool:
        """Take what the host says of one socket that did not reach it; return False where it says nothing."""
        if not self._lock.acquire(blocking=False):  # it is being started anew
            return False
        try:
            return self._channel is not None and self._channel.recv(1) == LOST
        except OSError:
            return False
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process with all of its players. It is started again when it is needed."""
        with self._lock:
            self._end()

    def process_id(self) -> int | None:
        """Return the process id of the guard above the host, where it lives."""
        return None if self._process is None or has_ended(self._process) else self._process.pid

    def _end(self) -> None:
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        if channel is not None:
            channel.close()
        if process is not None:
            end(process)

    def _environment(self) -> dict[str, str]:
        names = [name for name in os.environ if name in PASSED or name.startswith("LC_") or name in self._variables]
        # The order of sets of texts, too, is then the same in every process.
        return {"PYTHONHASHSEED": "0", **{name: os.environ[name] for name in names}}

    def _await_loaded(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        incoming, until = bytearray(), time.monotonic() + LOAD_DEADLINE
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            while time.monotonic() < until:
                if selector.select(1.0):
                    chunk = channel.recv(1 << 16)
                    incoming += chunk
                    if (answer := _frame(incoming)) is not None:
                        if "refused" in answer:
                            raise TaskError(
                                f"{self._named}, in a process of its own, which has the environment variables that "
                                f"rollout.turns.env names beside the ordinary ones: {answer['refused']}"
                            )
                        return
                    if not chunk:
                        self._refuse_dead(process)
                elif has_ended(process):
                    self._refuse_dead(process)
        raise TaskError(f"{self._named} was not loaded within {LOAD_DEADLINE:g} s in its worker process")

    @property
    def _named(self) -> str:
        return f"environment {self._origin.kind!r}"

    def _refuse_dead(self, process: subprocess.Popen[bytes]) -> NoReturn:
        how = how_it_ended(end(process))
        raise TaskError(f"{self._named}: its worker process died while it loaded the environment: {how}")


@dataclass
class _Call:
    """What the environment has said once, and what it heard."""

    said: str | Messages
    max_tokens: int | None
    heard: tuple[Any, ...]


@dataclass
class _Line:
    """The socket of an episode."""

    channel: socket.socket
    incoming: bytearray = field(default_factory=bytearray)

    async def send(self, *message: Any) -> None:
        await self.send_bytes(pickle.dumps(message))

    async def send_bytes(self, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # its player has died, which reading will show
            await asyncio.get_running_loop().sock_sendall(self.channel, framed(message))

    async def read(self) -> dict[str, Any]:
        """Return what the player says next.

        Raises:
            _DiedError: it has ended.
            PlayError: it said nonsense.
        """
        loop = asyncio.get_running_loop()
        while (answer := _frame(self.incoming)) is None:
            try:
                chunk = await loop.sock_recv(self.channel, 1 << 18)
            except ConnectionError:
                chunk = b""
            if not chunk:
                code = exit_code(self.incoming)
                if code is None:
                    raise _NothingSaidError("the host of its process died")
                raise _DiedError(how_it_ended(code))
            self.incoming += chunk
        return answer

    async def leave(self) -> None:
        """Tell the player that nobody waits for it, and give it time to close what it opened."""
        with contextlib.suppress(OSError, TimeoutError, PlayError, _DiedError):
            self.channel.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(GRACE):
                while True:
                    await self.read()


async def _begin(line: _Line, message: bytes) -> dict[str, Any]:
    await line.send_bytes(message)
    return await line.read()


class Elsewhere:
    """An environment whose episodes are played in processes of their own.

    Args:
        host: forks them.
        seconds_per_reply: for the environment's tools to know; the driver has the clock.
    """

    def __init__(self, host: Host, seconds_per_reply: float) -> None:
        self._host, self._seconds = host, seconds_per_reply

    async def play(self, prompt: Prompt, ask: Ask) -> Score | Answer:
        """Play one episode, and once more where its player dies.

        Raises:
            OutOfBudget: the environment let it pass.
            PlayError: the environment failed.
        """
        past: list[_Call] = []
        try:
            return await self._once(prompt, ask, past)
        except _DiedError as error:
            first = error
        try:
            return await self._once(prompt, ask, past)
        except _DiedError as second:
            raise PlayError(
                f"its worker process died ({first}), and again when it was played anew ({second})"
            ) from None

    async def _once(self, prompt: Prompt, ask: Ask, past: list[_Call]) -> Score | Answer:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        line = _Line(ours)
        try:
            with off_the_clock():  # until it begins: the host forks one player at a time
                try:
                    await self._host.admit(theirs)
                finally:
                    theirs.close()
                await self._host.await_begin(line, _pickle_beginning(prompt, ask.seed, self._seconds))
                await self._replay(line, past)
            return await _Dialogue(line, ask, past).hold()
        except asyncio.CancelledError:
            await line.leave()
            raise
        finally:
            ours.close()

    async def _replay(self, line: _Line, past: Sequence[_Call]) -> None:
        """Let the environment hear again what it has heard, each reply within its time.

        Raises:
            _DiedError: it died once more.
            PlayError: it hung, or said something else than before.
        """
        for call in past:
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await line.read()
                    while "pause" in answer:
                        answer = await line.read()
                    same = answer.get("ask") == call.said and answer.get("max_tokens") == call.max_tokens
                    if same:
                        await line.send(*call.heard)
            except TimeoutError:
                raise PlayError("its worker process died, and hung when it was played anew") from None
            if not same:
                raise PlayError(
                    "its worker process died, and it said something else when it was played anew: an environment may "
                    "depend on its prompt and on ask.seed alone"
                )


class _Dialogue:
    """The conversation of one player with the model."""

    def __init__(self, line: _Line, ask: Ask, past: list[_Call]) -> None:
        self._line, self._ask, self._past = line, ask, past
        self._pause = contextlib.ExitStack()
        self._reading: asyncio.Future[dict[str, Any]]

    async def hold(self) -> Score | Answer:
        """Carry asks to the model and its turns back, until the environment ends the episode."""
        self._read_on()
        try:
            while True:
                said = await self._reading
                if "ask" in said:
                    self._pause.close()
                    self._read_on()
                    await self._turn(said["ask"], said.get("max_tokens"))
                    continue
                if "pause" in said:
                    self._pause.close()
                    if said["pause"]:
                        self._pause.enter_context(off_the_clock())
                    self._read_on()
                    continue
                return _result(said)
        finally:
            self._pause.close()
            self._reading.cancel()
            with contextlib.suppress(BaseException):
                await self._reading

    def _read_on(self) -> None:
        self._reading = asyncio.ensure_future(self._line.read())

    async def _turn(self, said: Any, max_tokens: Any) -> None:
        """Ask the model for a turn, unless the environment ends the episode first."""
        asking = asyncio.ensure_future(_heard(self._ask, said, max_tokens))
        try:
            while not asking.done():
                await asyncio.wait((asking, self._reading), return_when=asyncio.FIRST_COMPLETED)
                if asking.done():
                    break
                if isinstance(self._reading.exception(), _DiedError):
                    await asyncio.wait((asking,))  # the turn is drawn all the same, and the environment will hear it
                elif self._reading.exception() is None and "pause" in self._reading.result():
                    self._read_on()  # the clock stands still anyway, and begins anew with the turn
                else:
                    return  # it has ended the episode by itself
            heard = asking.result()
        finally:
            asking.cancel()
        self._past.append(_Call(said, max_tokens, heard))
        await self._line.send(*heard)


async def _heard(ask: Ask, said: Any, max_tokens: Any) -> tuple[Any, ...]:
    try:
        turn: Turn = await ask(said, max_tokens=max_tokens)
    except OutOfBudget as error:
        return "spent", str(error)
    except (TypeError, ValueError, RuntimeError) as error:
        return "refused", type(error).__name__, str(error)
    return "turn", turn.text, turn.token_ids, turn.finish_reason, turn.calls


def _pickle_beginning(prompt: Prompt, seed: int, seconds: float) -> bytes:
    """Pickle what a player is told first, without the places and positions of pictures: only the model reads them.

    Raises:
        PlayError: its metadata cannot be sent.
    """
    try:
        return pickle.dumps((replace(prompt, picture_tokens=None), seed, seconds))
    except Exception as error:  # an object in the metadata may raise anything when it is pickled
        raise PlayError(f"the prompt cannot be sent to a worker: {name_error(error)}"[:400]) from error


def _result(said: dict[str, Any]) -> Score | Answer:
    try:
        if "score" in said:
            return score_from_json(said["score"])
        if "answer" in said:
            return Answer(said["answer"], {str(k): float(v) for k, v in dict(said["figures"]).items()})
        if "spent" in said:
            raise OutOfBudget(str(said["spent"]))
        raise PlayError(str(said["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PlayError(_NO_ANSWER) from error


def _frame(incoming: bytearray) -> dict[str, Any] | None:
    if incoming[: len(ENDED)] == ENDED:
        return None
    try:
        return next_answer(incoming, MAX_FRAME)
    except (NonsenseError, json.JSONDecodeError) as error:
        raise PlayError(_NO_ANSWER) from error


_hosts: dict[tuple[int, bytes], Host] = {}


def host_of(origin: Origin, variables: Iterable[str] = ()) -> Host:
    """Return the host of an environment of this process: one for all that is played of it."""
    home, variables = Home.here(), tuple(sorted(variables))
    key = (os.getpid(), pickle.dumps((origin, home, variables)))  # a forked process has hosts of its own
    if key not in _hosts:
        if not _hosts:
            atexit.register(close_hosts)
        _hosts[key] = Host(origin, home, variables)
    return _hosts[key]


def close_hosts() -> None:
    """End all hosts of this process, at the end of a run."""
    for owner, key in list(_hosts):
        host = _hosts.pop((owner, key))
        if owner == os.getpid():
            host.close()
