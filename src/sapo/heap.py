"""What glibc keeps of freed memory, given back to the system before it is in the way.

Freed blocks below 32 MiB stay on glibc's heap. After the updates of a step these are about all activations of a
micro-batch, in pieces too small for what sampling asks for next, so that cache and packed weights would come on top of
them and a step's peak would be the sum of two phases that do not overlap. Elsewhere (musl, macOS, Windows) nothing is
done.
"""

from __future__ import annotations

import ctypes
from functools import cache

WORTH_A_LOOK = 256 * 2**20
"""Bytes of free blocks below which nothing is given back: its pages are zeroed anew when they are next used, which the
half second of a small model's step would feel."""


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h, glibc 2.33 and later: ten sizes, of which free_bytes is `fordblks`."""

    _fields_ = (
        ("before", ctypes.c_size_t * 8),
        ("free_bytes", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def give_back_freed_memory() -> None:
    """Return the pages of freed blocks to the system, where there are many of them."""
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
