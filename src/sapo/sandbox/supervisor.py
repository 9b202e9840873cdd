"""Supervise one sandboxed run from outside: start it, read its output up to a limit, end it and all it started in time.

Nothing here trusts the program. Output beyond a limit is dropped. Standard input is a file, so that writing it never
blocks. The deadline is enforced from outside. When `supervise` returns, the first process of the sandbox, and with it
everything inside, has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from sapo.sandbox import processes
from sapo.sandbox.result import Limits, Outcome, SandboxError

# All that a program inherits. The hash seed is fixed so that the order of a set, and with it a verdict, is repeatable.
ENVIRONMENT = {
    "PATH": "/usr/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

# Seconds between two measurements of the memory of all processes.
MEMORY_LOOK_SECONDS = 0.1
# Seconds the kernel may take to end a killed process before this is an error.
END_PATIENCE = 10.0
# Bytes that are kept of what a backend reports.
MAX_STATUS_BYTES = 4096


@dataclass(frozen=True)
class Launch:
    """How a backend starts a program.

    >>> Launch(argv=("/usr/bin/bwrap", "..."), inherit=(5, 6), status_write=6).argv[0]
    '/usr/bin/bwrap'
    """

    argv: tuple[str, ...]
    inherit: tuple[int, ...]
    """Descriptors that the command needs, including `status_write`."""
    status_write: int
    """Descriptor to which the trusted part of the backend reports. The program does not get it."""
    handed: tuple[socket.socket, ...] = ()
    """Sockets that the program gets. They are closed here once it has them."""


@dataclass
class Watch:
    """The state of a run in progress."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    status: bytearray = field(default_factory=bytearray)
    stopped: Outcome | None = None
    """Reason for which we ended it; None while it runs and when it ended by itself."""
    init_pid: int | None = None
    """Process id of the first process of the sandbox's PID namespace, once known."""
    init: int | None = None
    """Pidfd of that process."""

    def note_init(self) -> None:
        """Read `child-pid` from the status, where bubblewrap reports it."""
        first, newline, _ = bytes(self.status).partition(b"\n")
        if self.init_pid is not None or not newline:
            return
        with suppress(ValueError):
            pid = json.loads(first).get("child-pid")
            if isinstance(pid, int):
                self.init_pid = pid
                self.init = processes.open_namespace_init(pid)


@dataclass(frozen=True)
class Ending:
    """A finished run: its output, the launcher's exit code, and the reason if we ended it."""

    stdout: bytes
    stderr: bytes
    status: bytes
    returncode: int
    stopped: Outcome | None
    seconds: float


def memory_file(name: str, content: bytes) -> int:
    """Open a read-only descriptor of a file in memory whose content cannot be changed, even if it is opened again."""
    writable = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(writable), "wb") as file:
            file.write(content)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    finally:
        os.close(writable)


def supervise(launch: Launch, status_read: int, stdin: bytes, limits: Limits) -> Ending:
    """Run a program to its end or to the deadline, and leave no process behind.

    `launch.status_write` is closed once the command has it. The caller closes everything else.

    Raises:
        SandboxError: the program could not be started, or the kernel did not end it in time.
    """
    begin = time.monotonic()
    watch = Watch()
    with ExitStack() as stack:
        given = memory_file("stdin", stdin)
        try:
            process = subprocess.Popen(
                launch.argv,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=launch.inherit,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # so that a Ctrl-C at the terminal reaches only us
            )
        except OSError as error:
            raise SandboxError(f"{launch.argv[0]} could not be started: {error}") from error
        finally:
            os.close(given)
            os.close(launch.status_write)
            for end in launch.handed:
                end.close()
        assert process.stdout is not None
        assert process.stderr is not None
        stack.enter_context(process.stdout)
        stack.enter_context(process.stderr)
        try:
            channels = {process.stdout.fileno(): watch.stdout, process.stderr.fileno(): watch.stderr}
            channels[status_read] = watch.status
            _follow(process, channels, watch, limits, begin)
        finally:
            _end(process, watch)
        _drain(channels, watch, limits)
    stderr = bytes(watch.stderr[-limits.stderr_bytes :])
    seconds = time.monotonic() - begin
    return Ending(bytes(watch.stdout), stderr, bytes(watch.status), process.returncode, watch.stopped, seconds)


def _follow(
    process: subprocess.Popen[bytes], channels: dict[int, bytearray], watch: Watch, limits: Limits, begin: float
) -> None:
    """Read until the launcher ends or a limit is passed."""
    deadline, next_look = begin + limits.wall_seconds, begin + MEMORY_LOOK_SECONDS
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for channel in (*channels, pidfd):
                selector.register(channel, selectors.EVENT_READ)
            while watch.stopped is None:
                now = time.monotonic()
                if now >= deadline:
                    watch.stopped = Outcome.TIMED_OUT
                    return
                if now >= next_look:
                    next_look = now + MEMORY_LOOK_SECONDS
                    if processes.resident_bytes(processes.descendants(process.pid)) > limits.memory_bytes:
                        watch.stopped = Outcome.OUT_OF_MEMORY
                        return
                ready = [key.fd for key, _ in selector.select(min(deadline, next_look) - now)]
                for channel in ready:
                    if channel != pidfd and not _read(channel, channels, watch, limits):
                        selector.unregister(channel)
                if pidfd in ready:
                    return
    finally:
        os.close(pidfd)


def _read(channel: int, channels: dict[int, bytearray], watch: Watch, limits: Limits) -> bool:
    """Read once from a channel, within its limit, and return False at its end."""
    piece = os.read(channel, 65536)
    kept = channels[channel]
    kept += piece
    if kept is watch.stderr:
        if len(kept) > 2 * limits.stderr_bytes + 65536:
            del kept[: -limits.stderr_bytes]
    elif kept is watch.stdout:
        if len(kept) > limits.stdout_bytes:
            del kept[limits.stdout_bytes :]
            watch.stopped = watch.stopped or Outcome.TOO_MUCH_OUTPUT
    else:
        del kept[MAX_STATUS_BYTES:]
        watch.note_init()
    return bool(piece)


def _drain(channels: dict[int, bytearray], watch: Watch, limits: Limits) -> None:
    """Read what is left in the pipes. All writers have ended, so this does not block."""
    for channel in channels:
        os.set_blocking(channel, False)
        with suppress(BlockingIOError):
            while _read(channel, channels, watch, limits):
                pass


def _end(process: subprocess.Popen[bytes], watch: Watch) -> None:
    """End the launcher and all its descendants, and wait until they have ended."""
    pidfds = [] if watch.init is None else [watch.init]
    if process.poll() is None:
        if watch.init_pid is None:
            # It is killed while it starts: freeze it first, so that a child it has not yet reported is found too.
            processes.freeze(process.pid)
            pidfds += _open(processes.descendants(process.pid))
        process.kill()
    try:
        for pidfd in pidfds:
            processes.kill(pidfd)
        try:
            process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"process {process.pid} was killed and did not end in {END_PATIENCE:g} s") from None
        if not all(processes.wait_for_end(pidfd, END_PATIENCE) for pidfd in pidfds):
            raise SandboxError(f"a program was killed and did not end in {END_PATIENCE:g} s")
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
        watch.init = None


def _open(pids: Sequence[int]) -> list[int]:
    found: list[int] = []
    for pid in pids:
        with suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found
