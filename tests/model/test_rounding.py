"""Rounded weights: exactly torch's casts, in copies."""

from __future__ import annotations

import pytest
import torch

from sapo.model.rounding import ROUNDED_DTYPES, Rounding, rounded_weights

EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")


def weights(*shape: int, scale: float = 0.05) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_without_scales_it_is_torchs_cast_there_and_back(dtype: str) -> None:
    weight = weights(40, 30)
    expected = weight.to(getattr(torch, dtype)).to(torch.float32)
    got = Rounding(dtype, "none").round(weight)
    assert torch.equal(got, expected)
    assert not torch.equal(got, weight)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_a_scale_brings_the_largest_weight_to_the_largest_number(dtype: str, scaling: str) -> None:
    weight = weights(3, 5, 7)
    got = Rounding(dtype, scaling).round(weight)
    narrow, largest = getattr(torch, dtype), torch.finfo(getattr(torch, dtype)).max
    for expert in range(3):  # each matrix of a stack by itself, written as a loop
        rows = [weight[expert]] if scaling == "tensor" else list(weight[expert])
        expected = []
        for row in rows:
            scale = row.abs().max() / largest
            expected.append((row / scale).clamp(-largest, largest).to(narrow).float() * scale)
        expected = expected[0] if scaling == "tensor" else torch.stack(expected)
        assert torch.equal(got[expert], expected)
    error = (got - weight).abs().max() / weight.abs().max()
    bits = {"float8_e4m3fn": 3, "float8_e5m2": 2}[dtype]  # of the mantissa: half a unit of the last place at most
    assert 0 < error <= 2.0 ** -(bits + 1)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_what_is_beyond_the_range_becomes_the_largest_number_and_not_nan(dtype: str) -> None:
    weight = torch.tensor([[1e9, -1e9, 1.0]])
    largest = torch.finfo(getattr(torch, dtype)).max
    assert Rounding(dtype, "none").round(weight).tolist() == [[largest, -largest, 1.0]]


@pytest.mark.parametrize("scaling", ["none", "tensor", "channel"])
def test_a_matrix_of_zeros_stays_one(scaling: str) -> None:
    assert torch.equal(Rounding("float8_e4m3fn", scaling).round(torch.zeros(4, 4)), torch.zeros(4, 4))


def test_weights_in_16_bits_are_scaled_in_32() -> None:
    weight = weights(16, 16).bfloat16()
    got = Rounding("float8_e4m3fn", "tensor").round(weight)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, Rounding("float8_e4m3fn", "tensor").round(weight.float()).bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float8_e4m3fn, float8_e5m2; got 'float16'"),
        ({"dtype": "bfloat16", "scaling": "row"}, "scaling must be one of none, tensor, channel; got 'row'"),
    ],
)
def test_unknown_names_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rounding(**options)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_matrices_are_rounded_in_copies_and_vectors_pass_as_they_are(new_policy, architecture: str) -> None:
    policy = new_policy(architecture)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in policy.model.named_parameters()}
    rounding = Rounding("float8_e4m3fn")
    got = dict(rounded_weights(policy.weights(), rounding))
    assert got.keys() == before.keys()
    for name, weight in got.items():
        pointer, own = before[name]
        rounded = weight.dim() > 1
        assert torch.equal(weight, rounding.round(own) if rounded else own), name
        assert torch.equal(weight, own) != rounded, name
        assert (weight.data_ptr() == pointer) != rounded, name
    for name, parameter in policy.model.named_parameters():
        pointer, own = before[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, own), "the policy's are never touched"


def test_vectors_are_rounded_where_asked(new_policy) -> None:
    policy = new_policy("qwen3")
    rounding = Rounding("float8_e4m3fn", "none", vectors=True)
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(1.03)  # a norm of 1 is its own rounding
    got = dict(rounded_weights(policy.weights(), rounding))
    assert all(torch.equal(got[n], rounding.round(p.detach())) for n, p in policy.model.named_parameters())
    assert got["model.norm.weight"][0] == 1.0, "by hand: e4m3 has 1 and 1.125"


def test_tied_weights_come_once(new_policy) -> None:
    policy = new_policy("qwen3")
    policy.model.get_output_embeddings().weight = policy.model.get_input_embeddings().weight
    names = [name for name, _ in rounded_weights(policy.weights(), Rounding("float8_e5m2"))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_none_yields_the_very_weights(new_policy) -> None:
    policy = new_policy("qwen3")
    own = {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    assert {n: w.data_ptr() for n, w in rounded_weights(policy.weights(), None)} == own
