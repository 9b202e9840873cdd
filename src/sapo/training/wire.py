"""Messages between the driver and the ranks of a training group: JSON and tensors, no pickle.

A message is a header, which is JSON, and named tensors, which are safetensors bytes. It goes from one process to
another over a group of CPU tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from sapo.data import PackedBatch, Segment
from sapo.objectives import MismatchWeights
from sapo.training.ranks import Logprobs, Shares
from sapo.training.update_result import UpdateResult


@dataclass(frozen=True)
class Message:
    """What one process tells another.

    >>> Message({"call": "update", "learning_rate": 1e-6}).tensors
    {}
    """

    header: Mapping[str, Any]
    """JSON; numbers that are not finite included."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Wire:
    """One end of the messages between the driver and its ranks.

    Args:
        group: of CPU tensors. Its timeout is how long a receiver waits, so it is longer than any rollout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, message: Message, to: int) -> None:
        """Send a message to a rank."""
        header = json.dumps(message.header).encode()
        tensors = {name: t.detach().cpu().contiguous() for name, t in message.tensors.items()}
        payload = safetensors.torch.save(tensors) if tensors else b""
        dist.send(torch.tensor([len(header), len(payload)]), to, group=self._group)
        dist.send(torch.frombuffer(bytearray(header + payload), dtype=torch.uint8), to, group=self._group)

    def receive(self, source: int) -> Message:
        """Wait for a message of a rank."""
        sizes = torch.zeros(2, dtype=torch.int64)
        dist.recv(sizes, source, group=self._group)
        of_header, of_payload = sizes.tolist()
        buffer = torch.empty(of_header + of_payload, dtype=torch.uint8)
        dist.recv(buffer, source, group=self._group)
        data = buffer.numpy().tobytes()
        return Message(json.loads(data[:of_header]), safetensors.torch.load(data[of_header:]) if of_payload else {})


def share_message(shares: Shares, rank: int, **header: Any) -> Message:
    """Return the message that gives a rank its share; `read_share` is the inverse."""
    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(shares.of_rank[rank]):
        segments = [(s.start, s.length, s.parent) for s in batch.segments]
        values = {f.name: getattr(batch, f.name) for f in fields(PackedBatch)}
        values["segments"] = torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
        values["sequence_ids"] = torch.tensor(batch.sequence_ids, dtype=torch.int64)
        tensors |= {f"{place}/{name}": value for name, value in values.items() if value is not None}
    counts = {"num_sequences": shares.num_sequences, "num_tokens": shares.num_tokens}
    return Message({**header, **counts, "batches": len(shares.of_rank[rank])}, tensors)


def read_share(message: Message, device: torch.device) -> Shares:
    """Return a rank's own share, as the only one there is."""
    batches = []
    for place in range(message.header["batches"]):
        values: dict[str, Any] = {
            f.name: t.to(device)
            for f in fields(PackedBatch)
            if (t := message.tensors.get(f"{place}/{f.name}")) is not None
        }
        values["segments"] = tuple(Segment(*row) for row in values["segments"].tolist())
        values["sequence_ids"] = tuple(values["sequence_ids"].tolist())
        batches.append(PackedBatch(**values))
    return Shares((tuple(batches),), message.header["num_sequences"], message.header["num_tokens"])


def result_message(result: UpdateResult) -> Message:
    """Return the message of what an update did; `read_result` is the inverse."""
    values = {f.name: getattr(result, f.name) for f in fields(UpdateResult) if f.name != "tis"}
    if result.tis is not None:
        values |= {f"tis/{f.name}": getattr(result.tis, f.name) for f in fields(MismatchWeights)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return Message({name: value for name, value in values.items() if name not in tensors}, tensors)


def read_result(message: Message) -> UpdateResult:
    """Return what an update of another rank did."""
    values: dict[str, Any] = {**message.header, **message.tensors}
    of_tis = {f.name: values.pop(f"tis/{f.name}", None) for f in fields(MismatchWeights)}
    values["sequence_ids"] = tuple(values["sequence_ids"])
    return UpdateResult(**values, tis=None if of_tis["weight_M"] is None else MismatchWeights(**of_tis))


def logprobs_message(logprobs: Logprobs) -> Message:
    """Return the message of log-probabilities; `read_logprobs` is the inverse."""
    return Message(
        {"batches": len(logprobs.of_batch)},
        _numbered("logprobs", logprobs.of_batch) | _numbered("experts", logprobs.experts),
    )


def read_logprobs(message: Message) -> Logprobs:
    """Return the log-probabilities that another rank computed."""
    found: dict[str, tuple[Tensor, ...]] = {
        name: tuple(
            t for i in range(message.header["batches"]) if (t := message.tensors.get(f"{name}/{i}")) is not None
        )
        for name in ("logprobs", "experts")
    }
    return Logprobs(found["logprobs"], found["experts"] or None)


def _numbered(name: str, tensors: Sequence[Tensor] | None) -> dict[str, Tensor]:
    return {f"{name}/{i}": tensor for i, tensor in enumerate(tensors or ())}
