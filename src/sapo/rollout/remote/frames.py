"""Messages over a socket: two lengths, then the bytes of the header and of the tensors."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable

from sapo.data.messages import Message, decode, encode

_LENGTHS = struct.Struct("<QQ")
LOOK_EVERY = 0.05
"""Seconds between two looks at whether to go on waiting."""
PIECE = 2**20
"""Bytes that are read or written at a time."""


def send(channel: socket.socket, message: Message, go_on: Callable[[], None] = lambda: None) -> None:
    """Send a message.

    Args:
        go_on: called while nobody reads; it raises to give up.

    Raises:
        OSError: the other side is gone.
    """
    header, payload = encode(message)
    for part in (_LENGTHS.pack(len(header), len(payload)), header, payload):
        view = memoryview(part)
        while view:
            if select.select([], [channel], [], LOOK_EVERY)[1]:
                view = view[channel.send(view[:PIECE], socket.MSG_DONTWAIT) :]
            else:
                go_on()


def receive(channel: socket.socket, go_on: Callable[[], None] = lambda: None) -> Message:
    """Wait for a message.

    Args:
        go_on: called every now and then while there is none; it raises to give up.

    Raises:
        OSError, EOFError: the other side is gone.
    """
    of_header, of_payload = _LENGTHS.unpack(_exactly(channel, _LENGTHS.size, go_on))
    header = _exactly(channel, of_header, go_on)
    return decode(header, _exactly(channel, of_payload, go_on))


def waiting(channel: socket.socket) -> bool:
    """Return whether something is there to be read, the other side's end included."""
    return bool(select.select([channel], [], [], 0.0)[0])


def _exactly(channel: socket.socket, size: int, go_on: Callable[[], None]) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if not select.select([channel], [], [], LOOK_EVERY)[0]:
            go_on()
            continue
        read = channel.recv_into(view[:PIECE])
        if not read:
            raise EOFError("the other side has closed the connection")
        view = view[read:]
    return bytes(data)


def until(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether so many seconds have passed since now."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline
