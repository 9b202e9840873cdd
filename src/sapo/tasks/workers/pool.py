"""A pool of worker processes for verifiers that may hang, crash or run a user's code, with a deadline per completion.

`WorkerPool.run` gives jobs to workers and returns the scores in the order of the jobs. A worker that dies, or that is
killed at its deadline, or that says what no worker says, loses only the completion it was scoring: status
`verifier_error` with the reason. Workers start on demand, are kept for later batches, and end with this process, even
if it is killed; so does all that they have started (guard.py).

They are plain subprocesses that import no torch: forks would be unsafe, since torch has threads, and multiprocessing
would import the user's main module again. Each is a session of its own, so that a Ctrl-C in the terminal does not reach
it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pickle
import selectors
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sapo.data import Score, Status
from sapo.errors import TaskError
from sapo.tasks.base import checked_score
from sapo.tasks.workers.starting import Starter, end, has_ended, how_it_ended
from sapo.tasks.workers.wire import (
    MAX_ANSWER,
    MAX_DETAIL,
    Home,
    Job,
    NonsenseError,
    framed,
    next_answer,
    score_from_json,
)
from sapo.utils.text import name_error

WORKERS_VARIABLE = "SAPO_VERIFIER_WORKERS"


LOAD_DEADLINE = 300.0
"""Seconds for a worker to start and to load a verifier. A user's module may load a model."""


RAMP = 0.1
"""Seconds between two starts while jobs wait. A short batch then needs only one worker."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    """Its guard."""
    channel: socket.socket
    home: Home
    id: int | None = None
    """Process id of the worker itself, once it has said it."""
    served: int = 0
    job: int | None = None
    """Index of the job in progress."""
    ticket: int = 0
    """Number of its request among all of the pool, which its answers carry."""
    began: bool = False
    until: float = 0.0
    limit: float = 0.0
    outgoing: bytes = b""
    incoming: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Loaded:
    """What loading a verifier showed.

    >>> Loaded().problem is None
    True
    """

    problem: str | None = None
    """Why it cannot be loaded."""
    batched: bool = False
    """Whether it judges all completions of a prompt in one call."""


class WorkerPool:
    """Up to `size` workers: SAPO_VERIFIER_WORKERS, or as many as this process has cores.

    Calls from several threads run one after the other.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = default_size() if size is None else size
        if self.size < 1:
            raise TaskError(f"a pool must have at least 1 worker; got {self.size}")
        self._workers: list[_Worker] = []
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._tickets = itertools.count(1)
        self._starter = Starter("sapo.tasks.verifiers.worker")

    def run(self, jobs: Sequence[Job]) -> list[Score]:
        """Return the scores of `jobs`, in their order. A job that fails has the status `verifier_error`."""
        with self._lock:
            return [_score(answer) for answer in self._answers(jobs)]

    def run_batches(self, jobs: Sequence[Job]) -> list[list[Score]]:
        """Return the scores of jobs of one or several completions each, in their order."""
        with self._lock:
            return [_scores(answer, job) for job, answer in zip(jobs, self._answers(jobs), strict=True)]

    def check(self, job: Job) -> str | None:
        """Load the job's verifier in a worker, and return the reason if that fails."""
        return self.load(job).problem

    def load(self, job: Job) -> Loaded:
        """Load the job's verifier in a worker, and return what that showed."""
        with self._lock:
            (answer,) = self._answers([Job(job.spec, None, job.prompt, job.deadline, job.home)])
        if "loaded" in answer:
            return Loaded(batched=answer["batched"])
        return Loaded(problem=answer.get("refused") or answer["failed"])

    def close(self) -> None:
        """End all workers. The pool can be used again, and then starts new ones."""
        with self._lock:
            for worker in list(self._workers):
                self._end(worker)

    def worker_ids(self) -> list[int]:
        """Return the process ids of the present workers."""
        return [worker.id or worker.process.pid for worker in self._workers]

    # ------------------------------------------------------------------------------------------------------ the loop

    def _answers(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{}] * len(jobs)
        waiting, retried = deque(range(len(jobs))), set[int]()
        last_start = time.monotonic()
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                last_start = self._assign(jobs, waiting, answers, last_start)
                for worker in self._await(last_start + RAMP if waiting else None):
                    index = worker.job
                    assert index is not None
                    answer = self._receive(worker, jobs[index])
                    if answer is None:
                        continue
                    if "died" in answer and worker.served and not worker.began and index not in retried:
                        retried.add(index)  # it died between two jobs, for another reason
                        waiting.appendleft(index)
                        continue
                    answers[index] = answer
        except BaseException:
            # Otherwise their answers would be taken for those of the next batch.
            for worker in [w for w in self._workers if w.job is not None]:
                self._end(worker)
            raise
        return answers

    def _assign(
        self, jobs: Sequence[Job], waiting: deque[int], answers: list[dict[str, Any]], last_start: float
    ) -> float:
        """Give waiting jobs to idle workers, start at most one a RAMP, and return the time of the last start."""
        while waiting:
            job = jobs[waiting[0]]
            idle = [w for w in self._workers if w.job is None]
            worker = next((w for w in idle if job.home in (None, w.home)), None)
            if worker is None:
                busy = len(self._workers) - len(idle)
                if busy and (busy >= self.size or time.monotonic() < last_start + RAMP):
                    break
                if len(self._workers) >= self.size:
                    self._end(idle[0])  # it has another home
                worker = self._start(job.home or Home.here())
                last_start = time.monotonic()
            index = waiting.popleft()
            try:
                ticket = next(self._tickets)
                frame = _request(ticket, job)
            except Exception as error:  # an object in the metadata may raise anything when it is pickled
                reason = f"the prompt's metadata cannot be sent to a worker: {name_error(error)}"
                answers[index] = {"failed": reason[:MAX_DETAIL]}
                continue
            worker.job, worker.ticket, worker.began, worker.outgoing = index, ticket, False, frame
            worker.limit = LOAD_DEADLINE
            worker.until = time.monotonic() + LOAD_DEADLINE
        return last_start

    def _await(self, wake: float | None) -> list[_Worker]:
        """Send what is left to send, wait for answers, deaths and deadlines, and return the workers that have one."""
        busy = [worker for worker in self._workers if worker.job is not None]
        if not busy:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
                selector.register(worker.channel, events, worker)
            until = min([worker.until for worker in busy] + ([wake] if wake and len(self._workers) < self.size else []))
            # At most a second: a child that a verifier left behind may hold the socket of a dead worker open.
            ready = selector.select(min(1.0, max(0.0, until - time.monotonic())))
        heard = []
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                with contextlib.suppress(OSError):  # the worker has died, which reading will show
                    key.data.outgoing = key.data.outgoing[key.data.channel.send(key.data.outgoing) :]
            if events & selectors.EVENT_READ:
                heard.append(key.data)
        now = time.monotonic()
        return heard + [w for w in busy if w not in heard and (now >= w.until or has_ended(w.process))]

    def _receive(self, worker: _Worker, job: Job) -> dict[str, Any] | None:
        """Read from a worker, and return its answer if it is complete, or the reason if there will be none."""
        ended = False
        try:
            while chunk := worker.channel.recv(1 << 16):
                worker.incoming += chunk
            ended = True
        except BlockingIOError:
            ended = has_ended(worker.process)
        except OSError:
            ended = True
        try:
            limit = MAX_ANSWER * (len(job.text) if isinstance(job.text, tuple) else 1)
            while (answer := next_answer(worker.incoming, limit)) is not None:
                if worker.id is None and isinstance(answer.get("worker"), int):
                    worker.id = answer["worker"]
                elif answer.get("job") != worker.ticket or ("began" in answer and worker.began):
                    raise NonsenseError  # a second `began` would start the deadline anew
                elif "began" in answer:
                    worker.began, worker.limit = True, job.deadline
                    worker.until = time.monotonic() + job.deadline
                else:
                    return self._finished(worker, job, answer)
        except NonsenseError:
            self._end(worker)
            return {
                "failed": "the worker wrote what is no answer; a verifier must leave file descriptors of others alone"
            }
        if ended:
            return {"failed": self._cause_of_death(worker), "died": True}
        if time.monotonic() >= worker.until:
            what = "scored" if worker.began else "ready: its worker had not loaded the verifier"
            self._end(worker)
            return {"failed": f"TimeoutError: not {what} within {worker.limit:g} s"}
        return None

    def _finished(self, worker: _Worker, job: Job, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer; free its worker for the next job, or end it where a user's code has filled its memory."""
        worker.job = None
        worker.served += 1
        if job.home is not None and str(answer.get("failed")).startswith("MemoryError"):
            self._end(worker)
        return answer

    # --------------------------------------------------------------------------------------------------- the processes

    def _start(self, home: Home) -> _Worker:
        process, ours = self._starter.start(home)
        worker = _Worker(process, ours, home)
        self._workers.append(worker)
        return worker

    def _cause_of_death(self, worker: _Worker) -> str:
        """Remove a worker that closed its socket, and return how it ended."""
        for _ in range(100):  # the socket closes shortly before the process ends
            if has_ended(worker.process):
                break
            time.sleep(0.01)
        else:
            self._end(worker)
            return "the worker process closed its connection; a verifier must leave file descriptors of others alone"
        code = self._end(worker)
        what = "while scoring" if worker.began else "while loading the verifier"
        return f"the worker process died {what}: {how_it_ended(code)}"

    def _end(self, worker: _Worker) -> int:
        """Kill a worker and all that it has started, and return its exit code."""
        self._workers.remove(worker)
        worker.channel.close()
        return end(worker.process)


def default_size() -> int:
    """Return SAPO_VERIFIER_WORKERS, or the number of cores that this process may use."""
    written = os.environ.get(WORKERS_VARIABLE, "")
    if written:
        if not written.isdigit() or int(written) < 1:
            raise TaskError(f"{WORKERS_VARIABLE} must be an integer of at least 1; got {written!r}; unset it")
        return int(written)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: WorkerPool | None = None


def shared_pool() -> WorkerPool:
    """Return the pool of this process, which is made on the first call."""
    global _shared
    if _shared is None or _shared._owner != os.getpid():  # a forked process must not use its parent's workers
        _shared = WorkerPool()
        atexit.register(_shared.close)
    return _shared


def _request(ticket: int, job: Job) -> bytes:
    prompt = job.prompt
    fields = (prompt.id, prompt.task, prompt.text, prompt.answer, dict(prompt.metadata))
    # The fields are pickled apart: a worker that cannot read them can still say so, with the ticket.
    parts = (ticket, pickle.dumps(job.spec), job.text, pickle.dumps(fields, protocol=pickle.HIGHEST_PROTOCOL))
    return framed(pickle.dumps(parts, protocol=pickle.HIGHEST_PROTOCOL))


def _scores(answer: dict[str, Any], job: Job) -> list[Score]:
    """Return the scores of a job's completions. Where the call failed, so did all of them."""
    number = 1 if isinstance(job.text, str) else len(job.text or ())
    scores = answer.get("scores")
    if scores is None:
        return [_score(answer)] * number
    # A user's code may have written the answer.
    if isinstance(scores, list) and len(scores) == number and all(isinstance(one, dict) for one in scores):
        return [_score(one) for one in scores]
    return [_score({"failed": f"the worker's answer must have {number} scores; got {scores!r:.80}"})] * number


def _score(answer: dict[str, Any]) -> Score:
    if "reward" not in answer:
        reason = answer.get("failed") or answer.get("refused") or "no answer"
        return Score(0.0, Status.VERIFIER_ERROR, str(reason)[:MAX_DETAIL])
    try:
        return checked_score(score_from_json(answer))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        return Score(0.0, Status.VERIFIER_ERROR, f"{type(error).__name__}: {error}"[:MAX_DETAIL])
