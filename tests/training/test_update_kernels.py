"""Kernels and host reads of an update as a GPU makes them, counted on a CPU: by layer, from two depths.

Attention, which is one kernel there forward and two backward, is one operation each way here.
"""

from typing import Any

import torch

from sapo.model import gpu_head
from sapo.model.attention import TreeLayout
from sapo.model.policy import Policy
from support.kernel_counts import KernelCount
from support.trainer_cases import make_groups, make_policy, make_trainer


class Attention(torch.autograd.Function):
    """One operation forward and one backward."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.shapes = key.shape, value.shape
        return query.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = grad.new_zeros(2 * grad.numel() + grad.numel())
        key, value = ctx.shapes
        return grad, joined[: key.numel()].view(key), joined[: value.numel()].view(value)


def count(architecture, layers, monkeypatch):
    """What the second update launches, and its micro-batches."""
    plain = make_policy(torch.float32, architecture, layers=layers)
    policy = Policy(plain.model.to(torch.bfloat16), plain.tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(gpu_head, "takes_whole_chunks", lambda _: True)
        patched.setattr(
            TreeLayout, "attend", lambda self, _layer, query, key, value, *_: Attention.apply(query, key, value)
        )
        trainer = make_trainer(policy, tokens_per_microbatch=64)
        shares = trainer.pack(make_groups(), include_all=True)
        trainer.update(shares, 1e-4)
        with KernelCount() as counted:
            trainer.update(shares, 1e-4)
    return counted, len(shares.microbatches)


def test_an_update_launches_no_more_kernels_than_counted_and_reads_few_numbers(monkeypatch):
    (shallow, batches), (deep, _) = (count("qwen3", layers, monkeypatch) for layers in (1, 2))
    # The goal is 60, which wants fused norms, rotary embedding and MLP.
    assert (deep.kernels - shallow.kernels) / batches <= 166
    assert sum(deep.host_reads.values()) <= batches + 5, deep.host_reads
    # Floats that atomics add come out in another order each time.
    assert not [name for name in deep.launched if "index_add" in name or "scatter_add" in name]
