"""Messages between the driver and the ranks of a training group, and the group of CPU tensors that they go over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sapo.data import PackedBatch, PackedPictures, Picture, Segment
from sapo.data.messages import Message, decode, encode
from sapo.objectives import MismatchWeights
from sapo.training.ranks import Logprobs, Shares
from sapo.training.update_result import UpdateResult


class Wire:
    """One end of the messages between the driver and its ranks.

    Args:
        group: of CPU tensors. Its timeout is how long a receiver waits, so it is longer than any rollout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, message: Message, to: int) -> None:
        """Send a message to a rank."""
        header, payload = encode(message)
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
        return decode(data[:of_header], data[of_header:])


def share_message(shares: Shares, rank: int, **header: Any) -> Message:
    """Return the message that gives a rank its share; `read_share` is the inverse."""
    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(shares.of_rank[rank]):
        segments = [(s.start, s.length, s.parent) for s in batch.segments]
        values = {f.name: getattr(batch, f.name) for f in fields(PackedBatch) if f.name != "pictures"}
        values["segments"] = torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
        values["sequence_ids"] = torch.tensor(batch.sequence_ids, dtype=torch.int64)
        tensors |= {f"{place}/{name}": value for name, value in values.items() if value is not None}
    counts = {"num_sequences": shares.num_sequences, "num_tokens": shares.num_tokens}
    shown, encoded = _write_pictures(shares.of_rank[rank])
    return Message({**header, **counts, "batches": len(shares.of_rank[rank]), "shown": shown}, tensors | encoded)


def read_share(message: Message, device: torch.device) -> Shares:
    """Return a rank's own share, as the only one there is."""
    batches = []
    for place, pictures in enumerate(_read_pictures(message, device)):
        values: dict[str, Any] = {
            f.name: t.to(device)
            for f in fields(PackedBatch)
            if (t := message.tensors.get(f"{place}/{f.name}")) is not None
        }
        values["pictures"] = pictures
        values["segments"] = tuple(Segment(*row) for row in values["segments"].tolist())
        values["sequence_ids"] = tuple(values["sequence_ids"].tolist())
        batches.append(PackedBatch(**values))
    return Shares((tuple(batches),), message.header["num_sequences"], message.header["num_tokens"])


def _write_pictures(batches: Sequence[PackedBatch]) -> tuple[list[Any], dict[str, Tensor]]:
    """Return which pictures each batch shows, as JSON, and their bytes, each picture's once.

    Bytes, and not paths: a rank on another machine has no file of the run.
    """
    shown: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(batches):
        packed = batch.pictures
        shown.append(None)
        if packed is None:
            continue
        shown[-1] = [(p.sha256, p.size, length) for p, length in zip(packed.pictures, packed.lengths, strict=True)]
        tensors[f"{place}/places_I"] = packed.places_I
        for picture in packed.pictures:
            if (name := f"picture/{picture.sha256}") not in tensors:
                tensors[name] = torch.frombuffer(bytearray(picture.read()), dtype=torch.uint8)
    return shown, tensors


def _read_pictures(message: Message, device: torch.device) -> Iterator[PackedPictures | None]:
    """Yield what each batch of a share shows."""
    encoded = {n.removeprefix("picture/"): t for n, t in message.tensors.items() if n.startswith("picture/")}
    known = {sha: tensor.numpy().tobytes() for sha, tensor in encoded.items()}
    for place, shown in enumerate(message.header["shown"]):
        if shown is None:
            yield None
            continue
        pictures = tuple(Picture(sha, (width, height), data=known[sha]) for sha, (width, height), _ in shown)
        places_I = message.tensors[f"{place}/places_I"].to(device)
        yield PackedPictures(pictures, tuple(length for *_, length in shown), places_I)


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
