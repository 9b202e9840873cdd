"""The fast forward against transformers' own blocks, and what it refuses."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.prefix_tree import prefix_tree
from sapo.rollout.local import mixture
from sapo.rollout.local import packing as arranged
from sapo.rollout.local.cpu import native
from sapo.rollout.local.decoder import FastDecoder, copied_bytes, decoder_of, refusal
from support.decoder_cases import MODELS, make
from support.kernel_counts import KernelCount
from support.policies import make_policy

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """With the kernels of kernels.c, and without."""
    if request.param == "torch":
        monkeypatch.setenv("SAPO_NATIVE", "0")
    elif native.kernels(torch.device("cpu"), torch.float32) is None:
        pytest.skip("there is no C compiler")


@pytest.fixture(params=["panels", "packed", "plain"])
def packing(request, monkeypatch):
    """With weights in panels where packed.c multiplies, packed for oneDNN however small, and as they are."""
    found = native.kernels(torch.device("cpu"), torch.float32)
    if request.param == "panels" and (found is None or torch.float32 not in found.packed_precisions):
        pytest.skip("no packed.c here: compiled kernels are off, or not for this processor, or there is no compiler")
    if request.param != "panels":
        monkeypatch.setattr(arranged, "suits", lambda *_: False)
    if request.param == "packed":
        if not arranged.onednn_packs(torch.float32, torch.device("cpu")):
            pytest.skip("oneDNN packs no weights here")
        monkeypatch.setattr(arranged, "PACKED_ELEMENTS", 0)
    return 1 if request.param == "plain" else arranged.PACKED_CALLS


def batch():
    rng = np.random.default_rng(3)
    tree = prefix_tree([tuple(rng.integers(0, 19, n).tolist()) for n in (9, 23, 1, 14)])
    return torch.tensor(tree.token_ids), torch.tensor(tree.position_ids), TreeLayout(tree.segments)


@torch.no_grad()
def both(policy, calls):
    """Log-probabilities of a batch by transformers and by the fast path."""
    logprobs = []
    for decoder in (policy, FastDecoder(policy, calls)):
        logits = decoder.logits(decoder.hidden(*batch()))
        assert logits.dtype == torch.float32
        logprobs.append(torch.log_softmax(logits, dim=-1))
    return logprobs


@every_model
def test_log_probabilities_equal_those_of_transformers_blocks(name, kernels, packing):
    policy = make(name)
    assert refusal(policy) is None
    theirs, ours = both(policy, packing)
    assert theirs.std() > 0.5  # the logits are far from flat, so that a wrong key or weight shows
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2", "qwen3", "qwen3_moe"])
def test_in_bfloat16_they_are_as_near_to_float32_as_transformers_are(name, kernels):
    policy = make(name, torch.bfloat16)
    theirs, ours = both(policy, 1)
    exact, _ = both(prepare_policy(policy.model.float(), policy.tokenizer), 1)
    if name == "qwen3_moe":  # a token whose router is undecided may go to another expert: most may not
        near = (ours - exact).abs().mean(dim=-1), (theirs - exact).abs().mean(dim=-1)
        assert near[0].median() <= 1.5 * near[1].median() + 1e-3
        return
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean() + 1e-3


def test_weights_are_those_of_the_moment_it_was_made():
    policy = make("llama")
    before = FastDecoder(policy, 100).hidden(*batch())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    theirs, ours = both(policy, 100)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(before, FastDecoder(policy, 100).hidden(*batch()), atol=1e-2)


def test_the_experts_of_each_layer_are_told(kernels):
    policy = make("qwen3_moe, one dense layer")
    expected: dict[int, torch.Tensor] = {}
    hooks = [
        policy.decoder.layers[n].mlp.gate.register_forward_hook(
            lambda m, i, output, router=router: expected.update({router: output[2]})
        )
        for router, n in enumerate((0, 2))  # the layer between them is dense
    ]
    policy.hidden(*batch())
    for hook in hooks:
        hook.remove()
    told: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        FastDecoder(policy, 1, on_experts=lambda layer, chosen: told.update({layer: chosen})).hidden(*batch())
    assert sorted(told) == sorted(expected) == [0, 1]
    for layer, chosen in told.items():
        assert torch.equal(chosen, expected[layer])


def replace_forward(policy):
    module = policy.decoder.layers[0].mlp
    module.forward = types.MethodType(type(module).forward, module)


def add_hook(policy):
    policy.decoder.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)


def add_layer(policy):
    policy.decoder.layers[0].mlp.down_proj = nn.Sequential(policy.decoder.layers[0].mlp.down_proj)


def parametrize(policy):
    nn.utils.parametrizations.weight_norm(policy.decoder.layers[0].mlp.down_proj)


def mix_precision(policy):
    policy.decoder.norm.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_forward, "a forward of its own"),
        (add_hook, "has a hook"),
        (add_layer, "is a Sequential"),
        (parametrize, "is a Parametrized"),
        (mix_precision, "differ in precision"),
    ],
)
def test_a_changed_model_runs_through_transformers(change, reason):
    policy = make("llama")
    change(policy)
    assert reason in refusal(policy)
    assert decoder_of(policy, 100) is policy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "embedding is dynamic"),
    ],
)
def test_a_block_of_another_kind_runs_through_transformers(options, reason):
    assert reason in refusal(make("llama", **options))


def adapt(policy, targets="all-linear"):
    """An adapter that changes what the model computes."""
    pytest.importorskip("peft")
    from sapo.model.adapters import add_adapter

    add_adapter(policy, rank=2, alpha=4.0, targets=targets, seed=0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_an_adapter_is_folded_into_the_weights(name, targets, kernels, packing):
    before, _ = both(make(name), packing)
    policy = adapt(make(name), targets)
    weights = {n: p.clone() for n, p in policy.model.named_parameters()}
    assert refusal(policy) is None
    theirs, ours = both(policy, packing)
    assert (theirs - before).abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)
    assert all(torch.equal(p, weights[n]) for n, p in policy.model.named_parameters())
    with policy.adapter.disable_adapter():
        _, ours = both(policy, packing)
    torch.testing.assert_close(ours, before, rtol=0, atol=2e-5)


def merge(policy):
    policy.adapter.merge_adapter()


def hook_adapter(policy):
    policy.decoder.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)


def add_second(policy):
    from peft import LoraConfig

    policy.adapter.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    policy.adapter.set_adapter("other")


@pytest.mark.parametrize(
    ("change", "reason"), [(merge, "is a Linear"), (hook_adapter, "has a hook"), (add_second, "is a Linear")]
)
def test_other_adapters_run_through_transformers(change, reason):
    policy = adapt(make("llama"))
    change(policy)
    assert reason in refusal(policy)


def test_adapters_of_16_bit_models_and_of_experts_run_through_transformers():
    assert "folded into weights of float32" in refusal(adapt(make("llama", torch.bfloat16)))
    assert "is a ParamWrapper" in refusal(adapt(make("qwen3_moe")))


@pytest.mark.parametrize("adapted", [None, "all-linear", ["q_proj", "down_proj"]], ids=str)
def test_the_bytes_that_are_held_twice_are_counted(adapted, packing):
    policy = make("qwen3") if adapted is None else adapt(make("qwen3"), adapted)
    decoder = FastDecoder(policy, packing)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    weights = [decoder.head.weight]
    for layer in decoder.layers:
        gated = layer.mlp.gated
        weights += [part.weight for part in (layer.qkv, layer.out, layer.mlp.down)]
        weights.append(gated.weight if decoder.blocks is not None else gated.keywords["gate_up"].weight)
    copies = [w for w in weights if w.is_mkldnn or w.untyped_storage().data_ptr() not in own]
    assert copied_bytes(policy, packing) == sum(w.numel() * w.element_size() for w in copies)


def test_experts_by_grouped_products_ask_the_host_nothing_and_give_what_each_gives(monkeypatch):
    # What a prefill on a GPU does; a loop over 128 experts of 48 layers was 12,000 launches and 48 waits.
    monkeypatch.setenv("SAPO_NATIVE", "0")
    plain = make_policy("qwen3_moe", layers=1)
    policy = Policy(plain.model.to(torch.bfloat16), plain.tokenizer)
    (layer,) = FastDecoder(policy, 1).layers
    hidden_NH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected_NH = layer.mlp(hidden_NH.clone(), False)
    monkeypatch.setattr(mixture, "takes_grouped", lambda *_: True)
    with KernelCount() as counted:
        found_NH = layer.mlp(hidden_NH.clone(), False)
    torch.testing.assert_close(found_NH, expected_NH, rtol=0.02, atol=0.02 * expected_NH.abs().max().item())
    assert not counted.host_reads
    assert sum(count for name, count in counted.launched.items() if "grouped_mm" in name) == 2
