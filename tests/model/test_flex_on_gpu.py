"""The compiled flex_attention against the definition, in values and gradients: run by `make test-gpu`."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapo.model.attention import TreeLayout, attention
from sapo.model.flex import takes_flex
from sapo.model.loading import prepare_policy
from support.attention_cases import attention_by_definition, normal, query_key_value
from support.flex_cases import TREE, WIDE
from support.tree_cases import chain, visible_NN

pytestmark = pytest.mark.gpu

LONG = chain([700, 300, *[200] * 8, 90, *[33] * 8], [-1, 0, *[1] * 8, 0, *[10] * 8])


def on_gpu(segments, dtype, heads, kv_heads, size):
    shapes = ((heads, size), (kv_heads, size), (kv_heads, size))
    count = segments[-1].stop
    return [normal(count, *shape, seed=i).to("cuda", dtype).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("window", [None, 17, 150])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 64), (8, 1, 128)])
@pytest.mark.parametrize("segments", [TREE, WIDE, LONG], ids=["small", "wide", "long"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_compiled_attention_and_its_gradient_equal_the_definition(
    segments, heads, kv_heads, size, window, dtype, tolerance
):
    inputs = on_gpu(segments, dtype, heads, kv_heads, size)
    assert takes_flex(*inputs[:3])
    ours = TreeLayout(segments, "cuda").attend(0, *inputs, size**-0.5, window)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = attention_by_definition(*exact, visible_NN(segments, window).to("cuda"), size**-0.5)
    slope = normal(*ours.shape, seed=9).to("cuda")
    ours_and_gradients = (ours, *torch.autograd.grad((ours * slope.to(dtype)).sum(), inputs))
    theirs_and_gradients = (theirs, *torch.autograd.grad((theirs * slope).sum(), exact))
    for a, b in zip(ours_and_gradients, theirs_and_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_sinks_and_their_gradient_equal_the_definition(window, dtype, tolerance):
    inputs = [*on_gpu(WIDE, dtype, 4, 2, 64), normal(4, seed=7).to("cuda", dtype).requires_grad_()]
    ours = TreeLayout(WIDE, "cuda").attend(0, *inputs[:3], 0.125, window, None, inputs[3])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = attention_by_definition(*exact[:3], visible_NN(WIDE, window).to("cuda"), 0.125, exact[3])
    slope = normal(*ours.shape, seed=9).to("cuda")
    ours_and_gradients = (ours, *torch.autograd.grad((ours * slope.to(dtype)).sum(), inputs))
    theirs_and_gradients = (theirs, *torch.autograd.grad((theirs * slope).sum(), exact))
    for a, b in zip(ours_and_gradients, theirs_and_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())


def test_capped_scores_equal_the_padded_way(monkeypatch):
    inputs = on_gpu(WIDE, torch.float32, 4, 2, 64)
    ours = TreeLayout(WIDE, "cuda").attend(0, *inputs, 0.7, 30, softcap=1.5)
    monkeypatch.setenv("SAPO_FLEX", "0")
    assert not takes_flex(*inputs[:3])
    theirs = TreeLayout(WIDE, "cuda").attend(0, *inputs, 0.7, 30, softcap=1.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_finds_a_kernel_that_keeps_no_scores(dtype):
    shapes = ((2, 8, 77, 64), (2, 2, 90, 64), (2, 2, 90, 64))
    query, key, value = (normal(*shape, seed=i).to("cuda", dtype) for i, shape in enumerate(shapes))
    mask = torch.zeros(1, 1, 77, 90, device="cuda", dtype=dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # an error where it cannot be had
        ours = attention(query, key, value, mask, 0.125, None)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = attention(query.double(), key.double(), value.double(), mask.double(), 0.125, None)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "qwen3_moe"])
def test_a_policy_and_its_gradient_are_those_of_the_padded_way(new_policy, monkeypatch, architecture):
    made = new_policy(architecture, hidden_size=64)
    policy = prepare_policy(made.model.to("cuda"), made.tokenizer)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 15, TREE[-1].stop)).to("cuda")
    starts = zip(TREE, (0, 9, 14, 14, 9, 0), strict=True)
    positions = torch.cat([torch.arange(s.length) + d for s, d in starts]).to("cuda")
    found = []
    for flex in ("0", "1"):
        monkeypatch.setenv("SAPO_FLEX", flex)
        policy.model.zero_grad()
        logits = policy.logits(policy.hidden(ids, positions, TreeLayout(TREE, "cuda")))
        logits.log_softmax(-1)[:, 3].sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in policy.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * max(1.0, theirs.abs().max().item()))


def test_many_lengths_stay_compiled():
    # More than the 8 shapes beyond which torch would compute uncompiled.
    for blocks in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        segments = chain([100, blocks * 128 - 140, 40], [-1, 0, 0]) if blocks > 1 else TREE
        inputs = query_key_value(segments[-1].stop, torch.float32, heads=2, kv_heads=1)
        inputs = [x.detach().repeat(1, 1, 2).to("cuda") for x in inputs]
        ours = TreeLayout(segments, "cuda").attend(0, *inputs, 0.25, None)
        theirs = attention_by_definition(*inputs, visible_NN(segments, None).to("cuda"), 0.25)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
