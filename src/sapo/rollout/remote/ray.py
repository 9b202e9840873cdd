"""An engine in a process of a Ray cluster: the channel to it, and what answers there.

Messages travel as bytes within Ray's own envelopes. Weights do too, a bucket at a time, through Ray's object store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sapo.data.messages import Message, decode, encode
from sapo.errors import Interrupted
from sapo.rollout.remote.channel import ChannelError
from sapo.rollout.remote.frames import LOOK_EVERY, until
from sapo.rollout.remote.process import STOPPING_SECONDS
from sapo.rollout.remote.worker import EngineWorker
from sapo.utils.ray_cluster import Hosted, RayCluster
from sapo.utils.text import last_words


class RayChannel:
    """A channel to an engine in a process of a cluster, which it starts.

    Args:
        cluster: with room for the process.
        place: of that room.
        number: of the engine, 0, 1, ...: names it and its log.

    Raises:
        ChannelError: it does not start.
    """

    def __init__(self, cluster: RayCluster, place: int, number: int) -> None:
        self.number = number
        self._cluster, self._place = cluster, place
        self._log: Path | None = None
        self._calls = 0
        self._start()

    def call(self, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> Message:
        """See `Channel.call`."""
        limit, stopping = until(timeout), False
        self._calls += 1
        self._hosted.call(self._calls, *encode(message))
        while (answer := self._answer()) is None:
            if limit():
                what = f"did not leave its work within {STOPPING_SECONDS:g} s" if stopping else "did not answer"
                raise ChannelError(
                    f"{self._hosted.described} {what} to {message.header['call']!r} within {timeout:g} s"
                )
            if not stopping and should_stop():
                stopping, limit = True, until(STOPPING_SECONDS)
                self._hosted.stop(self._calls)
        if stopping:
            raise Interrupted
        return decode(*answer)

    def restart(self) -> None:
        """See `Channel.restart`."""
        self._hosted.kill()
        self._start()

    def log_to(self, directory: Path) -> None:
        """See `Channel.log_to`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._log = directory / f"{self.number:02d}.log"
        with suppress(ChildProcessError):  # the next call notices that it is gone
            self._hosted.log_to(self._log)

    def close(self) -> None:
        """See `Channel.close`."""
        self._hosted.kill()

    def _start(self) -> None:
        self._hosted: Hosted = self._cluster.start(self._place, f"engine {self.number}", self._log)
        if (failure := self._hosted.wait_until_started()) is not None:
            raise ChannelError(failure)
        self._hosted.build(f"{__name__}:HostedEngine")

    def _answer(self) -> tuple[bytes, ...] | None:
        try:
            return self._hosted.answer(LOOK_EVERY)
        except ChildProcessError as error:
            raise ChannelError(f"{error}; {last_words(self._log)}" if self._log else str(error)) from error


class HostedEngine:
    """The object in the process that answers: an `EngineWorker` whose messages are bytes."""

    def __init__(self) -> None:
        self._worker = EngineWorker()
        self._stopped = 0

    def call(self, number: int, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Answer a message."""
        message = decode(header, payload)
        if str(message.header.get("device", "")).startswith("cuda"):  # the process sees no device but its own
            message = replace(message, header={**message.header, "device": "cuda:0"})
        return encode(self._worker.handle(message, lambda: self._stopped >= number))

    def stop(self, number: int) -> None:
        """Have a call leave its work, if it has not ended."""
        self._stopped = number
