"""What an update gives back, put together from its micro-batches, and why it was refused where it was not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.model.head import HeadOutput
from sapo.model.routing import Replay
from sapo.objectives import KLPenalty, MismatchWeights, Surrogate
from sapo.training.mismatch import join_mismatch
from sapo.training.settings import TrainerSettings

Output = tuple[PackedBatch, HeadOutput, Surrogate]
"""A micro-batch and what its forward pass gave."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update did, token by token, over the response tokens that carried a gradient.

    The tensors are empty and `skipped` is true when every group of the mini-batch has zero variance.
    """

    loss: float
    grad_norm: float
    log_ratio_M: Tensor
    """log r of each token, float64."""
    weight_M: Tensor
    """Gate weight f'(r)."""
    slope_M: Tensor
    """d value / d log pi."""
    advantage_M: Tensor
    sequence_M: Tensor
    """Sequence of each token, numbered from 0 without gaps."""
    sequence_ids: tuple[int, ...]
    """Where each of those sequences stands in the mini-batch, zero-variance groups counted."""
    entropy_M: Tensor | None
    num_packed_tokens: int
    """Tokens that went through the model, prompts once per group."""
    skipped: bool = False
    kl_M: Tensor | None = None
    """The penalty's estimate of KL at each token, in nats, before its coefficient; None without one."""
    changed_share: float | None = None
    """Share of the replayed choices of an expert (packed token, layer, place) that the live router would not have made;
    None without routing replay."""
    log_mismatch_M: Tensor | None = None
    """log pi_old - log mu of each token, float64; None where log pi_old is the sampler's."""
    tis: MismatchWeights | None = None
    """The correction for the mismatch; None without one."""
    loss_weight_M: Tensor | None = None
    """Weight of each token in the loss, the normaliser of the mini-batch included; None where it was not kept."""
    old_logprob_M: Tensor | None = None
    """log pi_old of each token; likewise."""


def collect_result(
    loss: float, norm: float, outputs: Sequence[Output], replays: Sequence[Replay | None], settings: TrainerSettings
) -> UpdateResult:
    """Join the micro-batches of an update, sequences numbered through."""
    log_mismatch_M, tis = join_mismatch(settings.tis, [batch for batch, _, _ in outputs])
    result = _join(loss, norm, outputs, settings.kl)
    return replace(result, log_mismatch_M=log_mismatch_M, tis=tis, changed_share=_changed_share(replays))


def skipped_result() -> UpdateResult:
    """Return the result of an update that had nothing to learn from."""
    empty = torch.zeros(0, dtype=torch.float64)
    return UpdateResult(0.0, 0.0, empty, empty, empty, empty, empty.long(), (), None, 0, skipped=True)


def first_nonfinite(outputs: Sequence[Output], settings: TrainerSettings) -> str | None:
    """Name the first quantity that is not finite, in the order in which they depend on each other."""
    causes: tuple[tuple[str, Callable[[PackedBatch, HeadOutput, Surrogate], Tensor | None]], ...] = (
        ("an advantage", lambda b, h, s: b.advantages_B),
        ("log pi_old", lambda b, h, s: b.old_logprobs_M),
        ("log mu", lambda b, h, s: None if settings.tis is None else b.sampler_logprobs_M),
        ("log pi_ref", lambda b, h, s: None if settings.kl is None else b.reference_logprobs_M),
        ("log pi of the policy", lambda b, h, s: h.logprob_M),
        ("the objective's value", lambda b, h, s: s.value_M),
        ("the objective's slope", lambda b, h, s: s.slope_M),
    )
    for name, pick in causes:
        found = (pick(*output) for output in outputs)
        if any(tensor is not None and not torch.isfinite(tensor).all() for tensor in found):
            return name
    return None


def _join(loss: float, norm: float, outputs: Sequence[Output], kl: KLPenalty | None) -> UpdateResult:
    offsets = [0]
    for batch, _, _ in outputs:
        offsets.append(offsets[-1] + batch.num_sequences)
    entropies = [h.entropy_M for _, h, _ in outputs if h.entropy_M is not None]
    return UpdateResult(
        loss=loss,
        grad_norm=norm,
        log_ratio_M=torch.cat([h.logprob_M.double() - b.old_logprobs_M for b, h, _ in outputs]),
        weight_M=torch.cat([s.weight_M for _, _, s in outputs]),
        slope_M=torch.cat([s.slope_M for _, _, s in outputs]),
        advantage_M=torch.cat([b.advantages_B[b.sequence_M] for b, _, _ in outputs]),
        sequence_M=torch.cat([b.sequence_M + o for (b, _, _), o in zip(outputs, offsets, strict=False)]),
        sequence_ids=tuple(i for b, _, _ in outputs for i in b.sequence_ids),
        entropy_M=torch.cat(entropies) if entropies else None,
        kl_M=_kl_of(outputs, kl),
        loss_weight_M=torch.cat([b.weights_B[b.sequence_M] for b, _, _ in outputs]),
        old_logprob_M=torch.cat([b.old_logprobs_M for b, _, _ in outputs]),
        num_packed_tokens=sum(b.num_tokens for b, _, _ in outputs),
    )


def _kl_of(outputs: Sequence[Output], kl: KLPenalty | None) -> Tensor | None:
    if kl is None:
        return None
    differences = [
        h.logprob_M.double() - b.reference_logprobs_M for b, h, _ in outputs if b.reference_logprobs_M is not None
    ]
    return kl.value_and_slope(torch.cat(differences))[0]


def _changed_share(replays: Sequence[Replay | None]) -> float | None:
    made = [r for r in replays if r is not None]
    return sum(r.changed for r in made) / sum(r.choices for r in made) if made else None
