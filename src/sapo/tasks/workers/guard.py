"""Stand between the run and a worker: a process that ends with either, and ends all that the worker has started.

A verifier may start a process that leaves its session (`setsid`), or one that outlives the process that started it.
Linux gives such orphans to the nearest ancestor that asks for them, and the guard does. The process that a pool starts
is the guard; the worker is its child.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PATIENCE = 5.0
"""Seconds for killed processes to end. One that the system holds for longer is left to it."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_HEARD = {signal.SIGCHLD, signal.SIGTERM}


def stand_guard(parent: int, channel: int) -> int:
    """Make this process a guard, and return in a child of it, which is to be the worker.

    Only Linux tells a process of orphans. Elsewhere this process is the worker itself.

    Args:
        parent: process id of the run. When it ends, for whatever reason, all that is guarded is killed.
        channel: descriptor of the worker's socket, of which a guard keeps no copy.

    Returns:
        The process id whose end has to end the worker: the guard's, or `parent` where there is no guard.
    """
    if sys.platform != "linux":
        return parent
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    for number in _HEARD:  # one that was inherited as ignored would not be heard
        signal.signal(number, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this was set
        os._exit(1)
    guard = os.getpid()
    worker = os.fork()
    if worker:
        os.close(channel)
        status = _wait_for_end(worker)
        _end_all()
        _end_as(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return guard


def die_with(parent: int) -> None:
    """End this process when the parent ends, for whatever reason, even in the middle of a job."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was set
            os._exit(1)
        return

    def watch() -> None:
        # Polling the parent's id leaves the data in the socket alone.
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for_end(worker: int) -> int:
    """Wait until the worker ends or this process is told to, and return a wait status: SIGTERM's in the second case."""
    while signal.sigwait(_HEARD) == signal.SIGCHLD:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # orphans that have ended are reaped on the way
            if ended[0] == worker:
                return ended[1]
    return int(signal.SIGTERM)


def _end_all() -> None:
    """Kill the children of this process until it has none: those of a killed child become its own."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for child in children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def children() -> list[int]:
    """Return the children of this process, which cannot be another's before they are reaped."""
    me = os.getpid()
    try:
        return [int(child) for child in Path(f"/proc/{me}/task/{me}/children").read_text().split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent_of(pid) == me]


def _parent_of(pid: int) -> int | None:
    with suppress(OSError, IndexError):  # it may have ended
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None


def _end_as(status: int) -> NoReturn:
    """End as the worker did, by the same signal or with the same exit code."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        with suppress(OSError, ValueError):  # SIGKILL has no handler to reset
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)
