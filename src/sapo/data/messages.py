"""Messages between processes: a header, which is JSON, and named tensors, which are safetensors bytes. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """What one process tells another.

    >>> Message({"call": "update", "learning_rate": 1e-6}).tensors
    {}
    """

    header: Mapping[str, Any]
    """JSON; numbers that are not finite included."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def encode(message: Message) -> tuple[bytes, bytes]:
    """Return the bytes of a message, header and tensors; no tensors are no bytes. `decode` is the inverse.

    >>> encode(Message({"call": "sleep"}))
    (b'{"call": "sleep"}', b'')
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
    return json.dumps(message.header).encode(), safetensors.torch.save(tensors) if tensors else b""


def decode(header: bytes, payload: bytes) -> Message:
    """Return the message of which these are the bytes; its tensors are on the CPU."""
    return Message(json.loads(header), safetensors.torch.load(payload) if payload else {})
