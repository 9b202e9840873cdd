"""The limits of a program in the sandbox, and its result."""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass
from enum import StrEnum


class SandboxError(RuntimeError):
    """The sandbox failed for a reason other than the program; it says nothing about the program."""


class SandboxUnavailable(ValueError):  # noqa: N818 - a state of the machine that the user can change, like a setting
    """No backend works on this machine; the message says what to install."""


class Outcome(StrEnum):
    """How a program ended.

    >>> Outcome.TIMED_OUT.value
    'timed out'
    """

    FINISHED = "finished"
    """It ended by itself, with any exit code."""
    TIMED_OUT = "timed out"
    """It used up its CPU time or passed the deadline."""
    OUT_OF_MEMORY = "out of memory"
    """An allocation was refused and it did not catch that, or its processes together held more than the limit."""
    TOO_MUCH_OUTPUT = "too much output"
    """It printed more than `Limits.stdout_bytes`."""
    KILLED = "killed"
    """It was killed by a signal that we did not send: the interpreter crashed, or the program killed itself."""


@dataclass(frozen=True)
class Limits:
    """The limits of one program.

    A loaded machine makes a program slow by the clock but not in CPU time. So the limit that should decide is CPU time;
    the deadline by the clock is for programs that wait.

    >>> Limits(cpu_seconds=2).wall_seconds
    15.0
    """

    cpu_seconds: int = 6
    """CPU time of each process, in whole seconds."""
    wall_seconds: float = 15.0
    """Seconds by the clock from the start of the sandbox to the end of everything in it."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process, and resident memory of all together, which is measured ten times a second."""
    processes: int = 24
    """Processes and threads at once, including a few of the sandbox. Under Landlock, threads alone."""
    stdout_bytes: int = 4 * 2**20
    """Output after which the program is ended."""
    stderr_bytes: int = 16 * 2**10
    """Length of the end of standard error that is kept; the rest is read and dropped."""
    open_files: int = 64
    """Open file descriptors of each process."""
    stack_bytes: int = 64 * 2**20
    """Stack of each thread; enough for recursion of depth 100,000."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"a limit must be positive; got {name}={value!r}; give a positive number")
        if self.cpu_seconds != int(self.cpu_seconds):
            raise ValueError(f"cpu_seconds must be a whole number; got {self.cpu_seconds!r}; round it up")


@dataclass(frozen=True)
class ProgramResult:
    """The result of one program.

    >>> result = ProgramResult(Outcome.FINISHED, exit_code=0, signal=None, stdout="42\\n", stderr="", seconds=0.04)
    >>> result.succeeded, result.reason
    (True, 'finished')
    """

    outcome: Outcome
    exit_code: int | None
    """None when we ended the program or a signal did. As in a shell, 128 + n is taken as signal n."""
    signal: int | None
    """Signal that killed the program."""
    stdout: str
    """Standard output, at most `Limits.stdout_bytes`."""
    stderr: str
    """End of standard error, at most `Limits.stderr_bytes`."""
    seconds: float
    """Seconds by the clock from the start of the sandbox to the end of everything in it."""

    @property
    def succeeded(self) -> bool:
        """Return whether the program ended by itself with exit code 0."""
        return self.outcome is Outcome.FINISHED and self.exit_code == 0

    @property
    def reason(self) -> str:
        """Describe how the program ended in one line: the outcome, or the exit code with the last line of stderr."""
        if self.outcome is Outcome.KILLED and self.signal is not None:
            try:
                return f"killed by {signals.Signals(self.signal).name}"
            except ValueError:  # a real-time signal has no name
                return f"killed by signal {self.signal}"
        if self.outcome is not Outcome.FINISHED or self.exit_code == 0:
            return self.outcome.value
        lines = self.stderr.strip().splitlines()
        return f"exit code {self.exit_code}" + (f": {lines[-1][:200]}" if lines else "")
