"""The way of the weights to a server: buckets of tensors over a gloo connection of two, the trainer and the server.

Each server has a connection of its own, so that one that dies or hangs takes no other along. What a bucket holds is
said over HTTP (`Bucket.describe`); the bytes alone go over gloo. Both ends listen on the interface between them and on
no other. Every wait has a limit.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
"""Most bytes of a bucket, unless a single tensor has more: what a server holds beside its weights during a transfer."""
ALIGNMENT = 16
TRAINER, SERVER = 0, 1
"""Ranks within a connection."""
TAG = 1


@dataclass(frozen=True)
class Part:
    """A tensor of a bucket.

    >>> Part("norm.weight", "float32", (4,)).num_bytes
    16
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return its size without padding."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, as bytes on the CPU."""

    parts: tuple[Part, ...]
    bytes_B: Tensor

    def describe(self) -> dict[str, Any]:
        """Return what a server needs to take the bytes apart, as JSON."""
        return {"parts": [[p.name, p.dtype, list(p.shape)] for p in self.parts], "num_bytes": len(self.bytes_B)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by name, as views of the bytes."""
        at = 0
        for part in self.parts:
            flat = self.bytes_B[at : at + part.num_bytes].view(getattr(torch, part.dtype))
            yield part.name, flat.view(part.shape)
            at += _padded(part.num_bytes)


def pack(weights: Iterator[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Copy weights into buckets of at most `limit` bytes.

    >>> [len(b.parts) for b in pack(iter([("a", torch.ones(3)), ("b", torch.ones(3)), ("c", torch.ones(9))]), 40)]
    [2, 1]
    """
    waiting: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = _padded(tensor.nbytes)
        if waiting and size + num_bytes > limit:
            yield _bucket(waiting, size)
            waiting, size = [], 0
        waiting.append((name, tensor))
        size += num_bytes
    if waiting:
        yield _bucket(waiting, size)


def _bucket(tensors: Sequence[tuple[str, Tensor]], size: int) -> Bucket:
    bytes_B = torch.empty(size, dtype=torch.uint8)
    parts, at = [], 0
    for name, tensor in tensors:
        part = Part(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        bytes_B[at : at + part.num_bytes].copy_(flat)
        parts.append(part)
        at += _padded(part.num_bytes)
    return Bucket(tuple(parts), bytes_B)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class MeetingPoint:
    """Where servers meet the trainer: a store of PyTorch's, listening on one interface.

    Args:
        host: address of this machine as the servers reach it.
    """

    def __init__(self, host: str) -> None:
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listening.bind((host, 0))
        listening.listen()
        self.host, self.port = host, int(listening.getsockname()[1])
        self.store = dist.TCPStore(
            host, self.port, None, True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


@dataclass(frozen=True)
class LinkInfo:
    """What a server is told of a connection, as JSON."""

    host: str
    port: int
    key: str
    """Names the connection within the store. A server that is started again has another one."""
    seconds: float
    """Most seconds that either end waits for the other."""


class Link:
    """One end of a connection of two.

    Raises:
        RuntimeError: from any method, where the other end does not come, has gone, or is silent for too long.
    """

    def __init__(self, info: LinkInfo, rank: int, store: dist.Store | None = None) -> None:
        limit = timedelta(seconds=info.seconds)
        store = store or dist.TCPStore(info.host, info.port, None, False, limit)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = limit
        own = own_address(info.host, info.port) if rank == SERVER else info.host
        options._devices = [gloo.create_device(hostname=own)]
        prefixed = dist.PrefixStore(info.key, store)
        prefixed.set_timeout(limit)
        self._group: Any = gloo(prefixed, rank, 2, options)

    def send(self, bucket: Bucket) -> None:
        """Send the bytes of a bucket to the server."""
        self._group.send([bucket.bytes_B], SERVER, TAG).wait()

    def receive(self, description: dict[str, Any]) -> Bucket:
        """Wait for the bytes of a bucket of the trainer's."""
        parts = tuple(Part(str(name), str(dtype), tuple(shape)) for name, dtype, shape in description["parts"])
        bytes_B = torch.empty(int(description["num_bytes"]), dtype=torch.uint8)
        self._group.recv([bytes_B], TRAINER, TAG).wait()
        return Bucket(parts, bytes_B)

    def abort(self) -> None:
        """Give the connection up: what waits on it fails."""
        self._group.abort()


def own_address(host: str, port: int) -> str:
    """Return the address of this machine on the way to another; nothing is sent."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])
