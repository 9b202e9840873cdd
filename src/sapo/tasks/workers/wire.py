"""What the pool and its worker processes share: jobs, and the header of frames."""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt

HEADER = struct.Struct("!I")

MAX_DETAIL = 500
"""Limit of the characters of a reason, since an exception may quote the whole completion."""


@dataclass(frozen=True)
class Home:
    """Where a worker finds modules: its current directory and sys.path.

    >>> Home("/tmp", ("/usr/lib/python3.13",)).directory
    '/tmp'
    """

    directory: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> Home:
        """Return the directory and path of this process."""
        return cls(os.getcwd(), tuple(map(str, sys.path)))


@dataclass(frozen=True)
class Job:
    """One completion to be scored by one verifier.

    >>> Job("hash_answer", "#2", Prompt(id=0, task="t", text="1+1", answer="2"), deadline=10.0).deadline
    10.0
    """

    spec: Any
    """A verifier as `sapo.tasks.load_verifier` takes it, or a verifier object of plain values."""
    text: str | None
    """Text of the completion; None only loads the verifier."""
    prompt: Prompt
    deadline: float
    """Seconds for scoring, after the verifier is loaded."""
    home: Home | None = None
    """Where the user's modules are found; None for a verifier of ours."""
