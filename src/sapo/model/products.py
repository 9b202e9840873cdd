"""Matrix products of the update: forward, d input and d weight on the best kernel the processor has.

In float32 on an x86 processor torch multiplies with MKL. oneDNN, which is in every build of torch, is up to a tenth
faster on the shapes of a decoder where both are good, and by a half where the output is as wide as a vocabulary and the
rows are few (measured on Zen 4, research/log.md). `linear` and `product` take oneDNN there, the right operand as it is.
The gradient of a weight has its left operand transposed, which oneDNN copies first: there it is taken on AMD's Zen 5
alone, for which MKL has kernels of half the width (not measured, for want of such a machine). bfloat16 goes to oneDNN
by torch's own hand; float64 (tests), CUDA and other processors are left to torch.

On a GPU products of 16-bit factors whose sums are wanted in float32 (logits, the gradient of the output embedding) are
asked for in float32, where torch can: `wide_product` and `add_wide_product`.

Which kernel is taken depends on dtype, device, processor and shape, never on a timing: a run that is resumed computes
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapo.utils.machine import cpuinfo_field

# Setting up a oneDNN product costs 10 to 15 us, as long as MKL takes for the whole of a product of half this size.
MIN_MULTIPLICATIONS = 2**21

# Of a product that is added to a total: 4 MiB of float32, which the second-level cache or the third holds.
BLOCK_ELEMENTS = 2**20

HALVES = (torch.bfloat16, torch.float16)

WIDE_BLOCK_ELEMENTS = 2**27
"""Of a product on a GPU that has to be made beside its total: 512 MiB of float32."""


@cache
def _processor_has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def _mkl_runs_at_half() -> bool:
    """Return whether this is an AMD processor that multiplies 512 bits at once: Zen 5, family 26, or a later one."""
    return cpuinfo_field("vendor_id") == "AuthenticAMD" and int(cpuinfo_field("cpu family") or 0) >= 26


def takes_onednn(left: Tensor, right: Tensor, multiplications: int) -> bool:
    """Return whether a product of two matrices is sent to oneDNN."""
    return (
        multiplications >= max(1, MIN_MULTIPLICATIONS)
        and left.dtype == torch.float32 == right.dtype
        and left.device.type == "cpu" == right.device.type
        and _processor_has_onednn()
        and bool(torch.backends.mkldnn.enabled)
    )


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Compute (M, N) left @ right without autograd; either may be the transposed view of a contiguous matrix."""
    if takes_onednn(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.t(), None, "none", [], "")
    return left_MK @ right_KN


def outer_sum(left_NM: Tensor, right_NK: Tensor) -> Tensor:
    """Compute (M, K) left^T @ right, the gradient of a weight, without autograd."""
    if _mkl_runs_at_half() and takes_onednn(left_NM, right_NK, left_NM.numel() * right_NK.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(left_NM.t(), right_NK.t(), None, "none", [], "")
    return left_NM.t() @ right_NK


def add_outer_sum(total_MK: Tensor, left_NM: Tensor, right_NK: Tensor, *, fresh: bool) -> None:
    """Add left^T @ right to a total, or set it where it is `fresh`; it may be wider than the product's dtype.

    For totals far larger than the caches: one block of rows at a time, so that a product is added while it is in them
    and never takes memory of the size of the total.
    """
    if left_NM.dtype == total_MK.dtype and not _mkl_runs_at_half():
        torch.addmm(total_MK, left_NM.t(), right_NK, beta=0 if fresh else 1, out=total_MK)
        return
    rows = max(1, BLOCK_ELEMENTS // right_NK.shape[1])
    for start in range(0, total_MK.shape[0], rows):
        part = outer_sum(left_NM[:, start : start + rows], right_NK)
        block = total_MK[start : start + rows]
        if fresh:
            block.copy_(part)
        else:
            block.add_(part)


@cache
def wide_support(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """Try which products of 16-bit factors a device gives in float32: `mm`, `bmm`, and `addmm` into a float32 total.

    torch has the first two since 2.8 and the third since 2.12, for CUDA; ROCm has none in some releases.
    """
    found = set()
    left, right = (torch.ones(16, 16, dtype=dtype, device=device) for _ in range(2))
    total = torch.ones(16, 16, device=device)
    tries: dict[str, Callable[[], Tensor]] = {
        "mm": lambda: torch.mm(left, right, out_dtype=torch.float32),
        "bmm": lambda: torch.bmm(left[None], right[None], out_dtype=torch.float32)[0],
        "addmm": lambda: torch.addmm(total, left, right, out_dtype=torch.float32, out=total),
    }
    for name, attempt in tries.items():
        try:
            result = attempt()
        except (RuntimeError, TypeError):
            continue
        if result[0, 0].item() == (17.0 if name == "addmm" else 16.0):
            found.add(name)
    return frozenset(found)


def wide_product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """Compute (M, N) left @ right without autograd: of 16-bit factors in float32, of others in their own precision.

    Where a GPU cannot give it in float32 the product is rounded to 16 bits on the way.
    """
    if left_MK.dtype not in HALVES:
        return left_MK @ right_KN
    if "mm" in wide_support(left_MK.device, left_MK.dtype):
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    if left_MK.device.type == "cpu":
        return left_MK.float() @ right_KN.float()
    return (left_MK @ right_KN).float()


def add_wide_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor, *, fresh: bool) -> None:
    """Add left @ right to a total of float32, or set it where it is `fresh`, in as few kernels as the device allows."""
    if left_MK.dtype == total_MN.dtype:
        torch.addmm(total_MN, left_MK, right_KN, beta=0 if fresh else 1, out=total_MN)
        return
    support = wide_support(left_MK.device, left_MK.dtype)
    if fresh and "mm" in support:
        torch.mm(left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
        return
    if not fresh and "addmm" in support:
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
        return
    rows = max(1, WIDE_BLOCK_ELEMENTS // right_KN.shape[1])
    for start in range(0, total_MN.shape[0], rows):
        block, part = total_MN[start : start + rows], wide_product(left_MK[start : start + rows], right_KN)
        block.copy_(part) if fresh else block.add_(part)


def linear(input_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`: (..., K) inputs and (M, K) weights -> (..., M), differentiable once."""
    if not takes_onednn(input_NK, weight_MK, input_NK.numel() * weight_MK.shape[0]):
        return F.linear(input_NK, weight_MK, bias_M)
    if torch.is_grad_enabled():
        return _Linear.apply(input_NK, weight_MK, bias_M)
    return torch.ops.mkldnn._linear_pointwise(input_NK, weight_MK, bias_M, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad_NM = grad.reshape(-1, weight.shape[0])
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_NM, weight).view_as(inputs) if needs_input else None,
            outer_sum(grad_NM, inputs.reshape(-1, weight.shape[1])) if needs_weight else None,
            grad_NM.sum(0) if needs_bias else None,
        )


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Compute what `nn.Linear` does, through `linear`."""
    return linear(input, self.weight, self.bias)


def patches_forward(self: Any, input: Tensor) -> Tensor:
    """Compute a convolution whose inputs are single patches as the product that it is: (N, C, *P) -> (N, M, 1, ..).

    Vision towers embed their patches so. On a processor the convolution takes several times as long.
    """
    if tuple(input.shape[2:]) != tuple(self.kernel_size):
        found: Tensor = type(self).forward(self, input)
        return found
    rows_NM = linear(input.flatten(1), self.weight.flatten(1), self.bias)
    return rows_NM.view(*rows_NM.shape, *(1 for _ in self.kernel_size))


def _takes_patches(module: nn.Module) -> bool:
    """Return whether a module is a convolution that gives one number a channel for an input of its kernel's size."""
    if type(module) not in (nn.Conv2d, nn.Conv3d):
        return False
    convolution: Any = module
    padded = convolution.padding != "valid" and (convolution.padding == "same" or any(convolution.padding))
    return convolution.groups == 1 and not padded and set(convolution.dilation) == {1}


def use_best_products(model: nn.Module) -> None:
    """Let every linear layer of a model compute through `linear`, and so its embedding of patches.

    The layers keep their class, parameters and names, so that peft, saving and export see the model they know; layers
    of another class (quantised ones, say), and those to which someone else gave a forward, keep what they have.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        elif _takes_patches(module) and "forward" not in module.__dict__:
            module.forward = MethodType(patches_forward, module)
