"""A policy built from a description, and given the weights of the one described, is that policy to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from sapo.model.adapters import add_adapter
from sapo.model.policy import Policy
from sapo.model.skeleton import buffers, build, describe, set_buffers
from support.trainer_cases import make_groups, make_policy, make_trainer, packed_gradient


def filled(policy: Policy) -> Policy:
    """Build what a description says, after it has been through JSON, and fill it."""
    made = build(json.loads(json.dumps(describe(policy))))
    assert {p.device.type for p in made.model.parameters()} == {"meta"}, "no memory is taken before it is sharded"
    made.model.to_empty(device="cpu")
    with torch.no_grad():
        for (name, mine), (its_name, theirs) in zip(
            made.model.named_parameters(), policy.model.named_parameters(), strict=True
        ):
            assert name == its_name
            mine.copy_(theirs)
    set_buffers(made, buffers(policy))
    return made


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_the_same_loss_and_gradient(architecture: str, dtype: torch.dtype) -> None:
    policy = make_policy(dtype, architecture)
    made, groups = filled(policy), make_groups()
    assert made.dtype == dtype
    expected, got = (packed_gradient(make_trainer(p), groups) for p in (policy, made))
    assert any(g.abs().max() > 0 for g in expected.values())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_it_has_the_adapter_and_trains_nothing_else() -> None:
    policy = make_policy(torch.float32)
    add_adapter(policy, rank=2, alpha=4, targets=["q_proj", "down_proj"], seed=3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    made = filled(policy)
    assert [p.shape for p in made.parameters()] == [p.shape for p in policy.parameters()]
    expected, got = (packed_gradient(make_trainer(p), make_groups()) for p in (policy, made))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(name.endswith("lora_B.default.weight") and g.abs().max() > 0 for name, g in expected.items())


def test_a_reference_stays_frozen() -> None:
    policy = make_policy(torch.float32)
    for parameter in policy.model.parameters():
        parameter.requires_grad_(False)
    assert build(describe(policy)).parameters() == []


def test_its_norms_and_mlps_compute_as_those_that_were_proven() -> None:
    policy = make_policy(torch.float32)
    described = describe(policy)["closed_forms"]
    assert {"norm", "mlp"} == set(described.values()), "the tiny model takes both closed forms"
    made = build(describe(policy))
    assert describe(made)["closed_forms"] == described
