"""What a program may use and what became of it."""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass
from enum import StrEnum


class SandboxError(RuntimeError):
    """A run of the sandbox failed for a reason that is not the program's: it says nothing about the program."""


class SandboxUnavailable(ValueError):  # noqa: N818 - a state of the machine that the user mends, as a setting
    """No backend can contain a program here; the message says what to install."""


class Outcome(StrEnum):
    """How a program ended.

    >>> Outcome.TIMED_OUT.value
    'timed out'
    """

    FINISHED = "finished"
    """By itself, with any exit code."""
    TIMED_OUT = "timed out"
    """It used its processor time or passed the deadline."""
    OUT_OF_MEMORY = "out of memory"
    """It was refused memory and did not catch that, or its processes together held more than the limit."""
    TOO_MUCH_OUTPUT = "too much output"
    KILLED = "killed"
    """By a signal that we did not send: a crash of the interpreter, or its own doing."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. The processor time judges the program, the deadline is there for one that waits.

    A loaded machine makes a program slow on the clock, not in processor time, so a verdict should rest on the latter.

    >>> Limits(cpu_seconds=2).wall_seconds
    15.0
    """

    cpu_seconds: int = 6
    """Processor time of each of its processes, whole seconds as the kernel counts them."""
    wall_seconds: float = 15.0
    """From the start of the sandbox to the end of everything in it, by the clock."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process, and resident memory of all of them together, looked at ten times a second."""
    processes: int = 24
    """Processes and threads at once, the sandbox's own few among them; threads only, where no process may be made."""
    stdout_bytes: int = 4 * 2**20
    """More than this ends the program."""
    stderr_bytes: int = 16 * 2**10
    """Only so much is kept, the end of it; more is read and dropped."""
    open_files: int = 64
    stack_bytes: int = 64 * 2**20
    """Enough for recursion a hundred thousand deep; each thread gets as much address space."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"a limit must be positive; got {name}={value!r}; give a positive number")
        if self.cpu_seconds != int(self.cpu_seconds):
            raise ValueError(f"cpu_seconds must be a whole number; got {self.cpu_seconds!r}; round it up")


@dataclass(frozen=True)
class ProgramResult:
    """What became of one program.

    >>> result = ProgramResult(Outcome.FINISHED, exit_code=0, signal=None, stdout="42\\n", stderr="", seconds=0.04)
    >>> result.succeeded, result.reason
    (True, 'finished')
    """

    outcome: Outcome
    exit_code: int | None
    """None when it was ended by us or by a signal. A shell's convention holds: 128 + n is taken as signal n."""
    signal: int | None
    stdout: str
    stderr: str
    """Its end, at most `Limits.stderr_bytes` of it."""
    seconds: float
    """By the clock, from the start of the sandbox to the end of everything in it."""

    @property
    def succeeded(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.outcome is Outcome.FINISHED and self.exit_code == 0

    @property
    def reason(self) -> str:
        """How it ended, in one line: the outcome, or the exit code with the last line of what it complained of."""
        if self.outcome is Outcome.KILLED and self.signal is not None:
            try:
                return f"killed by {signals.Signals(self.signal).name}"
            except ValueError:  # a real-time signal has no name
                return f"killed by signal {self.signal}"
        if self.outcome is not Outcome.FINISHED or self.exit_code == 0:
            return self.outcome.value
        lines = self.stderr.strip().splitlines()
        return f"exit code {self.exit_code}" + (f": {lines[-1][:200]}" if lines else "")
