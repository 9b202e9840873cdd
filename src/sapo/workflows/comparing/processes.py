"""Runs side by side: a process for each, as many at a time as there are slots."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sapo.errors import RunProcessError
from sapo.utils.files import DirectoryLock
from sapo.workflows.comparing.plan import PlannedRun

POLL_SECONDS = 0.1
"""Seconds between checks of `should_stop`."""


@dataclass(frozen=True)
class Event:
    """What the process of a run reports.

    `Event("grpo-lr2e-4-seed0", "step", {"step": 12, "reward": 0.41})`; others are began, started, resumed, eval,
    finished, stopped, failed (it broke: a reason), refused (a mistake of the user's: a message).
    """

    run: str
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSlots:
    """How many runs go at a time; they take turns on the GPUs where there are any."""

    count: int
    gpus: tuple[str, ...] = ()

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment variables of a process in a slot."""
        return {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}


def run_side_by_side(
    runs: Sequence[PlannedRun],
    slots: RunSlots,
    logs: Path,
    lock: DirectoryLock,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> None:
    """Execute runs until all have ended, or until a stop is asked for and the active ones are saved.

    Args:
        runs: runs that have not ended.
        logs: directory for what each process writes to standard error.
        lock: kept by every process for as long as it lives.
        on_event: called in this thread, in the order of the events.

    Raises:
        RunProcessError: a process ended without a result; the others were saved.
    """
    waiting, free = deque(runs), list(range(slots.count))[::-1]
    at_work: dict[str, _RunProcess] = {}
    events: queue.Queue[Event] = queue.Queue()
    fault: str | None = None
    stopping = False
    try:
        while at_work or (waiting and not stopping):
            while waiting and free and not stopping:
                run = waiting.popleft()
                slot = free.pop()
                on_event(Event(run.name, "began"))
                at_work[run.name] = _RunProcess(run, slot, slots.environment(slot), logs, lock, events)
            try:
                event = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                event = None
            if event is not None and event.kind == "left":
                process = at_work.pop(event.run)
                free.append(process.slot)
                if (explanation := process.fault()) is not None:
                    fault, stopping = fault or explanation, True
            elif event is not None:
                on_event(event)
                stopping = stopping or event.kind == "refused"
            stopping = stopping or should_stop()
            if stopping:
                for process in at_work.values():
                    process.ask_to_stop()
    finally:
        for process in at_work.values():  # after an exception: leave no process behind
            process.ask_to_stop()
        for process in at_work.values():
            process.wait()
    if fault is not None:
        raise RunProcessError(fault)


class _RunProcess:
    """One active process, with the thread that reads its events."""

    def __init__(
        self,
        run: PlannedRun,
        slot: int,
        environment: Mapping[str, str],
        logs: Path,
        lock: DirectoryLock,
        events: queue.Queue[Event],
    ) -> None:
        self.run = run
        self.slot = slot
        self.log = logs / f"{run.name}.txt"
        self._ended_well = False
        threads = str(run.config.threads or 1)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                # The same import path as here, so that it finds rewards and verifiers of the user's own.
                [sys.executable, "-P", "-m", "sapo.workflows.comparing.worker"],
                env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=lock.descriptors,
                start_new_session=True,  # Ctrl-C reaches the comparison alone, which asks its runs to stop
            )
        self._send(json.dumps(run.config.model_dump(mode="json")) + "\n")
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def ask_to_stop(self) -> None:
        """Ask the process to save its run and stop; asking again changes nothing."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError):  # the process has ended
                stdin.close()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def fault(self) -> str | None:
        """Describe a process that ended without a result; None when it reported how its run ended."""
        if self._ended_well:
            return None
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        last = next((line for line in reversed(self.log.read_text(errors="replace").splitlines()) if line.strip()), "")
        return f"the process of {self.run.name} {how}{': ' + last if code > 0 and last else ''}; its log is {self.log}"

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended before it read this: its log has the reason
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def _read(self, events: queue.Queue[Event]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                fields = json.loads(line)
            except ValueError:  # half a line: the process was killed while it wrote
                continue
            kind = fields.pop("event")
            self._ended_well = kind in ("finished", "stopped", "failed", "refused")
            events.put(Event(self.run.name, kind, fields))
        self._process.wait()
        events.put(Event(self.run.name, "left"))
