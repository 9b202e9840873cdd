"""Work of several callers, in turns, in one thread.

A model and its tokenizer are no place for two threads. Each job is an iterator that does a piece of its work when it is
asked for the next value, and its caller is told of every value. A job that was cancelled is closed between two pieces.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Begin = Callable[[], Iterator[Any]]
Tell = Callable[[Any], None]


@dataclass(frozen=True)
class Failed:
    """The end of a job by an exception."""

    error: Exception


@dataclass(frozen=True)
class Done:
    """The end of a job that did all its work."""


class Stopping(Exception):  # noqa: N818 (a state, not an error)
    """The worker has been closed."""


class Job:
    """The work of one caller."""

    def __init__(self, begin: Begin, tell: Tell) -> None:
        self.begin, self.tell = begin, tell
        self.cancelled = False
        self.work: Iterator[Any] | None = None

    def cancel(self) -> None:
        """End the job between two pieces of its work; its caller is told nothing more."""
        self.cancelled = True


class Worker:
    """A thread that takes the next piece of every job in turn.

    Args:
        most_jobs: jobs in turns; others wait, first come, first served.
        most_waiting: jobs that may wait.
    """

    def __init__(self, most_jobs: int, most_waiting: int = 256) -> None:
        self.most_jobs, self.most_waiting = most_jobs, most_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sapo-serving", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of jobs that wait for their first turn."""
        return len(self._waiting)

    def submit(self, begin: Begin, tell: Tell) -> Job | None:
        """Queue a job; None where too many wait.

        Args:
            begin: makes the iterator, in the worker's thread.
            tell: called there with every value, and at last with `Done` or `Failed`.

        Raises:
            Stopping: the worker has been closed.
        """
        with self._changed:
            if self._closed:
                raise Stopping
            if len(self._waiting) >= self.most_waiting:
                return None
            job = Job(begin, tell)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End all jobs, whose callers are told of `Stopping`, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        active: list[Job] = []
        while True:
            with self._changed:
                while not (active or self._waiting or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                while self._waiting and len(active) < self.most_jobs:
                    active.append(self._waiting.popleft())
            active = [job for job in active if _advance(job)]
        for job in (*active, *self._waiting):
            _end(job, Failed(Stopping()))


def _advance(job: Job) -> bool:
    """Take the next piece of a job; return whether there may be another."""
    if job.cancelled:
        _end(job, None)
        return False
    try:
        if job.work is None:
            job.work = job.begin()
        value = next(job.work, Done())
    except Exception as error:
        value = Failed(error)
    if isinstance(value, Done | Failed):
        _end(job, value)
        return False
    job.tell(value)
    return True


def _end(job: Job, last: Done | Failed | None) -> None:
    """Close a job's iterator, and tell its caller how it ended."""
    close = getattr(job.work, "close", None)
    if close is not None:
        close()
    if last is not None and not job.cancelled:
        job.tell(last)
