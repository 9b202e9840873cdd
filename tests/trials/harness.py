"""Call the command line in this process, and judge what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sapo.cli import terminal
from sapo.cli.app import main

PATIENCE = 60  # seconds; a limit for a call that hangs, not a measurement


class Hang(BaseException):
    """A call has not ended in time."""


@dataclass(frozen=True)
class Outcome:
    """What a call came to."""

    code: int
    """Exit code; -1 for a traceback and -2 for a hang."""
    lines: str
    """What it wrote to standard error."""
    trace: str = ""

    @property
    def refused(self) -> bool:
        """Tell whether it was refused in lines of ours."""
        lines = self.lines.splitlines()
        return self.code == 2 and bool(lines) and all(line.startswith("sapo: ") for line in lines)

    @property
    def held(self) -> bool:
        """Tell whether the promise was kept: done, refused in lines of ours, or failed in one."""
        if self.code in (1, 130):
            return bool(self.lines.strip()) and "Traceback" not in self.lines
        return self.code == 0 or self.refused


@dataclass
class Tally:
    """Counts of one kind of trial, and what broke."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, name: str, outcome: Outcome, fault: str | None = None) -> None:
        """Count a case; `fault` says what broke beside the outcome itself."""
        self.tried += 1
        if not outcome.held:
            fault = outcome.trace.strip().splitlines()[-1] if outcome.trace else f"exit {outcome.code}: {outcome.lines}"
        if fault is not None:
            self.broken.append(f"{name}: {fault}")
        elif outcome.code == 0:
            self.accepted += 1
        else:
            self.refused += 1

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {"tried": self.tried, "refused": self.refused, "accepted": self.accepted, "broken": self.broken}


def call(*arguments: str, patience: int = PATIENCE) -> Outcome:
    """Call `sapo` with arguments, in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["sapo", *arguments]
    path, here, trace, code = list(sys.path), Path.cwd(), "", 0
    previous = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(patience)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _consoles(out, err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Hang:
        code, trace = -2, f"Hang: no end within {patience} s"
    except BaseException:
        code, trace = -1, traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        sys.argv = argv
        sys.path[:] = path
        os.chdir(here)
    return Outcome(code, err.getvalue(), trace)


def everything(directory: Path) -> dict[str, str]:
    """Return path -> hash of all files below a directory, locks left out."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = os.readlink(path)
        elif path.is_file() and path.name != ".lock":
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the names that were added, removed or changed."""
    return sorted(k for k in {*before, *after} if before.get(k) != after.get(k))


def _hang(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def _consoles(out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    """Point the consoles of the command line, which took the streams of its import, to these."""
    kept = [(c, c._file) for c in (terminal.console, terminal.errors)]
    for (made, _), stream in zip(kept, (out, err), strict=True):
        made._file = stream
    try:
        yield
    finally:
        for made, file in kept:
            made._file = file


assert isinstance(terminal.console, Console)
