"""Policy head: hidden states to loss and gradients, beside Liger's fused linear GRPO loss and plain autograd.

All three compute SAPO's loss and its gradient with respect to hidden states and output embedding. Memory is resident
memory beyond that before the call, so the gradient of the output embedding, V x H, is in every figure.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from torch import Tensor

from bench.pairs import measure_pairs
from sapo.model.head import policy_head
from sapo.objectives import make_objective, policy_loss

SEQUENCES, LENGTH, HIDDEN = 8, 64, 1024


def measure(vocabulary: int = 49152) -> Iterator[dict[str, Any]]:
    """One row for each peer: seconds and peak memory of both, and the ratio."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN, generator=generator) * 0.02).requires_grad_()
    target = torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=generator)
    advantage = torch.tensor([1.0, -1.0] * (SEQUENCES // 2))
    mask = torch.ones(SEQUENCES, LENGTH)
    old = torch.full((SEQUENCES, LENGTH), -11.0)

    def clear() -> int:
        hidden.grad = weight.grad = None
        return SEQUENCES * LENGTH

    def ours() -> int:
        objective = make_objective("sapo")
        sequence = torch.arange(SEQUENCES).repeat_interleave(LENGTH)
        token_weight = 1.0 / (SEQUENCES * LENGTH)

        def loss_and_coefficient(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            surrogate = objective.surrogate(
                logprob - old.flatten()[at], advantage[sequence[at]], sequence[at], SEQUENCES
            )
            return -token_weight * surrogate.value_M.sum(), -token_weight * surrogate.slope_M

        policy_head(hidden.flatten(0, 1), weight, target.flatten(), loss_and_coefficient).loss.backward()
        return clear()

    liger_loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="sapo")

    def liger() -> int:
        loss, _ = liger_loss(hidden, weight, target, mask, advantage, old_per_token_logps=old)
        loss.backward()
        return clear()

    def plain() -> int:
        logp = torch.log_softmax(hidden @ weight.T, -1).gather(2, target[..., None])[..., 0]
        policy_loss("sapo", logp, old, advantage, mask.bool()).backward()
        return clear()

    peers: dict[str, Callable[[], int]] = {"Liger fused linear GRPO": liger, "plain autograd": plain}
    for name, peer in peers.items():
        memory = {key: _peak_mib(f) for key, f in (("ours_mib", ours), ("peer_mib", peer))}
        yield {
            "measure": f"policy head, {SEQUENCES * LENGTH} tokens, H {HIDDEN}, V {vocabulary}",
            "peer": name,
            "unit": "s/token",
            **measure_pairs(ours, peer, pairs=3).row(),
            **memory,
        }


def _peak_mib(function: Callable[[], object]) -> float:
    """Most resident memory during a call beyond that before it, sampled every half millisecond."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    function()  # whatever is allocated once and kept is not the function's
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (peak - before) / 2**20
