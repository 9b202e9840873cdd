"""Matrix products of the update: forward, d input and d weight on the best kernel the processor has.

In float32 on an x86 processor with AVX2 or AVX-512 torch multiplies with MKL, which on processors other than Intel's runs at half to
nine tenths of what oneDNN reaches on the same matrices, oneDNN being in every build of torch. `linear` and `product`
take oneDNN there, transposed operands as they lie, without a copy. bfloat16 goes to oneDNN by torch's own hand; float64
(tests), CUDA and other processors are left to torch.

Which kernel is taken depends on dtype, device, processor and shape, never on a timing: a run that is resumed computes
the same bits.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Setting up a oneDNN product costs 10 to 15 us, as long as MKL takes for the whole of a product of half this size.
MIN_MULTIPLICATIONS = 2**21

# A weight's gradient sums over tokens, and oneDNN's plain product wants its left operand contiguous along the sum: the
# copy is one pass for so many uses of each element as the right operand is wide. Below this width it costs more than
# the kernel that needs none is slower.
COPY_PAYS = 512

# Of a product that is added to a total: 4 MiB of float32, which the second-level cache or the third holds.
BLOCK_ELEMENTS = 2**20


@cache
def _processor_has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def takes_onednn(left: Tensor, right: Tensor, multiplications: int) -> bool:
    """Whether a product of two matrices goes to oneDNN by our hand."""
    return (
        multiplications >= MIN_MULTIPLICATIONS
        and left.dtype == torch.float32 == right.dtype
        and left.device.type == "cpu" == right.device.type
        and _processor_has_onednn()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
    )


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """(M, N) left @ right without autograd; either may be the transposed view of a contiguous matrix."""
    if takes_onednn(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.t(), None, "none", [], "")
    return left_MK @ right_KN


def outer_sum(left_NM: Tensor, right_NK: Tensor) -> Tensor:
    """(M, K) left^T @ right, the gradient of a weight: the sum over tokens of their outer products, without autograd."""
    if not takes_onednn(left_NM, right_NK, left_NM.numel() * right_NK.shape[1]):
        return left_NM.t() @ right_NK
    if right_NK.shape[1] >= COPY_PAYS:
        return torch.ops.mkldnn._linear_pointwise(left_NM.t(), right_NK.t(), None, "none", [], "")
    # The weight gradient of a 1 x 1 convolution over a row of N pixels, channels last: a product that oneDNN computes
    # from both matrices as they lie.
    weight = left_NM.new_empty(left_NM.shape[1], right_NK.shape[1], 1, 1)  # read for its shape alone
    pixels, slopes = (x.contiguous()[None, None].permute(0, 3, 1, 2) for x in (right_NK, left_NM))
    one, zero, only_weight = [1, 1], [0, 0], [False, True, False]
    _, grad, _ = torch.ops.aten.convolution_backward(
        slopes, pixels, weight, None, one, zero, one, False, zero, 1, only_weight
    )
    return grad.view(left_NM.shape[1], right_NK.shape[1])


def add_outer_sum(total_MK: Tensor, left_NM: Tensor, right_NK: Tensor, *, fresh: bool) -> None:
    """total += left^T @ right, or total = ... where it is `fresh`; the total may be wider than the product's dtype.

    For totals far larger than the caches: one block of rows at a time, so that a product is added while it is in them and
    never takes memory of the size of the total.
    """
    if left_NM.dtype == total_MK.dtype and not takes_onednn(left_NM, right_NK, MIN_MULTIPLICATIONS):
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


def linear(input_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., K) inputs and (M, K) weights -> (..., M), differentiable once."""
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
        grad_NM = grad.reshape(-1, weight.shape[0]).contiguous()  # of a sum it is one number, expanded
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_NM, weight).view_as(inputs) if needs_input else None,
            outer_sum(grad_NM, inputs.reshape(-1, weight.shape[1])) if needs_weight else None,
            grad_NM.sum(0) if needs_bias else None,
        )


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """What `nn.Linear` computes, through `linear`."""
    return linear(input, self.weight, self.bias)


def use_best_products(model: nn.Module) -> None:
    """Let every linear layer of a model compute through `linear`.

    The layers keep their class, parameters and names, so that peft, saving and export see the model they know; layers of
    another class (quantised ones, say) keep their own forward.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
