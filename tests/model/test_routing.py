"""Routers: what they chose is recorded, and replayed it is the forward that goes there by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.adapters import add_adapter
from sapo.model.attention import TreeLayout
from sapo.model.policy import Policy
from sapo.model.router_families import ROUTERS, router_family
from sapo.model.routing import Routers, pack_experts, routed_experts
from support.moe_cases import (
    EXPERTS,
    FAMILIES,
    PER_TOKEN,
    SHAPE,
    TOKENIZER,
    ByHand,
    make_moe,
    make_router,
    mixture_layers,
    perturb,
)

# A prompt of 5 tokens and two responses to it.
SEGMENTS = (Segment(0, 5, -1), Segment(5, 4, 0), Segment(9, 3, 0))
PATHS = ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 9, 10, 11])
POSITIONS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]
IDS = torch.randint(17, (12,), generator=torch.Generator().manual_seed(4))


def forward(policy: Policy) -> Tensor:
    return policy.hidden(IDS, torch.tensor(POSITIONS), TreeLayout(SEGMENTS))


def recorded(policy: Policy) -> Tensor:
    with Routers(policy).recording() as recording, torch.no_grad():
        forward(policy)
        return recording.take()


def random_experts(policy: Policy, seed: int = 0) -> Tensor:
    """Experts that no router would choose, all different in a layer."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(12, len(Routers(policy).modules), EXPERTS, generator=generator)
    return noise.argsort(-1)[..., :PER_TOKEN].to(torch.uint8)


def gradient(policy: Policy) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_with_unchanged_weights_replay_changes_no_bit_of_forward_and_gradient(family: str) -> None:
    policy = make_moe(family)
    free = forward(policy)
    free.square().sum().backward()
    expected = gradient(policy)
    with Routers(policy).replay(recorded(policy)) as replay:
        replayed = forward(policy)
        replayed.square().sum().backward()
    assert torch.equal(replayed, free)
    assert replay.changed == 0
    got = gradient(policy)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("experts", ["of other weights", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_replayed_forward_and_its_gradient_are_those_of_experts_forced_by_hand(family: str, experts: str) -> None:
    policy = make_moe(family, dtype=torch.float64)
    experts_Nlk = recorded(policy) if experts == "of other weights" else random_experts(policy)
    perturb(policy)
    by_hand = ByHand(policy, family)
    expected = torch.cat([by_hand.logprobs([*IDS[path].tolist(), 0], experts_Nlk[path].tolist()) for path in PATHS])
    expected.sum().backward()
    with Routers(policy).replay(experts_Nlk) as replay:
        logits = policy.logits(forward(policy))
        logp = torch.log_softmax(logits, -1)
        targets = [[*IDS[path].tolist(), 0][1:] for path in PATHS]
        got = torch.cat([logp[path, target] for path, target in zip(PATHS, targets, strict=True)])
        got.sum().backward()
    assert replay.changed > 0, "the live routers would have gone there anyway: nothing is shown"
    # transformers computes norms, rotations and routing in float32 whatever the model's dtype.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    theirs = {n: p.grad for n, p in by_hand.model.named_parameters() if p.grad is not None}
    ours = gradient(policy)
    scale = max(g.abs().max().item() for g in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")
    routers = [n for n in theirs if n.endswith("gate.weight") and "shared" not in n]
    assert len(routers) == len(Routers(policy).modules)
    for name in routers:
        assert ours[name].abs().max() > 1e-4 * scale, f"no gradient reaches {name}"


def test_the_changed_choices_are_counted_by_hand() -> None:
    policy = make_moe("qwen3_moe, one layer dense")  # its only routers see the same hidden states whatever is replayed
    live = recorded(policy)
    frozen = live.clone()
    # By hand: token 0 has the places of its experts swapped, which is no change; token 1 has one other expert, token 2
    # two.
    others = [[e for e in range(EXPERTS) if e not in live[t, 0].tolist()] for t in range(3)]
    frozen[0, 0] = live[0, 0].flip(0)
    frozen[1, 0, 1] = others[1][0]
    frozen[2, 0] = torch.tensor(others[2][:PER_TOKEN])
    with Routers(policy).replay(frozen) as replay, torch.no_grad():
        forward(policy)
    assert (replay.changed, replay.choices) == (3, 12 * 1 * PER_TOKEN)


def _replay(policy: Policy, experts_Nlk: Tensor, times: int, recomputed: bool = False) -> None:
    with Routers(policy).replay(experts_Nlk, recomputed):
        for _ in range(times):
            forward(policy).square().sum().backward()


def _record(policy: Policy, times: int, take: bool) -> None:
    with Routers(policy).recording() as recording:
        for _ in range(times):
            forward(policy)
        if take:
            recording.take()


def _record_and_replay(policy: Policy, experts_Nlk: Tensor) -> None:
    routers = Routers(policy)
    with routers.recording(), routers.replay(experts_Nlk):
        pass


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda p, e: _replay(p, e, times=2), "layer 0 was run 2 times"),
        (lambda p, e: _replay(p, e, times=0), "the record of layer 0 was used 0 times instead of 1"),
        (lambda p, e: _replay(p, e[:-1], times=1), "11 tokens recorded, 12 in the forward"),
        (lambda p, e: _replay(p, e[:, :1], times=1), "experts of"),
        (lambda p, e: _replay(p, e, times=1, recomputed=True), "used 1 times instead of 2"),
        (_record_and_replay, "not both, and once"),
        (lambda p, e: _record(p, times=1, take=False), "its record not taken"),
        (lambda p, e: _record(p, times=2, take=True), "before its record was taken"),
        (lambda p, e: _record(p, times=0, take=True), "0 of 2 layers were recorded"),
    ],
)
def test_a_record_is_used_exactly_once_for_exactly_its_tokens(misuse: Callable, message: str) -> None:
    policy = make_moe()
    experts_Nlk = recorded(policy)
    with pytest.raises(AssertionError, match=message):
        misuse(policy, experts_Nlk)
    assert not any(m._forward_hooks for m in policy.model.modules()), "every hook is taken away, after an error too"


def test_the_recompute_of_activation_checkpointing_goes_where_the_forward_went() -> None:
    gradients = []
    for checkpointed in (False, True):
        policy = make_moe()
        experts_Nlk = random_experts(policy)
        if checkpointed:
            policy.enable_checkpointing()
            policy.model.train()
        runs = {"n": 0}
        for block in mixture_layers(policy.model):
            block.gate.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__("n", runs["n"] + 1))
        with Routers(policy).replay(experts_Nlk, recomputed=checkpointed):
            forward(policy).square().sum().backward()
        assert runs["n"] == (4 if checkpointed else 2), "each of the two routers, once more in the backward"
        gradients.append(gradient(policy))
    assert all(torch.equal(gradients[1][n], g) for n, g in gradients[0].items())


def test_a_recompute_that_was_not_announced_is_an_error() -> None:
    policy = make_moe()
    policy.enable_checkpointing()
    policy.model.train()
    with pytest.raises(AssertionError, match="layer 1 was run 2 times"):
        _replay(policy, recorded(policy), times=1)


def test_routers_below_all_that_is_trained_need_no_recompute() -> None:
    policy = make_moe()
    policy.model.requires_grad_(False)
    policy.decoder.layers[1].requires_grad_(True)  # type: ignore[union-attr, index]
    policy.enable_checkpointing()
    policy.model.train()
    with Routers(policy).replay(random_experts(policy), recomputed=True):
        forward(policy).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_weights_of_the_experts_a_router_chose_are_its_own_to_the_bit(name: str, dtype: torch.dtype) -> None:
    router = make_router(name).to(dtype)
    hidden = torch.randn(50, router.weight.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    # Those of MiniMax-M2 and LFM2 are handed the bias that their block keeps.
    needs_bias = len(inspect.signature(type(router).forward).parameters) > 2
    output = router(hidden, torch.linspace(-0.1, 0.1, EXPERTS)) if needs_bias else router(hidden)
    family = router_family(router)
    assert family is not None
    logits, weights, experts = (output[i] for i in family.order)
    assert experts.dtype == torch.int64
    assert logits.shape == (50, EXPERTS)
    assert torch.equal(family.weights(router)(logits, experts).to(weights.dtype), weights)
    # In another order they are the same numbers: nothing hangs on which place an expert has.
    swapped = family.weights(router)(logits, experts.flip(1)).to(weights.dtype).flip(1)
    torch.testing.assert_close(swapped, weights, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("name", ["qwen3", "phimoe"])
def test_a_model_without_routers_that_can_be_replayed_is_refused_in_one_line(name: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE))
    names = [family.name for family in ROUTERS.values()]
    with pytest.raises(ModelError) as caught:
        Routers(Policy(model, TOKENIZER))
    assert str(caught.value) == (
        f"routing replay needs a mixture of experts of the families {', '.join(names[:-1])} or {names[-1]}; "
        f"got {type(model).__name__}; set model.routing_replay=false"
    )


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.int16)])
def test_a_record_survives_being_kept_and_packed(num_experts: int, dtype: type) -> None:
    experts = np.random.default_rng(0).integers(0, num_experts, (7, 3, 2)).astype(dtype)
    experts[0, 0] = num_experts - 1
    kept = routed_experts(experts)
    assert (kept.num_tokens, kept.layers, kept.per_token, kept.wide) == (7, 3, 2, num_experts > 256)
    empty = routed_experts(experts[:0])
    assert empty.num_tokens == 0
    packed = pack_experts([(kept, 2, 5), (empty, 0, 0), (kept, 0, 1)])
    assert np.array_equal(packed.numpy(), np.concatenate([experts[2:5], experts[:1]]))
    assert packed.numpy().dtype == dtype


def test_sequences_with_and_without_a_record_are_not_packed_together() -> None:
    kept = routed_experts(np.zeros((2, 1, 1), dtype=np.uint8))
    with pytest.raises(AssertionError, match="and others not"):
        pack_experts([(kept, 0, 2), (None, 0, 1)])
    with pytest.raises(AssertionError, match=r"tokens 0\.\.2 of a record of 2"):
        pack_experts([(kept, 0, 3)])


def test_a_router_with_an_adapter_is_replayed_and_its_adapter_learns() -> None:
    policy = make_moe()
    add_adapter(policy, rank=2, alpha=4.0, targets="all-linear", seed=0)
    with torch.no_grad():  # an adapter begins as no change at all
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    free = forward(policy)
    with Routers(policy).replay(recorded(policy)) as replay:
        replayed = forward(policy)
    assert torch.equal(replayed, free)
    assert replay.changed == 0
    with Routers(policy).replay(random_experts(policy)) as replay:
        forward(policy).square().sum().backward()
    assert replay.changed > 0
    learned = [n for n, g in gradient(policy).items() if "gate.lora" in n and g.abs().max() > 0]
    assert len(learned) == 2 * 2, "A and B of both routers"
