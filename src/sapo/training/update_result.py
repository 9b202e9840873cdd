"""What an update gives back, put together from its micro-batches, and why it was refused where it was not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.model.head import HeadOutput
from sapo.model.routing import Replay
from sapo.objectives import KLPenalty, MismatchWeights, Surrogate
from sapo.training.mismatch_correction import join_mismatch
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
    num_choices: int | None = None
    """Choices of an expert that were replayed: packed token, layer, place. None without routing replay."""
    num_changed: int | None = None
    """Those among them that the live router would not have made."""
    log_mismatch_M: Tensor | None = None
    """log pi_old - log mu of each token, float64; None where log pi_old is the sampler's."""
    tis: MismatchWeights | None = None
    """The correction for the mismatch; None without one."""
    loss_weight_M: Tensor | None = None
    """Weight of each token in the loss, the normalizer of the mini-batch included; None where it was not kept."""
    old_logprob_M: Tensor | None = None
    """log pi_old of each token; likewise."""

    @property
    def changed_share(self) -> float | None:
        """Return the share of the replayed choices that the live router would not have made, None without any."""
        return self.num_changed / self.num_choices if self.num_choices and self.num_changed is not None else None


def collect_result(
    loss: float, norm: float, outputs: Sequence[Output], replays: Sequence[Replay | None], settings: TrainerSettings
) -> UpdateResult:
    """Join the micro-batches of an update, sequences numbered through."""
    log_mismatch_M, tis = join_mismatch(settings.tis, [batch for batch, _, _ in outputs])
    result = _join(loss, norm, outputs, settings.kl)
    made = [r for r in replays if r is not None]
    if made:
        result = replace(result, num_choices=sum(r.choices for r in made), num_changed=sum(r.changed for r in made))
    return replace(result, log_mismatch_M=log_mismatch_M, tis=tis)


def join_results(results: Sequence[UpdateResult]) -> UpdateResult:
    """Join what the ranks of a training group measured of one update, in the order of the ranks.

    Loss and gradient norm are those of the whole mini-batch on every rank.
    """
    first = results[0]
    if len(results) == 1 or first.skipped:
        return first
    offsets = [0]
    for result in results:
        offsets.append(offsets[-1] + len(result.sequence_ids))
    joined: dict[str, Any] = {
        f.name: _joined([getattr(r, f.name) for r in results]) for f in fields(UpdateResult) if f.name.endswith("_M")
    }
    joined["sequence_M"] = torch.cat([r.sequence_M + o for r, o in zip(results, offsets, strict=False)])
    tis = [r.tis for r in results if r.tis is not None]
    if tis:
        joined["tis"] = MismatchWeights(torch.cat([t.weight_M for t in tis]), torch.cat([t.clipped_M for t in tis]))
    for name in ("num_choices", "num_changed"):
        counts = [n for r in results if (n := getattr(r, name)) is not None]
        joined[name] = sum(counts) if counts else None
    return replace(
        first,
        sequence_ids=tuple(i for r in results for i in r.sequence_ids),
        num_packed_tokens=sum(r.num_packed_tokens for r in results),
        **joined,
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join what there is of a quantity; a rank with nothing but an empty batch may have none of it."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def skipped_result() -> UpdateResult:
    """Return the result of an update that had nothing to learn from."""
    empty = torch.zeros(0, dtype=torch.float64)
    return UpdateResult(0.0, 0.0, empty, empty, empty, empty, empty.long(), (), None, 0, skipped=True)


def nonfinite_causes(
    settings: TrainerSettings,
) -> dict[str, Callable[[PackedBatch, HeadOutput, Surrogate], Tensor | None]]:
    """Return what may not be finite in a micro-batch, by name, in the order in which they depend on each other."""
    return {
        "an advantage": lambda b, h, s: b.token_advantages_M,
        "log pi_old": lambda b, h, s: b.old_logprobs_M,
        "log mu": lambda b, h, s: None if settings.tis is None else b.sampler_logprobs_M,
        "log pi_ref": lambda b, h, s: None if settings.kl is None else b.reference_logprobs_M,
        "log pi of the policy": lambda b, h, s: h.logprob_M,
        "the objective's value": lambda b, h, s: s.value_M,
        "the objective's slope": lambda b, h, s: s.slope_M,
    }


def first_nonfinite(outputs: Sequence[Output], settings: TrainerSettings) -> int:
    """Return the place in `nonfinite_causes` of the first quantity that is not finite; their number where all are."""
    causes = nonfinite_causes(settings)
    for place, pick in enumerate(causes.values()):
        found = (pick(*output) for output in outputs)
        if any(tensor is not None and not torch.isfinite(tensor).all() for tensor in found):
            return place
    return len(causes)


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
        advantage_M=torch.cat([b.token_advantages_M for b, _, _ in outputs]),
        sequence_M=torch.cat([b.sequence_M + o for (b, _, _), o in zip(outputs, offsets, strict=False)]),
        sequence_ids=tuple(i for b, _, _ in outputs for i in b.sequence_ids),
        entropy_M=torch.cat(entropies) if entropies else None,
        kl_M=_kl_of(outputs, kl),
        loss_weight_M=torch.cat([b.weights_B[b.sequence_M] for b, _, _ in outputs]),
        old_logprob_M=torch.cat([b.old_logprobs_M for b, _, _ in outputs]),
        num_packed_tokens=sum(b.num_tokens for b, _, _ in outputs if b.num_targets),
    )


def _kl_of(outputs: Sequence[Output], kl: KLPenalty | None) -> Tensor | None:
    if kl is None:
        return None
    differences = [
        h.logprob_M.double() - b.reference_logprobs_M for b, h, _ in outputs if b.reference_logprobs_M is not None
    ]
    return kl.value_and_slope(torch.cat(differences))[0]
