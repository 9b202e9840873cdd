"""The other ranks of a training group as processes that the driver has started.

They meet the driver at a store that it listens at, and then speak to it and to each other through torch.distributed.
Those on its own machine are here, those on the nodes of a Ray cluster in ray_ranks.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from sapo.config import RunConfig
from sapo.errors import RankError
from sapo.utils.text import last_words
from sapo.workflows.rank_watch import ranks_directory

PROGRAM = "sapo.workflows.training_group"
"""The module that is run by each of them."""

STARTED_BY_US = "SAPO_RANK_OF_PORT"
"""In the environment of a rank that was started with the run: its `Place`, as JSON."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands that was started with the run.

    >>> Place(1, 2, 29500, "runs/x/ranks", 60.0, 1800.0).rank
    1
    """

    rank: int
    size: int
    port: int
    directory: str
    """Of logs and signs of life."""
    rank_timeout: float
    stall_timeout: float
    host: str = "127.0.0.1"
    """Of the driver's store."""


class StartedRanks(ABC):
    """Ranks that the driver has started.

    Args:
        config: of the run.
        directory: of the run; ranks/NN.log in it takes what they print.
        host: address that the driver's store listens at.
    """

    def __init__(self, config: RunConfig, directory: Path, host: str) -> None:
        self.ranks, self._host, self._train = range(1, config.train.ranks), host, config.train
        self.store = dist.TCPStore(host, 0, config.train.ranks, is_master=True, wait_for_workers=False)
        self._logs = ranks_directory(directory)
        self._lost: str | None = None

    @abstractmethod
    def ended(self, rank: int) -> str | None:
        """Return how a rank has ended, None while it lives."""

    @abstractmethod
    def kill(self, rank: int) -> None:
        """End a rank at once."""

    @abstractmethod
    def end(self, seconds: float) -> None:
        """Wait for the ranks to end, and end those that have not after some seconds."""

    def wait_until_ready(self) -> None:
        """Wait until every rank has been imported and is about to join.

        Raises:
            RankError: one has ended before that; joining would wait for it in vain.
        """
        waiting = set(self.ranks)
        while waiting:
            if any(self.ended(rank) for rank in self.ranks):
                raise RankError(self.first_failure())
            waiting = {rank for rank in waiting if not self.store.check([ready_key(rank)])}
            time.sleep(0.02)

    def lose(self, words: str, rank: int | None) -> bool:
        """End a rank that was lost, or all of them: the calls of the others fail by that.

        Args:
            words: what happened.
        """
        self._lost = self._lost or words + ("" if rank is None else f"; {last_words(self.log(rank))}")
        for lost in self.ranks if rank is None else [rank]:
            self.kill(lost)
        return True

    def first_failure(self) -> str | None:
        """Return what happened to the first rank that ended, None where all live; it may take a moment to be seen.

        Where several have ended, those go first that did not end over a lost connection to another.
        """
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if self._lost is not None:
                return self._lost
            ended = {rank: how for rank in self.ranks if (how := self.ended(rank)) is not None}
            if ended:
                rank = min(ended, key=lambda r: is_lost_connection(last_words(self.log(r))))
                return f"{ended[rank]}; {last_words(self.log(rank))}"
            time.sleep(0.05)
        return None

    def log(self, rank: int) -> Path:
        """Return the file that takes what a rank prints."""
        return self._logs / f"{rank:02d}.log"

    def place(self, rank: int) -> str:
        """Return the `Place` of a rank, as JSON."""
        train, logs = self._train, str(self._logs.absolute())
        return json.dumps(
            asdict(Place(rank, train.ranks, self.store.port, logs, train.rank_timeout, train.stall_timeout, self._host))
        )


class RankProcesses(StartedRanks):
    """The other ranks as child processes of the driver on this machine.

    Args:
        config: of the run.
        directory: of the run.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        use_loopback()
        super().__init__(config, directory, "127.0.0.1")
        self._processes = {rank: self._start(rank) for rank in self.ranks}

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        environment = {**os.environ, STARTED_BY_US: self.place(rank), "LOCAL_RANK": str(rank)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with self.log(rank).open("ab") as log:
            # In a session of its own, a Ctrl-C in the terminal is the driver's to answer. Its standard input is a pipe
            # that nobody writes to: it closes when the driver ends, however that is.
            return subprocess.Popen(
                [sys.executable, "-m", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def ended(self, rank: int) -> str | None:
        """Return how a rank has ended, None while it lives."""
        process = self._processes[rank]
        code = process.poll()
        return None if code is None else f"rank {rank} (process {process.pid}) {_how_it_ended(code)}"

    def kill(self, rank: int) -> None:
        """End a rank at once."""
        self._processes[rank].kill()

    def end(self, seconds: float) -> None:
        """Wait for the processes to end, and end those that have not after some seconds."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def ready_key(rank: int) -> str:
    """Return the key of the store that a rank sets when it has been imported."""
    return f"ready/{rank}"


def use_loopback() -> None:
    """Have gloo speak over the loopback interface, unless told otherwise: a host's own name may not resolve."""
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def is_lost_connection(words: str) -> bool:
    """Return whether an error, or the end of a log, says that a connection to another process was lost."""
    signs = ("Connection closed", "Connection reset", "Read error", "Broken pipe", "Timed out", "NCCL")
    return any(sign in words for sign in signs)
