"""Start and end the processes of workers: subprocesses in sessions of their own, each behind a guard (guard.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from sapo.tasks.workers.guard import PATIENCE
from sapo.tasks.workers.wire import Home

# The worker takes over our sys.path before it imports sapo.
_BOOT = "import sys; sys.path[:] = sys.argv[3:]; from {module} import main; main(int(sys.argv[1]), int(sys.argv[2]))"


class Starter:
    """Starts processes that end with this one.

    Linux ends a worker with the *thread* that started it, so one thread with the life of this object starts all.

    Args:
        module: its `main` is given the descriptor of a socket and the process id of this process.
    """

    def __init__(self, module: str) -> None:
        self._boot = _BOOT.format(module=module)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sapo-worker-starter")

    def start(
        self, home: Home, environment: Mapping[str, str] | None = None
    ) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a process, and return it with our end of its socket, which does not block.

        Args:
            home: where it finds modules.
            environment: its environment variables; those of this process where there are none.
        """
        ours, theirs = socket.socketpair()
        # Errors of the interpreter, and what user code prints, go to standard error.
        command = [sys.executable, "-c", self._boot, str(theirs.fileno()), str(os.getpid()), *home.path]
        try:
            process = self._thread.submit(
                subprocess.Popen,
                command,
                cwd=home.directory,
                stdin=subprocess.DEVNULL,
                stdout=_standard_error(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=environment,
            ).result()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        return process, ours


def end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process and all that it has started, and return its exit code."""
    if sys.platform == "linux":
        process.terminate()  # its guard, which ends the others
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(2 * PATIENCE)
    # Before waiting for it: until then no other process can have its id.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has ended, without reaping it where the system allows that."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return process.poll() is not None


def how_it_ended(code: int) -> str:
    """Say how a process ended.

    >>> how_it_ended(3), how_it_ended(-9)
    ('exit code 3', 'signal SIGKILL')
    """
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _standard_error() -> int:
    try:
        os.fstat(2)
    except OSError:  # closed, as in a daemon
        return subprocess.DEVNULL
    return 2
