"""What the pool and its worker processes share: the jobs, and the frames they travel in."""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt

HEADER = struct.Struct("!I")

MAX_DETAIL = 500
"""Characters of a reason: an exception may quote the whole completion."""


@dataclass(frozen=True)
class Home:
    """Where a worker looks for modules: its current directory and sys.path.

    >>> Home("/tmp", ("/usr/lib/python3.13",)).directory
    '/tmp'
    """

    directory: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> Home:
        """This process's."""
        return cls(os.getcwd(), tuple(map(str, sys.path)))


@dataclass(frozen=True)
class Job:
    """One completion for one verifier.

    >>> Job("hash_answer", "#2", Prompt(id=0, task="t", text="1+1", answer="2"), deadline=10.0).deadline
    10.0
    """

    spec: Any
    """As `sapo.tasks.load_verifier` takes it, or the verifier itself, made of plain values."""
    text: str | None
    """None: only load the verifier."""
    prompt: Prompt
    deadline: float
    """Seconds from when the verifier is loaded."""
    home: Home | None = None
    """None: anywhere will do."""
