"""Linear layers arranged for decoding: joined where they share an input, packed for this processor or for oneDNN."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapo.model.adapters import folded_weight
from sapo.model.policy import Policy
from sapo.model.products import wide_product
from sapo.rollout.local.cpu.native import kernels
from sapo.rollout.local.cpu.packed import (
    PackedLinear,
    Panels,
    suits,
)

# Smaller weights stay in the cache whatever their order, and a packed product costs some microseconds more to call.
PACKED_ELEMENTS = 2**18


# Packing reads and writes the weights once; a product of a few dozen rows gains a fifth of its time by it.
PACKED_CALLS = 6


PACKED_ROWS = 64
"""The rows that oneDNN chooses the packed order for. What it chooses serves 1 to 300 rows as well (research/log.md)."""


Packing = bool | Panels
"""Into panels for packed.c, for oneDNN, or not at all."""


def sums_in_products(device: torch.device) -> bool:
    """Return whether a product is added to a total by its own kernel: on a GPU, where a kernel is what costs."""
    return device.type not in ("cpu", "meta")


class Linear:
    """x W' + b of one weight, packed for oneDNN where that was asked for and pays."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pack: bool) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.packed = pack and weight.numel() >= PACKED_ELEMENTS
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_ROWS)

    def __call__(self, input_NI: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(input_NI, self.weight, self.bias, "none", [], "")
        return F.linear(input_NI, self.weight, self.bias)

    def add_to(self, total_NO: Tensor, input_NI: Tensor) -> None:
        """Add the outputs to a total: on a GPU in the product itself, rounded once."""
        if self.bias is None and sums_in_products(total_NO.device):
            torch.addmm(total_NO, input_NI, self.weight.t(), out=total_NO)
        else:
            total_NO += self(input_NI)

    def widened(self, input_NI: Tensor) -> Tensor:
        """Return the outputs in float32: on a GPU as summed, elsewhere rounded to the weight's dtype before."""
        if input_NI.device.type not in ("cpu", "meta"):
            outputs = wide_product(input_NI, self.weight.t())
            return (outputs if self.bias is None else outputs.add_(self.bias)).float()
        return self(input_NI).float()


def join_layers(modules: list[nn.Linear], pack: Packing) -> Linear | PackedLinear:
    """Join linear layers with the same input: their outputs, one behind the other."""
    biases: list[Tensor | None] = [m.bias for m in modules]
    assert len({bias is None for bias in biases}) == 1, "joined layers have all a bias or none"
    return arrange_weights([folded_weight(m) for m in modules], biases, pack)


def arrange_weights(weights: list[Tensor], biases: list[Tensor | None], pack: Packing) -> Linear | PackedLinear:
    """Make the product of one or more (out, in) weights, one behind the other, with their biases if they have any."""
    if isinstance(pack, Panels):
        return pack.linear(weights, biases)
    held = [bias for bias in biases if bias is not None]
    bias = torch.cat(held) if len(held) > 1 else next(iter(held), None)
    return Linear(weights[0] if len(weights) == 1 else torch.cat(weights), bias, pack)


def choose_packing(policy: Policy, calls: int, device: torch.device | None = None) -> Packing:
    """Decide how weights are packed for so many calls on this machine.

    Args:
        device: where a policy on the meta device would be; None for where it is.
    """
    device = device or policy.device
    native = kernels(device, policy.dtype)
    if calls < PACKED_CALLS:
        return False
    if native is not None and suits(policy.decoder, native, policy.dtype):
        return Panels(native, policy.dtype)
    return onednn_packs(policy.dtype, device)


def onednn_packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this machine's oneDNN takes packed weights of that precision."""
    if (
        device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or platform.machine() not in ("x86_64", "AMD64")
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
