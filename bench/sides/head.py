"""The policy head alone, four ways: hidden states to SAPO's loss and to gradients in hidden states and embedding.

ours: `policy_head`. trl: the tiles of `add_fused_lm_head` and the loss of GRPOTrainer on them, by autograd. liger: its
fused linear GRPO loss. plain: log_softmax over all logits. Only the head is TRL's, so its loss, four lines of
`_compute_loss`, stands here; the facts show that all four have one loss and one gradient.

Memory is what a call has resident beyond what there was before it, by the kernel's own mark of the peak. It is taken in
a process whose allocator gives memory back at once (MALLOC_MMAP_THRESHOLD_), which costs time, so never in the one that
is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.sides.clock import gemm_backends, timed, use_machine
from bench.sides.serve import Commands, peak_bytes

SEQUENCES = 16
Head = Callable[[], Tensor]
"""Runs forward and backward and returns the loss."""


class Inputs:
    """Hidden states, output embedding and what the loss needs, drawn by a seed."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        tokens, hidden, vocabulary = settings["tokens"], settings["hidden"], settings["vocabulary"]
        dtype = getattr(torch, settings["dtype"])
        generator = torch.Generator().manual_seed(0)
        length = tokens // SEQUENCES
        self.hidden_BTH = torch.randn(SEQUENCES, length, hidden, generator=generator).to(device, dtype)
        self.hidden_BTH.requires_grad_()
        self.weight_VH = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).to(device, dtype)
        self.weight_VH.requires_grad_()
        self.target_BT = torch.randint(vocabulary, (SEQUENCES, length), generator=generator).to(device)
        self.advantage_B = torch.tensor([1.0, -1.0] * (SEQUENCES // 2), device=device)
        self.mask_BT = torch.ones(SEQUENCES, length, device=device)
        # Near log pi, as in training: far from it every gate would be shut and the gradient 0.
        with torch.no_grad():
            self.old_BT = plain_logprobs(self.hidden_BTH, self.weight_VH, self.target_BT, chunk=64)
            self.old_BT += 0.1 * torch.randn(self.old_BT.shape, generator=generator).to(device)


def plain_logprobs(hidden_BTH: Tensor, weight_VH: Tensor, target_BT: Tensor, chunk: int) -> Tensor:
    """(B, T) log pi, a chunk of rows' logits at a time."""
    parts = []
    for hidden_MH, target_M in zip(
        hidden_BTH.flatten(0, 1).split(chunk), target_BT.flatten().split(chunk), strict=True
    ):
        logp_MV = torch.log_softmax((hidden_MH @ weight_VH.T).float(), -1)
        parts.append(logp_MV.gather(1, target_M[:, None])[:, 0])
    return torch.cat(parts).view(target_BT.shape)


def ours(x: Inputs) -> Head:
    """sapo."""
    from sapo.model.head import policy_head
    from sapo.objectives import make_objective

    objective = make_objective("sapo")
    count, length = x.target_BT.shape
    sequence_M = torch.arange(count, device=x.target_BT.device).repeat_interleave(length)
    advantage_M, old_M, weight = x.advantage_B.repeat_interleave(length), x.old_BT.flatten(), 1.0 / (count * length)

    def loss_and_coefficient(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        s = objective.surrogate(logprob - old_M[at], advantage_M[at], sequence_M[at], count)
        return -weight * s.value_M.sum(), -weight * s.slope_M

    def run() -> Tensor:
        out = policy_head(x.hidden_BTH.flatten(0, 1), x.weight_VH, x.target_BT.flatten(), loss_and_coefficient)
        out.loss.backward()
        return out.loss.detach()

    return run


def trl(x: Inputs) -> Head:
    """TRL's tiles and loss."""
    from trl.trainer import utils

    def run() -> Tensor:
        flat, _, *_ = utils._ChunkedLogProbFunction.apply(
            x.hidden_BTH.flatten(0, 1),
            x.weight_VH,
            None,
            x.target_BT.flatten(),
            1.0,
            utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("log_probs", "entropy"),  # as GRPOTrainer asks for
        )
        loss = _trl_loss(flat.view(x.target_BT.shape), x)
        loss.backward()
        return loss.detach()

    return run


def _trl_loss(logp_BT: Tensor, x: Inputs) -> Tensor:
    advantage_B1 = x.advantage_B[:, None]
    ratio_BT = torch.exp(logp_BT - x.old_BT)
    tau_B1 = torch.where(advantage_B1 > 0, 1.0, 1.05)
    loss_BT = -torch.sigmoid(tau_B1 * (ratio_BT - 1)) * 4 / tau_B1 * advantage_B1
    return ((loss_BT * x.mask_BT).sum(-1) / x.mask_BT.sum(-1)).mean()


def liger(x: Inputs) -> Head:
    """Liger's fused linear GRPO loss, not compiled: its compiler is given the loss of known log-probabilities alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="sapo")

    def run() -> Tensor:
        loss, _ = fused(x.hidden_BTH, x.weight_VH, x.target_BT, x.mask_BT, x.advantage_B, old_per_token_logps=x.old_BT)
        loss.backward()
        return torch.as_tensor(loss.detach())

    return run


def plain(x: Inputs) -> Head:
    """All logits at once and autograd."""
    from sapo.objectives import policy_loss

    def run() -> Tensor:
        logp_BT = plain_logprobs(x.hidden_BTH, x.weight_VH, x.target_BT, chunk=x.target_BT.numel())
        loss = policy_loss("sapo", logp_BT, x.old_BT, x.advantage_B, x.mask_BT.bool())
        loss.backward()
        return loss.detach()

    return run


WAYS = {"ours": ours, "trl": trl, "liger": liger, "plain": plain}


def beyond_the_weight_gradient(run: Callable[[], object], x: Inputs) -> int:
    """Bytes a call holds at its peak beyond what was there before and the gradient of the output embedding."""
    own = x.weight_VH.numel() * x.weight_VH.element_size()
    if x.weight_VH.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = peak_bytes("cpu")
    run()
    return peak_bytes(x.weight_VH.device.type) - before - own


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    device = use_machine(settings)
    x = Inputs(settings, device)
    head = WAYS[settings["role"]](x)

    def run() -> dict[str, float]:
        loss = head()
        assert x.hidden_BTH.grad is not None
        assert x.weight_VH.grad is not None
        return {"loss": loss.item(), "norm": x.hidden_BTH.grad.float().norm().item()}

    def clear() -> None:
        x.hidden_BTH.grad = x.weight_VH.grad = None

    about: dict[str, Any] = {}
    if settings["memory"]:
        about["beyond"] = beyond_the_weight_gradient(head, x)
        clear()
    else:
        about["backends"] = gemm_backends(head, device)
        clear()
    commands.ready(**about)
    for _ in commands:
        seconds, facts = timed(run, device)
        clear()
        commands.reply(seconds, settings["tokens"], **facts)
