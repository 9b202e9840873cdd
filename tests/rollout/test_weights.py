"""Weights that an engine is given: the policy's own are read where they are, others never touch the policy's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sapo.errors import Interrupted
from sapo.model.adapters import add_adapter
from sapo.model.policy import Policy
from sapo.model.rounding import Rounding, rounded_weights
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.decoder import refusal
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.twin import Twin
from sapo.rollout.weights import loaded
from support.engine_cases import params, ragged_requests

E4M3 = Rounding("float8_e4m3fn")


def plain(new_policy: Callable[..., Policy], architecture: str, **options) -> Policy:
    return new_policy(architecture, **options)


def tied(new_policy: Callable[..., Policy]) -> Policy:
    policy = new_policy("qwen3")
    policy.model.get_output_embeddings().weight = policy.model.get_input_embeddings().weight
    return policy


def adapted(new_policy: Callable[..., Policy], **options) -> Policy:
    policy = new_policy("qwen3", **options)
    add_adapter(policy, rank=2, alpha=4.0, targets="all-linear", seed=1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # 0 at first, which is its own rounding
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 8)
    return policy


CASES: dict[str, Callable[[Callable[..., Policy]], Policy]] = {
    "qwen3": lambda new: plain(new, "qwen3"),
    "bfloat16": lambda new: plain(new, "qwen3", dtype=torch.bfloat16),
    "mistral": lambda new: plain(new, "mistral"),
    "moe": lambda new: plain(new, "qwen3_moe"),
    "tied": tied,
    "lora": adapted,
    "lora_bfloat16": lambda new: adapted(new, dtype=torch.bfloat16),
}


def rounded_in_place(policy: Policy, rounding: Rounding) -> Policy:
    """Round a policy's own weights: what an engine that shares them would sample with."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(rounding.round(parameter))
    return policy


def snapshot(policy: Policy) -> dict[str, tuple[int, torch.Tensor]]:
    return {n: (p.data_ptr(), p.detach().clone()) for n, p in policy.model.named_parameters()}


def assert_untouched(policy: Policy, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, parameter in policy.model.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name


@pytest.mark.parametrize("case", CASES)
def test_rounded_weights_draw_what_a_policy_rounded_in_place_draws_and_leave_the_policy_alone(
    new_policy, case: str
) -> None:
    policy = CASES[case](new_policy)
    before = snapshot(policy)
    engine = LocalEngine(policy, max_rows=9)
    asked = ragged_requests()
    stops = 0

    def look() -> bool:
        nonlocal stops
        stops += 1
        assert_untouched(policy, before)
        return False

    with loaded(engine, rounded_weights(policy.weights(), E4M3), version=3):
        assert engine.version == 3
        drawn = engine.generate(asked, params(), look)
        assert stops > 3, "it was looked at while it drew"
    assert_untouched(policy, before)
    expected = LocalEngine(rounded_in_place(CASES[case](new_policy), E4M3), max_rows=9).generate(asked, params())
    assert drawn == expected, "to the bit"
    own = LocalEngine(policy, max_rows=9).generate(asked, params())
    assert drawn != own
    with loaded(engine, policy.weights(), version=4):
        assert engine.generate(asked, params()) == own
        assert engine.version == 4


def test_the_policys_own_weights_need_no_twin(new_policy) -> None:
    policy = new_policy("qwen3")
    engine = LocalEngine(policy)
    with loaded(engine, policy.weights(), version=0):
        assert engine._twin is None
        with torch.no_grad():
            policy.head_weight.mul_(3.0)
        assert engine.generate(ragged_requests(), params()) == LocalEngine(policy).generate(ragged_requests(), params())


@pytest.mark.parametrize("case", CASES)
def test_a_twin_is_the_policy_in_all_but_its_weights(new_policy, case: str) -> None:
    policy = CASES[case](new_policy)
    own = dict(policy.weights())
    twin = Twin(policy).policy
    assert refusal(twin) == refusal(policy), "it takes the same forward"
    assert {n: p.data_ptr() for n, p in twin.weights()} == {n: p.data_ptr() for n, p in own.items()}, "and no memory"
    assert (twin.head_weight is twin.model.get_input_embeddings().weight) == (case == "tied")
    assert not any(p.requires_grad for p in twin.model.parameters())
    assert all(ours is not theirs for ours, theirs in zip(twin.model.modules(), policy.model.modules(), strict=True))


def test_weights_put_aside_are_freed_when_the_engine_sleeps(new_policy) -> None:
    policy = new_policy("qwen3")
    engine = LocalEngine(policy)
    with loaded(engine, rounded_weights(policy.weights(), E4M3), version=0):
        assert engine._twin is not None
        assert engine._twin.policy.head_weight.data_ptr() != policy.head_weight.data_ptr()
    assert engine._twin.policy.head_weight.data_ptr() == policy.head_weight.data_ptr()
    with pytest.raises(AssertionError, match="not while it sleeps"):
        engine.generate(ragged_requests(), params())


def test_an_interrupted_engine_sleeps_and_the_next_draw_is_whole(new_policy) -> None:
    policy = new_policy("qwen3")
    engine, before = LocalEngine(policy), snapshot(policy)
    with pytest.raises(Interrupted), loaded(engine, rounded_weights(policy.weights(), E4M3), version=0):
        engine.generate(ragged_requests(), params(), lambda: True)
    assert_untouched(policy, before)
    with loaded(engine, policy.weights(), version=0):
        assert engine.generate(ragged_requests(), params()) == LocalEngine(policy).generate(ragged_requests(), params())


def test_weights_that_are_not_the_policys_are_refused_by_name(new_policy) -> None:
    policy = new_policy("qwen3")
    short = list(policy.weights())[1:]
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is of one side only"):
        LocalEngine(policy).set_weights(iter(short), version=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_recorded_of_the_weights_that_draw(new_policy, dtype: torch.dtype) -> None:
    """The adapter in bfloat16 goes through the modules, which are then the twin's and not the policy's."""

    def make() -> Policy:
        policy = new_policy("qwen3_moe", dtype=dtype)
        add_adapter(policy, rank=2, alpha=4.0, targets=["q_proj"], seed=1)
        return policy

    policy, asked, found = make(), ragged_requests(), []
    engine = LocalEngine(policy)
    for source, weights in (
        (engine, rounded_weights(policy.weights(), E4M3)),
        (LocalEngine(by_hand := rounded_in_place(make(), E4M3)), by_hand.weights()),
    ):
        log = ExpertLog()
        with loaded(source, weights, version=0):
            source.generate(asked, params(), experts=log)
        found.append((log._prompts, log._completions))
    assert found[0] == found[1]
    assert len(found[0][0]) == len(asked)
