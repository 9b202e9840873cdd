"""Root-mean-square norms and gated MLPs with closed-form backward passes: the same values, fewer tensors and passes.

Autograd keeps each intermediate of x rsqrt(mean x^2 + eps) w and of W (silu(gate) up); here a norm keeps its input and
one number per row, and an MLP keeps gate and up and makes their product again. The forward pass runs the operations
that transformers runs, so that its bits are the model's own.

A layer is taken for what it computes, not for its class: `use_closed_forms` compares it on a few random rows, and what
differs (a norm with 1 + w, another activation, an MLP with an adapter inside) keeps its own forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapo.model import products
from sapo.model.products import linear, outer_sum, product


def rms_norm(input_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Compute (..., H) w x / sqrt(mean x^2 + eps); 16-bit x is normalised in float32 and multiplied in 16 bits."""
    return _RMSNorm.apply(input_NH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = inputs.to(_wide(inputs.dtype))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(inputs, weight, scale)
        return weight * (wide * scale).to(inputs.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x s the normalised row, s = rsqrt(mean x^2 + eps): d w = sum of g n over rows, and
        # d x = s (g w - n mean(g w n)).
        inputs, weight, scale = ctx.saved_tensors
        width = weight.shape[0]
        wide = scale.dtype
        normalized = (inputs.to(wide) * scale).reshape(-1, width)
        grad_wide = grad.to(wide).reshape(-1, width)
        both = grad_wide * normalized
        grad_weight = both.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_input = None
        if ctx.needs_input_grad[0]:
            wide_weight = weight.to(wide)
            mean = (both @ wide_weight).div_(width)
            slope = torch.mul(grad_wide, wide_weight, out=both)
            slope.addcmul_(normalized, mean[:, None], value=-1).mul_(scale.reshape(-1, 1))
            grad_input = slope.to(inputs.dtype).view(inputs.shape)
        return grad_input, grad_weight, None


def gated_linear(gate_NI: Tensor, up_NI: Tensor, weight_HI: Tensor) -> Tensor:
    """Compute (..., H) W (silu(gate) up), the second half of a gated MLP."""
    return _GatedLinear.apply(gate_NI, up_NI, weight_HI)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad_NH = grad.reshape(-1, weight.shape[0])
        gate_NI, up_NI = (x.reshape(-1, weight.shape[1]) for x in (gate, up))
        needs_gate, needs_up, needs_weight = ctx.needs_input_grad
        active = F.silu(gate_NI)
        grad_weight = outer_sum(grad_NH, active * up_NI) if needs_weight else None
        if not (needs_gate or needs_up):
            return None, None, grad_weight
        grad_product = product(grad_NH, weight)
        grad_up = active.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up_NI), gate_NI)
        return grad_gate.view(gate.shape), grad_up.view(up.shape), grad_weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Forwards:
    """Stand in for the forward of a layer; without autograd, and where it does not apply, call the layer's own."""

    @staticmethod
    def norm(self: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Tensor:
        if rest or named:  # one that takes a gate, and does without here (Mamba-2)
            return type(self).forward(self, hidden_states, *rest, **named)
        # A norm of transformers computes a float64 model in float32.
        if not torch.is_grad_enabled() or hidden_states.dtype == torch.float64:
            return type(self).forward(self, hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    @staticmethod
    def mlp(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not _is_plain(self.down_proj):
            return type(self).forward(self, x)
        return gated_linear(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


def use_closed_forms(model: nn.Module) -> None:
    """Let the norms and gated MLPs of a model compute their backward pass in closed form.

    They keep their class, parameters and names; one to which someone else gave a forward keeps that. A model on the
    meta device has nothing to be proven on; see `use_proven_forms`.
    """
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        names = {name for name, _ in module.named_parameters(recurse=False)}
        if names == {"weight"} and hasattr(module, "variance_epsilon"):
            weight: Any = module.weight
            _take(module, _Forwards.norm, weight.shape[-1], weight)
        elif hasattr(module, "act_fn") and _is_plain(getattr(module, "down_proj", None)):
            gate, up = getattr(module, "gate_proj", None), getattr(module, "up_proj", None)
            if isinstance(gate, nn.Linear) and isinstance(up, nn.Linear):
                _take(module, _Forwards.mlp, gate.in_features, gate.weight)


def proven_forms(model: nn.Module) -> dict[str, str]:
    """Return the modules that compute in closed form: name -> which."""
    forms = {_Forwards.norm: "norm", _Forwards.mlp: "mlp"}
    taken = ((name, getattr(vars(module).get("forward"), "__func__", None)) for name, module in model.named_modules())
    return {name: forms[form] for name, form in taken if form in forms}


def use_proven_forms(model: nn.Module, proven: dict[str, str]) -> None:
    """Let the modules of a model compute as those of an equal one do, which were proven there."""
    for name, form in proven.items():
        module: Any = model.get_submodule(name)
        module.forward = MethodType(getattr(_Forwards, form), module)


def computes_as_its_class(module: nn.Module) -> bool:
    """Return whether a module's forward is its class's, or one of ours that computes the same."""
    own = vars(module).get("forward")
    return own is None or getattr(own, "__func__", None) in (products.forward, _Forwards.norm, _Forwards.mlp)


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def _take(module: Any, forward: Any, width: int, like: Tensor) -> None:
    """Give the module that forward if it computes the same, to the bit, of three rows of one of its own."""
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(3, width, generator=generator).to(like)
    try:
        with torch.no_grad():
            own = type(module).forward(module, probe)
    # One that wants more than hidden states, such as a gate; that of transformers 5.16 may be None until it is used.
    except (TypeError, RuntimeError, AttributeError):
        return
    with torch.enable_grad():
        same = torch.equal(forward(module, probe), own)
    if same:
        module.forward = MethodType(forward, module)
