"""What a run, its hosts and its players say to each other.

The run gives a host the socket of every episode, with one byte. On that socket it sends frames of pickled tuples, and
the player answers with frames of JSON, so that nothing from an environment is ever unpickled. When the player has ended
the host writes how, and shuts the socket.
"""

from __future__ import annotations

import struct

EPISODE = b"e"
"""Comes with the socket of an episode."""

LOST = b"l"
"""Written by a host to the run when the byte of an episode came without its socket: it has no descriptor left."""

MAX_FRAME = 2**26
"""Limit of the bytes of a player's frame: an observation, escaped."""

ENDING = struct.Struct("!4si")
"""Written by the host behind all that a player wrote: ENDED and its exit code, which is negative for a signal."""

ENDED = b"ende"

GRACE = 1.0
"""Seconds that an environment has to close what it opened when nobody waits for it any more."""


def exit_code(incoming: bytes | bytearray) -> int | None:
    """Return how a player ended, from all that was read of it; None where its host did not say.

    >>> exit_code(b'{"half a fra' + ENDING.pack(ENDED, -9))
    -9
    """
    if len(incoming) < ENDING.size:
        return None
    mark, code = ENDING.unpack(incoming[-ENDING.size :])
    return int(code) if mark == ENDED else None
