"""The way of the weights: buckets come apart as they were packed, and no end waits longer than its limit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sapo.rollout.servers.transfer import SERVER, TRAINER, Link, LinkInfo, MeetingPoint, own_address, pack

FAR_BEYOND_A_SECOND = 20.0
"""Seconds: far beyond the limit of 1 s that both ends are given, on a busy machine too; torch's own is half an hour."""


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (17, 5), "scalar": (), "rounded": (3, 7), "empty": (0, 4), "flags": (5,), "turned": (4, 6)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["rounded"] = made["rounded"].to(torch.bfloat16)
    made["flags"] = made["flags"] > 0
    made["turned"] = made["turned"].T
    return list(made.items())


@pytest.mark.parametrize("limit", [1, 64, 200, 10**6])
def test_every_tensor_comes_out_as_it_went_in(limit: int) -> None:
    buckets = list(pack(iter(tensors()), limit))
    assert all(len(b.bytes_B) <= max(limit, 17 * 5 * 4 + 16) for b in buckets)
    found = [pair for bucket in buckets for pair in bucket.tensors()]
    for (name, was), (after, now) in zip(tensors(), found, strict=True):
        assert (name, was.dtype, was.shape) == (after, now.dtype, now.shape)
        assert torch.equal(was, now)


def test_a_bucket_is_a_copy() -> None:
    """The trainer's own tensors change with the next update, while a server that comes back is sent these."""
    weight = torch.zeros(4)
    [bucket] = pack(iter([("a", weight)]))
    weight += 1
    assert float(dict(bucket.tensors())["a"].sum()) == 0


def linked(seconds: float) -> tuple[Link, Link]:
    meeting = MeetingPoint("127.0.0.1")
    info = LinkInfo(meeting.host, meeting.port, "here", seconds)
    with ThreadPoolExecutor() as pool:
        theirs = pool.submit(Link, info, SERVER)
        ours = Link(info, TRAINER, meeting.store)
        return ours, theirs.result()


def test_buckets_go_over_the_connection_one_after_the_other() -> None:
    ours, theirs = linked(30)
    buckets = list(pack(iter(tensors()), 100))
    assert len(buckets) > 2
    sending = threading.Thread(target=lambda: [ours.send(bucket) for bucket in buckets])
    sending.start()
    received = [theirs.receive(bucket.describe()) for bucket in buckets]
    sending.join()
    assert all(torch.equal(a.bytes_B, b.bytes_B) for a, b in zip(buckets, received, strict=True))


def test_a_server_that_is_sent_nothing_waits_no_longer_than_its_limit() -> None:
    _ours, theirs = linked(1)
    [bucket] = pack(iter(tensors()))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 1000ms for recv operation to complete"):
        theirs.receive(bucket.describe())
    assert time.monotonic() - started < FAR_BEYOND_A_SECOND


def test_a_trainer_that_nobody_meets_waits_no_longer_than_its_limit() -> None:
    meeting = MeetingPoint("127.0.0.1")
    alone = LinkInfo(meeting.host, meeting.port, "alone", 1.0)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        Link(alone, TRAINER, meeting.store)
    assert time.monotonic() - started < FAR_BEYOND_A_SECOND


def test_only_loopback_listens_for_servers_on_this_machine() -> None:
    assert own_address("127.0.0.1", 80) == "127.0.0.1"
    meeting = MeetingPoint("127.0.0.1")
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{meeting.port:04X}")}
    assert listening == {f"0100007F:{meeting.port:04X}"}  # 127.0.0.1, bytes turned round as the kernel prints them
