"""Find processes in /proc: their descendants and their memory; freeze them, kill them, wait for their end."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Return the child processes of `pid`."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    except FileNotFoundError:
        if not os.path.exists(f"/proc/{pid}"):
            return []
        return _parents().get(pid, [])  # a kernel without CONFIG_PROC_CHILDREN


def descendants(pid: int) -> list[int]:
    """Return children, their children and so on. Processes started meanwhile may be missing."""
    found: list[int] = []
    todo = [pid]
    while todo:
        new = [child for child in children(todo.pop()) if child not in found]
        found += new
        todo += new
    return found


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of the processes. Shared pages are counted for each."""
    total = 0
    for pid in pids:
        with suppress(OSError, IndexError):  # it may have ended
            total += int(_read(f"/proc/{pid}/statm").split()[1]) * PAGE
    return total


def open_namespace_init(pid: int) -> int | None:
    """Open a pidfd of the first process of another PID namespace.

    The check is made after the pidfd is open, so that the number cannot be reused in between.

    Returns:
        The pidfd, or None when the process has ended or `pid` belongs to another one by now.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    with suppress(OSError):
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith("NSpid:") and len(line.split()) > 2 and line.split()[-1] == "1":
                return pidfd
    os.close(pidfd)
    return None


def freeze(pid: int, patience: float = 1.0) -> None:
    """Stop a process so that it starts no further ones, and wait until it has stopped."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + patience
    with suppress(OSError):
        while _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] not in "TtZX" and time.monotonic() < end:
            time.sleep(0.0005)


def kill(pidfd: int) -> None:
    """Kill a process, unless it has ended already."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def wait_for_end(pidfd: int, patience: float) -> bool:
    """Wait at most `patience` seconds for a process to end, and return whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0, round(patience * 1000))))


def _parents() -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError):
                # The name in brackets may hold blanks and brackets itself, so only what follows the last one is read.
                found[int(_read(f"/proc/{entry}/stat").rpartition(")")[2].split()[1])].append(int(entry))
    return found


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace")
