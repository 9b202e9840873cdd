"""A counter-based generator: the random number of a token is a pure function of what the token is.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the seed, the counter
is (prompt id, sample, position). No state is carried from token to token, so which other sequences share the batch, how
many ranks there are and where a run was resumed change no number.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_ROUNDS = 10


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute Philox-4x32-10 of counters (..., 4) under one key: four 32-bit words each, as uint64 (..., 4).

    The known-answer vectors of the authors' Random123 library are in tests/utils/test_rng.py.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) & _MASK for i in range(4))
    k0, k1 = key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            (product1 >> _WORD) ^ c1 ^ np.uint64(k0),
            product1 & _MASK,
            (product0 >> _WORD) ^ c3 ^ np.uint64(k1),
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def token_uniforms(seed: int, prompt_id: int, samples: np.ndarray, positions: int) -> np.ndarray:
    """Draw uniforms in (0, 1) for the first tokens of some samples of one prompt.

    Args:
        seed: 64 bits.
        prompt_id: 64 bits; names the prompt within the seed.
        samples: (S,) sample numbers within the prompt.
        positions: how many tokens of each.

    Returns:
        (S, positions) float64, 52 random bits each, never 0 or 1.
    """
    counter = np.empty((len(samples), positions, 4), dtype=np.uint64)
    counter[..., 0] = prompt_id & 0xFFFFFFFF
    counter[..., 1] = (prompt_id >> 32) & 0xFFFFFFFF
    counter[..., 2] = np.asarray(samples, dtype=np.uint64)[:, None]
    counter[..., 3] = np.arange(positions, dtype=np.uint64)[None, :]
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    # 27 and 25 bits, and the bit of the half: with one more the largest would round to 1.
    high, low = words[..., 0] >> np.uint64(5), words[..., 1] >> np.uint64(7)
    return (high * np.uint64(2**25) + low + 0.5) * 2.0**-52
