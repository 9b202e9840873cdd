"""The line to a player: the socket of an episode, seen from the side of the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import socket
from dataclasses import dataclass, field
from typing import Any

from sapo.tasks.episodes.wire import ENDED, GRACE, MAX_FRAME, exit_code
from sapo.tasks.workers.starting import how_it_ended
from sapo.tasks.workers.wire import NonsenseError, framed, next_answer

NO_ANSWER = "the worker wrote what is no answer; an environment must leave file descriptors of others alone"


class PlayError(Exception):
    """An environment failed in its player; the text says how."""


class DiedError(Exception):
    """A player ended before its episode did."""


class NothingSaidError(DiedError):
    """Its host did not say how it ended: it has died too, or never had the socket."""


@dataclass
class Line:
    """The socket of an episode."""

    channel: socket.socket
    incoming: bytearray = field(default_factory=bytearray)

    async def send(self, *message: Any) -> None:
        await self.send_bytes(pickle.dumps(message))

    async def send_bytes(self, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # its player has died, which reading will show
            await asyncio.get_running_loop().sock_sendall(self.channel, framed(message))

    async def read(self) -> dict[str, Any]:
        """Return what the player says next.

        Raises:
            DiedError: it has ended.
            PlayError: it said nonsense.
        """
        loop = asyncio.get_running_loop()
        while (answer := take_frame(self.incoming)) is None:
            try:
                chunk = await loop.sock_recv(self.channel, 1 << 18)
            except ConnectionError:
                chunk = b""
            if not chunk:
                code = exit_code(self.incoming)
                if code is None:
                    raise NothingSaidError("the host of its process died")
                raise DiedError(how_it_ended(code))
            self.incoming += chunk
        return answer

    async def leave(self) -> None:
        """Tell the player that nobody waits for it, and give it time to close what it opened."""
        with contextlib.suppress(OSError, TimeoutError, PlayError, DiedError):
            self.channel.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(GRACE):
                while True:
                    await self.read()


def take_frame(incoming: bytearray) -> dict[str, Any] | None:
    if incoming[: len(ENDED)] == ENDED:
        return None
    try:
        return next_answer(incoming, MAX_FRAME)
    except (NonsenseError, json.JSONDecodeError) as error:
        raise PlayError(NO_ANSWER) from error
