"""Limit the memory of this process while a verifier runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

Kind = Literal["RLIMIT_AS", "RLIMIT_DATA"]

ADDRESSES: Final = "RLIMIT_AS"
"""Counts all addresses, those of files and of what is only reserved too: for verifiers of ours."""

DATA: Final = "RLIMIT_DATA"
"""Counts private memory that can be written. Reserved addresses, which torch and CUDA have many of, are free."""


@contextmanager
def memory_limit(kind: Kind, limit: int) -> Iterator[None]:
    """Let an allocation beyond `limit` bytes in all fail with MemoryError; processes started meanwhile inherit that.

    Nothing is limited where the system has no such limit (macOS, Windows).
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    which = getattr(resource, kind)
    soft, hard = resource.getrlimit(which)
    with suppress(ValueError, OSError):
        resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(which, (soft, hard))


def half_of_the_memory() -> float:
    """Return half of the machine's memory in GiB; infinity where the system does not tell."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**31
    return float("inf")
