"""Choose the backend that runs programs: the first that passes its test, once in each process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from sapo.sandbox import canary
from sapo.sandbox.bubblewrap import INTERPRETER, find_bubblewrap
from sapo.sandbox.landlock import Landlock
from sapo.sandbox.result import Limits, Outcome, ProgramResult, SandboxError, SandboxUnavailable
from sapo.sandbox.supervisor import Ending, Launch, supervise

BACKENDS = ("bubblewrap", "landlock")

INSTALL = "pip install 'sapo-rl[sandbox]', or apt-get install bubblewrap"
INSTALL_PYTHON = "apt-get install python3"


class Backend(Protocol):
    """A backend of the sandbox, which contains one program at a time."""

    name: str
    detail: str

    def why_not(self) -> str | None:
        """Return what is missing on this machine, or None. Nothing is run in a sandbox yet."""
        ...

    def launch(self, source: bytes, limits: Limits, status_write: int) -> AbstractContextManager[Launch]:
        """Yield the command that runs the program."""
        ...

    def exit_code(self, ending: Ending) -> int:
        """Return the program's exit code, 128 + n for signal n; raise SandboxError when it was never started."""
        ...


@dataclass(frozen=True)
class BackendReport:
    """Whether one backend works on this machine, and why not.

    >>> str(BackendReport("landlock", usable=False, chosen=False, detail="the kernel has no Landlock"))
    'landlock: not usable: the kernel has no Landlock'
    """

    name: str
    usable: bool
    chosen: bool
    detail: str
    """What the backend is made of, or why it cannot be used."""

    def __str__(self) -> str:
        state = "in use" if self.chosen else "usable" if self.usable else "not usable"
        return f"{self.name}: {state}: {self.detail}"


_lock = threading.RLock()
_proven: dict[str, Backend] = {}
_refused: dict[str, str] = {}
_process = os.getpid()


def run_program(
    source: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    backend: str | None = None,
    handed: Sequence[socket.socket] = (),
) -> ProgramResult:
    """Run an untrusted Python program and return how it ended.

    The program is run as a file by a new `/usr/bin/python3 -s` in the working directory /. Several threads may call
    this at once; each call starts its own processes.

    Args:
        source: text of the program.
        stdin: its standard input, which is a regular file.
        limits: see `Limits`.
        backend: one of BACKENDS; None takes the first that works here.
        handed: sockets that the program gets, under the same descriptors. They are closed here as soon as it has them,
            and in any case at the end, so that the other end of each sees when the program has ended.

    Raises:
        SandboxUnavailable: no backend works on this machine.
        SandboxError: the sandbox failed, for a reason other than the program.
    """
    with ExitStack() as stack:
        for end in handed:
            stack.enter_context(end)
        return _run(choose_backend(backend), source, stdin, limits or Limits(), handed)


def choose_backend(name: str | None = None) -> Backend:
    """Return the named backend, or the first of BACKENDS, that passed its test in this process.

    Raises:
        SandboxUnavailable: none passed; with the reason for each, and what to install.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"a sandbox is one of {', '.join(BACKENDS)}; got {name!r}; leave it out for the first that works"
        )
    wanted = BACKENDS if name is None else (name,)
    with _lock:
        _forget_parent()
        for candidate in wanted:
            if _try(candidate):
                return _proven[candidate]
        reasons = "; ".join(f"{candidate}: {_refused[candidate]}" for candidate in wanted)
    install = INSTALL if os.access(INTERPRETER, os.X_OK) else INSTALL_PYTHON
    raise SandboxUnavailable(f"programs run only in a sandbox, and none works here; {reasons}; {install}")


def describe() -> tuple[BackendReport, ...]:
    """Report on each backend whether it works and why not. All are tested, which takes a moment."""
    with _lock:
        _forget_parent()
        usable = [name for name in BACKENDS if _try(name)]
        return tuple(
            BackendReport(
                name,
                usable=name in usable,
                chosen=name in usable[:1],
                detail=_proven[name].detail if name in usable else _refused[name],
            )
            for name in BACKENDS
        )


def _try(name: str) -> bool:
    """Test one kind of backend, unless that was done before, and return whether it passed."""
    if name in _proven or name in _refused:
        return name in _proven
    if sys.platform != "linux":
        _refused[name] = f"it needs Linux, and this is {sys.platform}"
        return False
    if not os.access(INTERPRETER, os.X_OK):
        _refused[name] = f"no interpreter {INTERPRETER}, the only one a sandbox shows: {INSTALL_PYTHON}"
        return False
    candidates: list[Backend] = [*find_bubblewrap()] if name == "bubblewrap" else [Landlock()]
    reasons: list[str] = []
    for candidate in candidates:
        reason = candidate.why_not() or _prove(candidate)
        if reason is None:
            _proven[name] = candidate
            return True
        reasons.append(reason)
    _refused[name] = ", and ".join(reasons) or "no bwrap: pip install 'sapo-rl[sandbox]', or apt-get install bubblewrap"
    return False


def _prove(candidate: Backend) -> str | None:
    try:
        return canary.prove(lambda source, stdin, limits: _run(candidate, source, stdin, limits))
    except (SandboxError, OSError) as error:
        return " ".join(str(error).split())


def _run(
    backend: Backend, source: str, stdin: str, limits: Limits, handed: Sequence[socket.socket] = ()
) -> ProgramResult:
    status_read, status_write = os.pipe()
    try:
        with backend.launch(_encode(source), limits, status_write) as launch:
            inherit = (*launch.inherit, *(end.fileno() for end in handed))
            launch = replace(launch, inherit=inherit, handed=tuple(handed))
            ending = supervise(launch, status_read, _encode(stdin), limits)
    finally:
        os.close(status_read)
    return _judge(ending, None if ending.stopped else backend.exit_code(ending), limits)


def _judge(ending: Ending, exit_code: int | None, limits: Limits) -> ProgramResult:
    killed_by = exit_code - 128 if exit_code is not None and exit_code > 128 else None
    stderr = ending.stderr.decode(errors="replace")
    if ending.stopped is not None:
        outcome = ending.stopped
    elif killed_by == signal.SIGXCPU or (killed_by == signal.SIGKILL and ending.seconds >= limits.cpu_seconds):
        outcome = Outcome.TIMED_OUT
    elif killed_by is not None:
        outcome = Outcome.KILLED
    elif exit_code != 0 and stderr.strip().rpartition("\n")[2].startswith("MemoryError"):
        outcome = Outcome.OUT_OF_MEMORY
    else:
        outcome = Outcome.FINISHED
    return ProgramResult(
        outcome,
        exit_code=exit_code if killed_by is None else None,
        signal=killed_by,
        stdout=ending.stdout.decode(errors="replace"),
        stderr=stderr,
        seconds=ending.seconds,
    )


def _encode(text: str) -> bytes:
    # A model may emit half of a surrogate pair, which no file can hold. The interpreter then reports a syntax error.
    return text.encode(errors="replace")


def _forget_parent() -> None:
    """Forget the tests of a parent process: a forked child may have another user or other rights."""
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        _proven.clear()
        _refused.clear()
