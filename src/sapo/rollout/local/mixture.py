"""Mixtures of experts in decoding and prefill: Qwen3's, as few operations as there can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapo.rollout.local.cpu.native import Kernels
from sapo.rollout.local.cpu.packed import PackedExperts, Panels
from sapo.rollout.local.packing import Packing


class Experts:
    """Qwen3's mixture: rows sorted by expert, one pair of products for each expert that has any.

    Static, every expert sees every row and those not chosen are left out: which have rows only the numbers tell. A
    decode step of some dozen rows reads the weights of nearly all experts anyway, and reading is what it waits for.
    """

    def __init__(
        self, mlp: Any, pack: Packing, native: Kernels | None, on_chosen: Callable[[Tensor], None] | None
    ) -> None:
        self.router: Tensor = mlp.gate.weight.detach()
        self.top: int = mlp.gate.top_k
        self.renormalise: bool = getattr(mlp.gate, "norm_topk_prob", True)  # those of Qwen3-VL-MoE always do
        self.gate_up: Tensor = mlp.experts.gate_up_proj.detach()
        self.down: Tensor = mlp.experts.down_proj.detach()
        self.native, self.on_chosen = native, on_chosen
        self.packed: PackedExperts | None = None
        if isinstance(pack, Panels):
            self.packed = PackedExperts(pack, self.router, self.gate_up, self.down)

    def __call__(self, hidden_NH: Tensor, static: bool) -> Tensor:
        logits_NE = F.linear(hidden_NH, self.router) if self.packed is None else self.packed.router(hidden_NH)
        share_NE = torch.softmax(logits_NE, dim=-1, dtype=torch.float32)
        share_NX, expert_NX = torch.topk(share_NE, self.top, dim=-1)
        if self.renormalise:
            share_NX /= share_NX.sum(dim=-1, keepdim=True)
        if self.on_chosen is not None:
            self.on_chosen(expert_NX)
        if static:
            return self._of_all(hidden_NH, share_NX, expert_NX)
        if self.packed is None and takes_grouped(hidden_NH, self.gate_up):
            return self._grouped(hidden_NH, share_NX, expert_NX)
        expert, order = expert_NX.flatten().sort(stable=True)
        rows = torch.bincount(expert, minlength=len(self.gate_up)).tolist()
        hidden = hidden_NH.index_select(0, order // self.top)
        results = [self._of_one(i, part) for i, part in enumerate(hidden.split(rows)) if len(part)]
        mixed = torch.empty_like(hidden).index_copy_(0, order, torch.cat(results))
        mixed_NXH = mixed.view(*expert_NX.shape, -1).mul_(share_NX.to(hidden.dtype)[..., None])
        return mixed_NXH.sum(dim=1)

    def _grouped(self, hidden_NH: Tensor, share_NX: Tensor, expert_NX: Tensor) -> Tensor:
        """Compute all experts by two grouped products, without asking how many rows each has."""
        expert, order = expert_NX.flatten().sort(stable=True)
        numbers = torch.arange(len(self.gate_up), device=expert.device)
        stops = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        hidden = hidden_NH.index_select(0, order // self.top)
        inner = gated(F.grouped_mm(hidden, self.gate_up.transpose(1, 2), offs=stops), None)
        results = F.grouped_mm(inner, self.down.transpose(1, 2), offs=stops)
        mixed = torch.empty_like(hidden).index_copy_(0, order, results)
        mixed_NXH = mixed.view(*expert_NX.shape, -1).mul_(share_NX.to(hidden.dtype)[..., None])
        return mixed_NXH.sum(dim=1)

    def _of_one(self, expert: int, hidden_NH: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.down[expert](self.packed.gated[expert](hidden_NH))
        return F.linear(gated(F.linear(hidden_NH, self.gate_up[expert]), self.native), self.down[expert])

    def _of_all(self, hidden_NH: Tensor, share_NX: Tensor, expert_NX: Tensor) -> Tensor:
        gate_ENI, up_ENI = (hidden_NH @ self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        each_ENH = F.silu(gate_ENI).mul_(up_ENI) @ self.down.transpose(1, 2)
        place_NXH = expert_NX[..., None].expand(-1, -1, hidden_NH.shape[1])
        chosen_NXH = each_ENH.transpose(0, 1).gather(1, place_NXH)
        return chosen_NXH.mul_(share_NX.to(hidden_NH.dtype)[..., None]).sum(dim=1)


def takes_grouped(hidden_NH: Tensor, weight_EMK: Tensor) -> bool:
    """Return whether torch's grouped product computes a mixture's experts: on a GPU, in bfloat16, of aligned rows."""
    on_gpu = hidden_NH.device.type not in ("cpu", "meta") and hasattr(F, "grouped_mm")
    aligned = weight_EMK.shape[1] % 16 == 0 and weight_EMK.shape[2] % 8 == 0
    return on_gpu and hidden_NH.dtype == torch.bfloat16 and aligned


def gated(gate_up_NI: Tensor, native: Kernels | None) -> Tensor:
    """Compute silu(gate) * up."""
    if native is not None:
        return native.gate(gate_up_NI)
    gate_NI, up_NI = gate_up_NI.chunk(2, dim=-1)
    return F.silu(gate_NI).mul_(up_NI)
