"""Read what the machine is, and give memory that glibc holds of freed blocks back to it."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import psutil

CPUINFO = Path("/proc/cpuinfo")

WORTH_A_LOOK = 256 * 2**20
"""Bytes of free blocks below which nothing is given back: the system zeroes such pages when they are used again, which
a small model's step of half a second would notice."""


def cpuinfo_lines() -> list[str]:
    """Return the lines of /proc/cpuinfo; none where the system has no such file."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def cpuinfo_field(name: str) -> str | None:
    """Return a field of the first processor ("model name", "flags", "cpu family"), or None where it is not given."""
    for line in cpuinfo_lines():
        key, _, value = line.partition(":")
        if key.strip() == name and value.strip():
            return value.strip()
    return None


def processor_name() -> str:
    """Return the model's name where the system tells it ("AMD EPYC 9R14"), else the architecture Python knows.

    It decides which kernels are taken, and so the last bits of a run.
    """
    return cpuinfo_field("model name") or platform.processor() or platform.machine()


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h, glibc 2.33 and later: ten sizes, of which free_bytes is `fordblks`."""

    _fields_ = (
        ("before", ctypes.c_size_t * 8),
        ("free_bytes", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def give_back_freed_memory() -> None:
    """Return the pages of freed blocks to the system, where there are many of them.

    Freed blocks below 32 MiB stay on glibc's heap. After the updates of a step these are about all activations of a
    micro-batch, in pieces too small for what sampling asks for next, so that cache and packed weights would come on top
    of them and a step's peak would be the sum of two phases that do not overlap. Elsewhere (musl, macOS, Windows)
    nothing is done.
    """
    libc = _glibc()
    if libc is not None and libc.mallinfo2().free_bytes >= WORTH_A_LOOK:
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _MallInfo
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return libc


def resident_bytes() -> int:
    """Return the resident memory of this process, after freed blocks were given back to the system.

    With another C library than glibc freed blocks may be counted: the figure is then an upper bound.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
