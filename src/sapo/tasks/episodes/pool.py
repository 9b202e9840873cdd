"""The side of the run: one host for each environment, which forks the players of its episodes."""

from __future__ import annotations

import asyncio
import atexit
import os
import pickle
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from sapo.errors import TaskError
from sapo.tasks.episodes.line import NO_ANSWER, Line, NothingSaidError, PlayError, take_frame
from sapo.tasks.episodes.origin import Origin
from sapo.tasks.episodes.wire import EPISODE, GRACE, LOST
from sapo.tasks.workers.pool import LOAD_DEADLINE
from sapo.tasks.workers.starting import Starter, end, has_ended, how_it_ended
from sapo.tasks.workers.wire import Home, framed

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

    async def await_begin(self, line: Line, message: bytes) -> None:
        """Send a player its prompt, and return when it begins.

        Raises:
            DiedError: it ended before.
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
        except NothingSaidError:
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
            raise PlayError(str(said.get("failed", NO_ANSWER)))
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
                    if (answer := take_frame(incoming)) is not None:
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


async def _begin(line: Line, message: bytes) -> dict[str, Any]:
    await line.send_bytes(message)
    return await line.read()


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
