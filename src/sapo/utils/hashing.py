"""Numbers made from text by blake2b: the same in every process, on every machine and in every Python version.

`hash()` is salted per process and `random.Random` promises stability only for `random()`, so a split or an order that
must outlive a run, a checkpoint or an upgrade uses neither.
"""

from __future__ import annotations

import hashlib

# The digest of blake2b.
HASH_BITS = 512


def hashed_integer(*parts: str | int) -> int:
    """Return a uniform integer of HASH_BITS bits named by `parts`; `% n` has a bias below n / 2**HASH_BITS.

    >>> hashed_integer("train", 0, 7) % 1000 == hashed_integer("train", 0, 7) % 1000
    True
    """
    # The unit separator keeps ("a", "bc") and ("ab", "c") apart.
    text = "\x1f".join(str(part) for part in parts)
    # A JSON string may hold a lone surrogate, which plain utf-8 refuses.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest(), "big")


def falls_in_share(text: str, share: float) -> bool:
    """Tell whether a text falls into a fixed `share` of all texts; a smaller share is a subset of a larger one.

    >>> sum(falls_in_share(str(i), 0.25) for i in range(4000)) // 100
    10
    """
    return hashed_integer("share", text) < int(share * 2**53) << (HASH_BITS - 53)


def content_hash(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal.

    >>> content_hash(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def seed_for(seed: int, purpose: str) -> int:
    """Return a seed of 64 bits for one purpose, so that training and evaluation never share draws."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
