"""Signs of life of a training group: each rank writes them to a file, and a rank that writes none counts as lost.

A thread of each rank writes RUN/ranks/NN.json several times within `timeout`, also while the rank computes. The driver
watches the others; the others watch the driver. Nobody compares clocks of two machines: what counts is when the file
was last seen to change. A group that lives without getting on (a hang within a collective) is noticed by the passes
over micro-batches that it counts.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

IDLE = "waiting for a call"
"""Phase of a rank between two calls, in which the driver samples, scores and evaluates."""
BEATS_PER_TIMEOUT = 8
LONGEST_INTERVAL = 2.0
"""Seconds between two signs of life, at most."""
STACK_INTERVALS = 5.0
"""Intervals between a stall and its answer."""
STARTING_FACTOR = 5.0
"""Times the timeout that a rank has for its first sign of life: it imports torch and transformers before."""


class Progress:
    """What a rank is doing: set by its main thread, read by the thread of its heartbeat.

    >>> progress = Progress()
    >>> with progress.during("update"):
    ...     progress.passed()
    ...     progress.phase, progress.passes
    ('update', 1)
    >>> progress.phase
    'waiting for a call'
    """

    def __init__(self) -> None:
        self.phase = IDLE
        self.updates = 0
        self.passes = 0
        """Over micro-batches, or tensors that were sent, since the rank was started."""

    def passed(self) -> None:
        """Count a pass."""
        self.passes += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name the phase for as long as the block lasts."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    >>> Beat(1, "node-a", 4711, "update", updates=12, passes=97, beats=30, time=0.0).words
    'rank 1 (process 4711 on node-a) in update, after 12 updates and 97 passes'
    """

    rank: int
    host: str
    pid: int
    phase: str
    updates: int
    passes: int
    beats: int
    time: float
    """Seconds since 1970 by the clock of the host, for people to read."""

    @property
    def words(self) -> str:
        """Return where the rank was."""
        what = self.phase if self.phase == IDLE else f"in {self.phase}"
        return (
            f"rank {self.rank} (process {self.pid} on {self.host}) {what}, after {self.updates} updates and "
            f"{self.passes} passes"
        )


def beat_file(directory: Path, rank: int) -> Path:
    """Return the file of a rank's signs of life, in the directory of all of them."""
    return directory / f"{rank:02d}.json"


def read_beat(file: Path) -> Beat | None:
    """Read the last sign of life of a rank; None without one."""
    try:
        return Beat(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(directory: Path) -> list[Beat]:
    """Read the last sign of life of every rank in a directory, by rank."""
    found = [beat for file in directory.glob("*.json") if (beat := read_beat(file)) is not None]
    return sorted(found, key=lambda beat: beat.rank)


class Heartbeat:
    """The thread that writes the signs of life of one rank, and watches those of others.

    Args:
        directory: RUN/ranks, which all ranks reach under one path.
        rank: of this process.
        progress: of this process.
        watched: ranks whose silence is told.
        timeout: seconds of silence after which a rank is lost.
        stall_timeout: seconds within one call without a pass on any rank that is watched, or here, after which the
            stack of this process is written to NN.log and the stall is told.
        on_lost: given the rank and what is known of it; called once for each.
        on_stall: given where all ranks are; called once.
        on_slow: likewise, after `timeout` without a pass, then after twice that, and so on: nothing is wrong yet.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        progress: Progress,
        *,
        watched: Sequence[int],
        timeout: float,
        stall_timeout: float,
        on_lost: Callable[[int, str], None],
        on_stall: Callable[[str], None] = lambda _: None,
        on_slow: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = directory
        self.rank = rank
        self.progress = progress
        self.timeout = timeout
        self.stall_timeout = stall_timeout
        self._interval = min(LONGEST_INTERVAL, timeout / BEATS_PER_TIMEOUT)
        self._on_lost, self._on_stall, self._on_slow = on_lost, on_stall, on_slow
        self._beats = 0
        self._old = {other: read_beat(beat_file(directory, other)) for other in watched}
        self._seen: dict[int, Beat] = {}
        self._changed = dict.fromkeys(watched, time.monotonic())
        self._place: tuple[object, ...] = ()
        self._since = time.monotonic()
        self._slow = timeout
        self._dumped = self._stalled = False
        self.ended = threading.Event()
        """Set by `close`."""
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the last sign of life stays."""
        self.ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(self._interval):
            now = time.monotonic()
            if now - before > self.timeout / 2:  # this process was stopped itself: the others get their time again
                self._changed = dict.fromkeys(self._changed, now)
                self._since = now
            before = now
            self._write()
            self._look(now)
            self._check_progress(now)

    def _write(self) -> None:
        self._beats += 1
        own = Beat(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self.progress.phase,
            self.progress.updates,
            self.progress.passes,
            self._beats,
            time.time(),
        )
        file = beat_file(self.directory, self.rank)
        aside = file.with_name(f".{file.name}.writing")
        with suppress(OSError):  # a full disk is told by what the run itself writes
            aside.write_text(json.dumps(asdict(own)) + "\n")
            aside.rename(file)

    def _look(self, now: float) -> None:
        for rank in [*self._changed]:
            beat = read_beat(beat_file(self.directory, rank))
            if beat is not None and beat not in (self._seen.get(rank), self._old[rank]):
                self._seen[rank] = beat
                self._changed[rank] = now
                continue
            silent, last = now - self._changed[rank], self._seen.get(rank)
            if silent > (self.timeout if last is not None else STARTING_FACTOR * self.timeout):
                del self._changed[rank]
                where = f"rank {rank}, which was not heard of before," if last is None else f"{last.words},"
                self._on_lost(rank, f"{where} gave no sign of life for {silent:.0f} s")

    def _check_progress(self, now: float) -> None:
        own = (self.progress.phase, self.progress.passes)
        place = (own, *((beat.phase, beat.passes) for beat in self._seen.values()))
        if place != self._place or self.progress.phase == IDLE:
            self._place, self._since, self._slow, self._dumped, self._stalled = place, now, self.timeout, False, False
            return
        waited = now - self._since
        if waited > self.stall_timeout and not self._dumped:
            self._dumped = True
            self._dump()
        # The others write their stacks at about the same time, which the answer to a stall may end.
        if waited > self.stall_timeout + STACK_INTERVALS * self._interval and not self._stalled:
            self._stalled = True
            self._on_stall(f"no rank made a pass for {waited:.0f} s: {self._where()}")
        elif waited > self._slow:
            self._slow = 2 * waited
            self._on_slow(f"no rank made a pass for {waited:.0f} s: {self._where()}")

    def _where(self) -> str:
        beats = [read_beat(beat_file(self.directory, self.rank)), *self._seen.values()]
        return "; ".join(beat.words for beat in beats if beat is not None)

    def _dump(self) -> None:
        """Append the stack of every thread of this process to its log."""
        with suppress(OSError), (self.directory / f"{self.rank:02d}.log").open("a") as log:
            log.write(f"stacks of rank {self.rank}, {self.progress.phase}:\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
