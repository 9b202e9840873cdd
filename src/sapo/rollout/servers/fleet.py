"""The servers of a run: which of them live and hold the present weights, and how one that is lost comes back.

A server that the run has started is started again and sent the weights, at most `train.max_restarts` times in all. One
at a given address is asked again before the next batch: whoever keeps it may have started it anew. Only the thread that
draws changes what is known of a server; starts and transfers run beside it.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sapo.errors import EngineError
from sapo.rollout.engine import Weights
from sapo.rollout.servers.address import is_loopback
from sapo.rollout.servers.client import Client, ServerLost, ServerRefused
from sapo.rollout.servers.processes import ServerProcess
from sapo.rollout.servers.transfer import TRAINER, Bucket, Link, LinkInfo, MeetingPoint, own_address, pack
from sapo.utils.text import first_line

START_SECONDS = 900.0
"""Most seconds that a server may take from its start to its first answer."""
TRANSFER_SECONDS = 60.0
"""Most seconds for one bucket of weights, and for each call around it."""
ANSWER_SECONDS = 2.0
"""Seconds that a server has to say why a transfer failed at this end."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Loaded:
    """The weights that were set last."""

    buckets: tuple[Bucket, ...]
    label: str
    """Of vLLM's `weight_version`. Every completion carries it, so that none of other weights is taken."""


@dataclass
class Server:
    """One server, and what is known of it."""

    number: int
    client: Client
    process: ServerProcess | None = None
    link: Link | None = None
    up: bool = False
    """It lives, and holds the weights that were set last."""
    failures: int = 0
    """Answers in a row that were no completions."""
    coming: Future[None] | None = None
    """Its start, while it goes on."""
    sent: Loaded | None = None
    """The weights it was sent last."""

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return f"server {self.number} ({self.client.address})"


@dataclass
class Fleet:
    """All servers of a run.

    Args:
        check: refuses a server of another model; given the server's name and what it says of itself.
        seconds: most of one request.
    """

    servers: list[Server]
    check: Callable[[Client, str], None]
    seconds: float
    max_restarts: int = 0
    warn: Callable[[str], None] = lambda _: None
    way_out: str = ""
    """What a person may do when none is left."""
    restarts: int = 0
    _loaded: Loaded | None = None
    _lost: list[str] = field(default_factory=list)
    _closing: bool = False
    _meeting: MeetingPoint | None = None

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(8 * len(self.servers) + 4, thread_name_prefix="sapo-server")
        self._run, self._counter = secrets.token_hex(4), itertools.count()

    @property
    def up(self) -> list[Server]:
        """Return the servers that can draw."""
        return [server for server in self.servers if server.up]

    @property
    def coming(self) -> bool:
        """Return whether a server is being started."""
        return any(server.coming is not None for server in self.servers)

    @property
    def label(self) -> str:
        """Return the label of the weights that were set last."""
        assert self._loaded is not None, "weights are set before a draw"
        return self._loaded.label

    def start(self) -> None:
        """Start the servers that are this run's own, side by side.

        Raises:
            EngineError: one has not come up; all are ended.
        """
        starts = [(server, self._pool.submit(self._start, server)) for server in self.servers if server.process]
        try:
            for server, future in starts:
                try:
                    future.result()
                except (ServerLost, ServerRefused) as error:
                    raise EngineError(f"{server.name} has not come up: {error}") from error
        except BaseException:
            self.close()
            raise

    def load(self, weights: Weights) -> None:
        """Send weights to all servers; return once one or more can draw.

        Raises:
            EngineError: none is left.
        """
        self._loaded = Loaded(tuple(pack(weights)), f"{self._run}.{next(self._counter)}")
        self.poll()
        targets = [server for server in self.servers if self._may_take(server)]
        for server in targets:
            server.up, server.failures = False, 0
        sends = [(server, self._pool.submit(self._send, server, self._loaded)) for server in targets]
        for server, future in sends:
            self._settle(server, future)
        self._await(lambda: bool(self.up) or not self.coming)
        self.require()

    def require(self) -> None:
        """Refuse to go on without a server.

        Raises:
            EngineError: no server can draw, and none is being started.
        """
        if not self.up and not self.coming:
            raise EngineError(self._epitaph())

    def poll(self) -> list[Server]:
        """Take note of processes that have ended and of starts that are over; return the servers lost since."""
        lost = []
        for server in self.servers:
            if server.coming is not None and server.coming.done():
                future, server.coming = server.coming, None
                self._settle(server, future)
                if server.up and server.sent is not self._loaded and self._loaded is not None:
                    server.up = False  # other weights were set since
                    server.coming = self._pool.submit(self._send, server, self._loaded)
            elif server.up and server.process is not None and (ending := server.process.ending()) is not None:
                self.lose(server, ending)
                lost.append(server)
        return lost

    def lose(self, server: Server, reason: str) -> None:
        """Take a server out, and start it again if it is this run's own and may be."""
        server.up, server.link, server.failures = False, None, 0
        if server.process is not None:
            reason = server.process.ending() or reason
        self._lost.append(f"{server.name}: {reason}")
        if server.process is None or self._closing:
            self.warn(f"{server.name} is lost: {reason}; the others draw its requests")
            return
        if self.restarts == self.max_restarts:
            self.warn(f"{server.name} is lost: {reason}; train.max_restarts={self.max_restarts} is used up")
            server.process.end(0.0)
            return
        self.restarts += 1
        self.warn(
            f"{server.name} is lost: {reason}; it is started again ({self.restarts} of at most {self.max_restarts} "
            "times)"
        )
        server.coming = self._pool.submit(self._restart, server, self._loaded)

    def forget(self) -> None:
        """Let go of the weights, which the next batch brings anew."""
        self._loaded = None
        for server in self.servers:
            server.sent = None

    def close(self) -> None:
        """End what was started, close what was opened."""
        if self._closing:
            return
        self._closing = True
        ends = [self._pool.submit(server.process.end) for server in self.servers if server.process is not None]
        wait(ends)
        for server in self.servers:
            server.up, server.link = False, None
            server.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._loaded = self._meeting = None

    def _may_take(self, server: Server) -> bool:
        """Return whether a server lives, as far as one can see before weights are sent."""
        if server.process is None:
            return server.client.healthy()
        if server.coming is not None or not server.process.started:
            return False
        if (ending := server.process.ending()) is not None:
            self.lose(server, ending)
            return False
        return True

    def _settle(self, server: Server, future: Future[None]) -> None:
        try:
            future.result()
            server.up = True
        except (ServerLost, ServerRefused) as error:
            self.lose(server, str(error))

    def _await(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self.poll()
            time.sleep(POLL_SECONDS)

    def _start(self, server: Server) -> None:
        assert server.process is not None
        server.client.move(server.process.start())
        if self._closing:  # since it was decided to start it
            server.process.end(0.0)
        deadline = time.monotonic() + START_SECONDS
        while not server.client.healthy():
            if (ending := server.process.ending()) is not None:
                raise ServerLost(ending)
            if self._closing or time.monotonic() > deadline:
                raise ServerLost(f"no answer {START_SECONDS:g} s after its start")
            time.sleep(POLL_SECONDS)
        self.check(server.client, server.name)

    def _restart(self, server: Server, loaded: Loaded | None) -> None:
        assert server.process is not None
        server.process.end(0.0)
        self._start(server)
        if loaded is not None:
            self._send(server, loaded)

    def _send(self, server: Server, loaded: Loaded) -> None:
        """Send all weights to one server.

        Raises:
            ServerLost: it was not possible within the limits.
        """
        if server.link is not None:
            try:
                self._transfer(server, server.link, loaded)
                return
            except ServerLost:  # it may have been started anew at its address, and knows no connection
                server.link = None
                if not server.client.healthy():
                    raise
        server.link = self._connect(server)
        self._transfer(server, server.link, loaded)

    def _transfer(self, server: Server, link: Link, loaded: Loaded) -> None:
        client = server.client
        try:
            client.start_update(self._limit)
            for bucket in loaded.buckets:
                self._both(self._pool.submit(client.update, bucket, self._limit), self._pool.submit(link.send, bucket))
            client.finish_update(loaded.label, self._limit)
        except (RuntimeError, ServerLost) as error:  # a RuntimeError is gloo's
            link.abort()
            raise ServerLost(f"the weights did not reach it: {first_line(error)[:200]}") from error
        server.sent = loaded

    @property
    def _limit(self) -> float:
        return min(TRANSFER_SECONDS, self.seconds)

    def _connect(self, server: Server) -> Link:
        if self._meeting is None:
            self._meeting = MeetingPoint(self._own_address())
        meeting, key = self._meeting, f"{server.number}/{secrets.token_hex(8)}"
        info = LinkInfo(meeting.host, meeting.port, key, self._limit)
        joined = self._pool.submit(server.client.connect, info)
        opened = self._pool.submit(Link, info, TRAINER, meeting.store)
        try:
            self._both(joined, opened)
        except (RuntimeError, ServerLost) as error:
            raise ServerLost(f"it did not join the connection for weights: {first_line(error)[:200]}") from error
        return opened.result()

    def _both(self, theirs: Future[None], ours: Future[Any]) -> None:
        """Wait for both ends of a transfer, or until one fails; what the server says of it then comes first."""
        done, _ = wait([theirs, ours], return_when=FIRST_EXCEPTION)
        if theirs not in done:  # our end alone knows no more than that nothing moved
            wait([theirs], timeout=ANSWER_SECONDS)
        for future in (theirs, ours):
            if future.done():
                future.result()

    def _own_address(self) -> str:
        """Return the address of this machine as servers reach it: loopback where all of them are on it."""
        for server in self.servers:
            parts = urlsplit(server.client.address)
            if not is_loopback(str(parts.hostname)):
                return own_address(str(parts.hostname), int(parts.port or 80))
        return "127.0.0.1"

    def _epitaph(self) -> str:
        last = self._lost[-1] if self._lost else "none has answered"
        own = any(server.process is not None for server in self.servers)
        most = f"train.max_restarts={self.max_restarts} is used up" if own else "start one again at its address"
        return "; ".join(filter(None, [f"no vLLM server is left to draw: {last}", most, self.way_out]))
