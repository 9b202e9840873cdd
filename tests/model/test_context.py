"""Slices of a micro-batch: every token and every target is one rank's, and none is empty. No process is started."""

from __future__ import annotations

import pytest
import torch

from sapo.model.context import ContextGroup, check_heads, own_slice
from support.trainer_cases import make_groups, make_policy, make_trainer


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_partition_tokens_and_targets(size: int) -> None:
    (batch,) = make_trainer(make_policy()).pack(make_groups(7)).microbatches
    parts = [own_slice(batch, ContextGroup(rank, size), torch.device("cpu")) for rank in range(size)]
    assert torch.equal(torch.cat([p.batch.token_ids_N for p in parts]), batch.token_ids_N)
    assert torch.equal(torch.cat([p.batch.position_ids_N for p in parts]), batch.position_ids_N)
    at = torch.cat([p.at for p in parts])
    assert torch.equal(at.sort()[0], torch.arange(batch.num_targets)), "each target is predicted on one rank"
    start = 0
    for part in parts:
        assert torch.equal(part.batch.predictor_M + start, batch.predictor_M[part.at])
        assert torch.equal(part.batch.target_M, batch.target_M[part.at])
        assert torch.equal(part.batch.old_logprobs_M, batch.old_logprobs_M[part.at])
        assert part.batch.num_sequences == batch.num_sequences
        start += part.batch.num_tokens


def test_no_slice_is_empty_where_there_are_fewer_tokens_than_ranks() -> None:
    (batch,) = make_trainer(make_policy()).pack(make_groups(1, samples=2)[:1]).microbatches
    size = batch.num_tokens + 2
    parts = [own_slice(batch, ContextGroup(rank, size), torch.device("cpu")) for rank in range(size)]
    assert all(p.batch.num_tokens for p in parts)
    assert sum(len(p.at) for p in parts) == batch.num_targets


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fits"),
    [
        (4, 2, 2, True),
        (4, 2, 4, True),
        (4, 1, 4, True),
        (2, 1, 4, False),
        (6, 2, 3, True),
        (6, 3, 2, True),
        (6, 2, 4, False),
    ],
)
def test_heads_are_shared_evenly_or_refused(heads: int, kv_heads: int, size: int, fits: bool) -> None:
    assert (check_heads(heads, kv_heads, size) is None) == fits
