"""Recurrent layers on trees: each path as the model computes it alone, gradients too, and nothing of the others."""

from __future__ import annotations

import copy
import inspect
import sys
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.state_tree import Sequences
from support.recurrent_cases import (
    FAMILIES,
    TOKENIZER,
    TREE,
    make_model,
    make_model_in_double,
    make_pair,
    packed_logprobs,
    plain_logprobs,
    random_ids,
)
from support.tree_cases import TREES, leaves_of, path_of, positions_of

every_family = pytest.mark.parametrize("family", FAMILIES)
# One of each kind of mixer.
every_kind = pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "lfm2", "bamba", "jamba"])


@torch.no_grad()
@every_family
def test_logprobs_equal_those_of_the_models_own_forward_over_each_path(family: str) -> None:
    policy, model = make_pair(family)
    ids_N = random_ids(TREE)
    packed = packed_logprobs(policy, ids_N)
    for path, expected in plain_logprobs(model, ids_N).items():
        torch.testing.assert_close(packed[list(path)], expected, rtol=0, atol=1e-5)


@every_family
def test_the_gradient_of_every_parameter_equals_that_of_the_paths(family: str) -> None:
    model = make_model_in_double(family)
    policy = prepare_policy(copy.deepcopy(model), TOKENIZER)
    assert policy.path == "packed"
    ids_N = random_ids(TREE)
    weight_NV = torch.randn(len(ids_N), len(TOKENIZER), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # The last segment of each path only: a token that paths share would be counted once here and several times there.
    leaves = {tuple(path_of(TREE, i)): range(TREE[i].start, TREE[i].stop) for i in leaves_of(TREE)}
    packed = packed_logprobs(policy, ids_N)
    sum((packed[own] * weight_NV[own]).sum() for own in map(list, leaves.values())).backward()
    for path, logprobs in plain_logprobs(model, ids_N).items():
        own = list(leaves[path])
        torch.testing.assert_close(packed[own], logprobs[-len(own) :], rtol=0, atol=1e-9)
        (logprobs[-len(own) :] * weight_NV[own]).sum().backward()
    ours = dict(policy.model.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert ours[name].grad is None, name
            continue
        error = (ours[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(1e-12)
        assert error <= 1e-7, f"{name}: {error:.2e} of its largest gradient"
        compared += 1
    assert compared > 10
    assert any("conv" in name and p.grad is not None and p.grad.abs().max() > 0 for name, p in ours.items())


@every_kind
@settings(max_examples=4, deadline=None, derandomize=True)
@given(segments=TREES)
@torch.no_grad()
def test_any_tree_is_the_plain_forward_over_every_path(family: str, segments: tuple) -> None:
    policy, model = make_pair(family)
    ids_N = random_ids(segments)
    packed = packed_logprobs(policy, ids_N, segments)
    for path, expected in plain_logprobs(model, ids_N, segments).items():
        torch.testing.assert_close(packed[list(path)], expected, rtol=0, atol=2e-5)


@torch.no_grad()
@every_family
def test_another_response_changed_leaves_each_hidden_state_equal_to_the_bit(family: str) -> None:
    policy, _ = make_pair(family)
    ids_N = random_ids(TREE)
    before = policy.hidden(ids_N, positions_of(TREE), TreeLayout(TREE))
    for leaf in leaves_of(TREE):
        changed_N = ids_N.clone()
        own = list(range(TREE[leaf].start, TREE[leaf].stop))
        changed_N[own] = (changed_N[own] + 1) % 15
        after = policy.hidden(changed_N, positions_of(TREE), TreeLayout(TREE))
        others = [n for n in range(len(ids_N)) if n not in own]
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[own], before[own])


@every_kind
def test_checkpointing_changes_no_bit_of_the_gradients(family: str) -> None:
    policy = prepare_policy(make_model(family), TOKENIZER)
    gradients = []
    for on in (False, True):
        if on:
            policy.enable_checkpointing()
        policy.checkpoint_activations(on)
        packed_logprobs(policy, random_ids(TREE)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None})
        policy.model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@torch.no_grad()
@every_kind
def test_a_plain_model_computes_and_generates_as_if_there_were_no_policies(family: str) -> None:
    model = make_model(family)
    module = sys.modules[type(model).__module__]
    ids = torch.arange(9)[None] % 15
    exchanged = {name: getattr(module, name) for name in getattr(module, "_sapo_own_functions", {})}
    for name, own in getattr(module, "_sapo_own_functions", {}).items():
        setattr(module, name, own)
    expected = model(input_ids=ids).logits
    drawn = model.generate(ids, max_new_tokens=4, do_sample=False)
    for name, function in exchanged.items():
        setattr(module, name, function)
    prepare_policy(copy.deepcopy(model), TOKENIZER)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), drawn)


def test_sequences_without_padding_give_what_rectangles_give() -> None:
    # What flash-linear-attention is asked for on a GPU, by the torch function sequence after sequence.
    chunk = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8), (2, 8), (2, 4), (2,), (2,)]
    inputs = [torch.randn(TREE[-1].stop, *shape, generator=generator) for shape in shapes]
    inputs[3:] = [-inputs[3].exp(), inputs[4].sigmoid()]
    for tensor in inputs:
        tensor.requires_grad_()

    def scan(rows: Sequences) -> tuple[Tensor, Tensor]:
        query, key, value, g, beta = rows.inputs
        parts = []
        bounds = [None, None] if rows.offsets is None else rows.offsets.tolist()
        for i, (start, stop) in enumerate(pairwise(bounds)):
            initial = rows.initial if rows.offsets is None or rows.initial is None else rows.initial[i : i + 1]
            own = (t[:, start:stop] for t in (query, key, value))
            more = {"g": g[:, start:stop], "beta": beta[:, start:stop], "initial_state": initial}
            parts.append(chunk(*own, **more, output_final_state=True))
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([last for _, last in parts])

    found = []
    for packs in (False, True):
        states = TreeLayout(TREE).states
        output = states.scan((0, 0), inputs, scan, packs)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        found.append((output, *gradients))
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


def test_a_layout_without_states_is_refused() -> None:
    class Attends:
        calls: ClassVar[dict[int, int]] = {}

        def attend(self, layer, query, key, value, *_, **__):
            return query

    policy, _ = make_pair("qwen3_5_text")
    with pytest.raises(ValueError, match="carries a state from token to token, which a Attends has not"):
        policy.hidden(torch.arange(3), torch.arange(3), Attends())
