"""Closed-form norms and gated MLPs: autograd's gradients, the model's own values, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sapo.model.blocks import gated_linear, rms_norm, use_closed_forms

EPS = 1e-6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def plain_mlp(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(gate) * up, weight)


CASES: dict[str, Any] = {
    "norm": (lambda x, w: rms_norm(x, w, EPS), plain_norm, lambda: [normal(5, 8), 1 + normal(8, seed=1)]),
    "norm of heads": (lambda x, w: rms_norm(x, w, EPS), plain_norm, lambda: [normal(1, 5, 3, 8), normal(8, seed=1)]),
    "norm of tiny rows": (lambda x, w: rms_norm(x, w, EPS), plain_norm, lambda: [1e-4 * normal(5, 8), normal(8)]),
    "mlp": (gated_linear, plain_mlp, lambda: [normal(1, 5, 7), normal(1, 5, 7, seed=1), normal(4, 7, seed=2)]),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_autograd(case: str) -> None:
    ours, theirs, make = CASES[case]
    leaves = [x.requires_grad_() for x in make()]
    value, expected = ours(*leaves), theirs(*leaves)
    assert torch.equal(value, expected)
    slope = normal(*value.shape, seed=7)
    got = torch.autograd.grad((value * slope).sum(), leaves)
    wanted = torch.autograd.grad((expected * slope).sum(), leaves)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_only_the_gradients_asked_for_are_computed(case: str) -> None:
    ours, theirs, make = CASES[case]
    slope = normal(*ours(*make()).shape, seed=7)
    for i in range(len(make())):
        leaves = make()
        leaves[i].requires_grad_()
        [got] = torch.autograd.grad((ours(*leaves) * slope).sum(), leaves[i])
        [wanted] = torch.autograd.grad((theirs(*leaves) * slope).sum(), leaves[i])
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_a_norm_in_16_bits_is_differentiated_in_float32() -> None:
    x, weight = normal(6, 32).bfloat16().requires_grad_(), (1 + 0.1 * normal(32, seed=1)).bfloat16().requires_grad_()
    slope = normal(6, 32, seed=2).bfloat16()
    (rms_norm(x, weight, EPS) * slope).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    (plain_norm(*wide) * slope.double()).sum().backward()
    # What is left is the rounding of the result to 8 bits.
    torch.testing.assert_close(x.grad.double(), wide[0].grad, rtol=2**-8, atol=2e-3)
    torch.testing.assert_close(weight.grad.double(), wide[1].grad, rtol=2**-8, atol=2e-3)


def stood_in_for(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if "forward" in m.__dict__ and not isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}),
        ("llama", {"LlamaRMSNorm", "LlamaMLP"}),
        ("mistral", {"MistralRMSNorm", "MistralMLP"}),
        ("qwen3_moe", {"Qwen3MoeRMSNorm"}),
    ],
)
def test_the_common_blocks_are_taken_and_keep_their_class(architecture: str, expected: set, policies: Any) -> None:
    policy = policies(architecture)
    assert stood_in_for(policy.model) == expected
    twin = copy.deepcopy(policy.model)
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in m.__dict__)


class OnePlusNorm(nn.Module):
    """Gemma's norm: multiplied by 1 + w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.variance_epsilon = EPS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


class GeluMLP(nn.Module):
    """A gated MLP with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
        self.down_proj = nn.Linear(6, 8, bias=False)
        self.act_fn = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GatedMLP(GeluMLP):
    """The one that is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()


def test_what_computes_something_else_keeps_its_own_forward() -> None:
    model = nn.ModuleList([OnePlusNorm(), GeluMLP(), GatedMLP()])
    use_closed_forms(model)
    assert stood_in_for(model) == {"GatedMLP"}


def test_an_mlp_whose_projection_is_replaced_later_computes_with_the_new_one() -> None:
    model = nn.ModuleList([GatedMLP()])
    use_closed_forms(model)
    model[0].down_proj = nn.Sequential(model[0].down_proj, nn.Tanh())
    x = normal(3, 8).float()
    torch.testing.assert_close(model[0](x), GatedMLP.forward(model[0], x), rtol=0, atol=0)
    assert bool((model[0](x).abs() < 1).all())
