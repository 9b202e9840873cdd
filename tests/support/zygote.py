"""Processes of the command line that are forked from one that has imported everything.

Importing torch and transformers takes five seconds of a core, which is most of what a short run takes. A process that
is forked has its own id, memory, files, environment, session and children, and ends by itself or by a signal. What it
starts itself begins anew, imports and all.

What Python and packages read of the environment when they are imported is that of the process that forks, and so is the
hash seed. There are two that fork for each process of tests, in turns: a run and the one that resumes it then see the
members of a set in different orders, as two commands of a user do.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

IMPORTED = ("sapo.cli", "sapo.workflows.train", "sapo.workflows.evaluate", "sapo.workflows.training_group")
"""What every command of a run imports."""

LONGEST = 1 << 20
"""Bytes of a message: the environment is the most of it."""


def run_forked(
    *arguments: str, cwd: Path, env: Mapping[str, str], module: str = "sapo", timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` to its end, as `subprocess.run` does with `capture_output=True, text=True`."""
    with tempfile.TemporaryFile() as errors:
        process = Forked(module, arguments, cwd, env, errors=errors.fileno())
        try:
            output, _ = process.communicate(timeout)
        finally:
            process.kill()
        errors.seek(0)
        assert process.returncode is not None
        return subprocess.CompletedProcess([module, *arguments], process.returncode, output, errors.read().decode())


class Forked:
    """A process that was forked, with what the tests use of `subprocess.Popen`.

    Args:
        module: as in `python -m module`.
        arguments: behind it.
        cwd: working directory.
        environment: all of its environment.
        session: whether it has a session of its own.
        errors: file descriptor of its standard error; the pipe of its standard output by default.
    """

    def __init__(
        self,
        module: str,
        arguments: tuple[str, ...],
        cwd: Path,
        environment: Mapping[str, str],
        session: bool = False,
        errors: int | None = None,
    ) -> None:
        self._output, theirs = os.pipe()
        asked = {
            "module": module,
            "arguments": arguments,
            "cwd": str(cwd),
            "env": dict(environment),
            "session": session,
        }
        self._zygote = next(zygotes())
        self.pid = self._zygote.fork(asked | {"env": dict(environment)}, [theirs, theirs if errors is None else errors])
        os.close(theirs)
        self._printed = bytearray()

    @property
    def returncode(self) -> int | None:
        """Exit code, or the negative number of the signal that ended it; None where it was not seen to have ended."""
        return self._zygote.ended.get(self.pid)

    def poll(self) -> int | None:
        """Return its exit code if it has ended."""
        self._zygote.look()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on after so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.002)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until all that hold its output have ended, and it too; return what was printed.

        Raises:
            subprocess.TimeoutExpired: they go on after so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._output >= 0:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._output], [], [], left)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0, bytes(self._printed))
            if part := os.read(self._output, 1 << 16):
                self._printed += part
            else:
                os.close(self._output)
                self._output = -1
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self._printed.decode(), None

    def __del__(self) -> None:
        if self._output >= 0:
            os.close(self._output)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended: its id may be another's by then."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that forks, seen from the tests."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, size, 2 * LONGEST)
        self._socket, self._lock = ours, threading.Lock()
        self.ended: dict[int, int] = {}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.zygote", str(theirs.fileno())],
                cwd=Path(__file__).parents[1],
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, asked: dict[str, Any], outputs: list[int]) -> int:
        """Have a process forked with file descriptors for its output and its errors; return its id."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(asked).encode()], outputs)
            while "forked" not in (told := self._read()):
                self._note(told)
            self.ended.pop(told["forked"], None)  # of an earlier process of this id
            return int(told["forked"])

    def look(self) -> None:
        """Take note of the processes that have ended."""
        with self._lock:
            while select.select([self._socket], [], [], 0)[0]:
                self._note(self._read())

    def _note(self, told: dict[str, int]) -> None:
        self.ended[told["pid"]] = told["code"]

    def _read(self) -> dict[str, int]:
        message = self._socket.recv(LONGEST)
        assert message, "the process that forks has ended"
        read: dict[str, int] = json.loads(message)
        return read


@cache
def zygotes() -> Iterator[Zygote]:
    """Return the two of this process, in turns."""
    return cycle([Zygote(), Zygote()])


def _serve(fileno: int) -> dict[str, Any]:
    """Fork whenever asked to; return in each process forked, with what it is to do."""
    connection = socket.socket(fileno=fileno)
    living: dict[int, int] = {}  # ids by the descriptor that is readable when the process has ended
    while True:
        ready, _, _ = select.select([connection, *living], [], [])
        for readable in ready:
            if readable is connection:
                message, outputs, _, _ = socket.recv_fds(connection, LONGEST, 2)
                if not message:
                    os._exit(0)
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    for other in living:
                        os.close(other)
                    return {**json.loads(message), "outputs": outputs}
                for output in outputs:
                    os.close(output)
                living[os.pidfd_open(pid)] = pid
                connection.send(json.dumps({"forked": pid}).encode())
            else:
                pid = living.pop(readable)
                os.close(readable)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                connection.send(json.dumps({"pid": pid, "code": code}).encode())


def _become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for, up to its end."""
    if asked["session"]:
        os.setsid()
    for number, output in enumerate(asked["outputs"], 1):
        os.dup2(output, number)
        os.close(output)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    # `python -m` looks into the working directory first, then into those that the environment names.
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[0] = asked["cwd"]
    sys.path[1:1] = [place for place in named if place not in sys.path]
    importlib.invalidate_caches()
    sys.argv = [asked["module"], *asked["arguments"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    _become(_serve(int(sys.argv[1])))
