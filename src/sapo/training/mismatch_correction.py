"""The correction for a sampler that is not the policy, on packed batches: weights of tokens beside the gate.

The weight of a token multiplies its value, so the loss is -(weights_B[sequence_M] * tis_M * value_M).sum(). Where each
token has a gate of its own its slope is multiplied likewise. An objective that couples the tokens of a sequence gives
slopes for weights that are constant within it (sapo.objectives.surrogates); with others the derivative is taken by
autograd of the values in the M log-ratios, which is exact and costs nothing beside the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.objectives import TIS, MismatchWeights, Objective, Surrogate


def mismatch_weights(tis: TIS, batch: PackedBatch) -> MismatchWeights:
    """Compute the weight of each response token of a micro-batch that carries both log-probabilities."""
    return tis.weigh(log_mismatch(batch), batch.sequence_M, batch.num_sequences)


def log_mismatch(batch: PackedBatch) -> Tensor:
    """Compute log pi_old - log mu of each response token: (M,), float64."""
    assert batch.sampler_logprobs_M is not None, "log pi_old by the trainer comes before a correction for the sampler"
    return batch.old_logprobs_M.double() - batch.sampler_logprobs_M


def correct(
    objective: Objective, log_ratio_M: Tensor, advantage_M: Tensor, batch: PackedBatch, tis_M: Tensor | None
) -> tuple[Surrogate, Tensor, Tensor]:
    """Compute an objective's surrogate over whole sequences, and value and slope of each token with the correction.

    Args:
        log_ratio_M: of all tokens of the micro-batch, float64.
        advantage_M: of each token.
        tis_M: weight of each token; None for no correction.
    """

    def surrogate(log_ratio_M: Tensor) -> Surrogate:
        return objective.surrogate(
            log_ratio_M, advantage_M, batch.sequence_M, batch.num_sequences, batch.old_logprobs_M
        )

    if tis_M is None:
        plain = surrogate(log_ratio_M)
        return plain, plain.value_M, plain.slope_M
    with torch.enable_grad():
        leaf_M = log_ratio_M.detach().requires_grad_()
        whole = surrogate(leaf_M)
        (slope_M,) = torch.autograd.grad((tis_M * whole.value_M).sum(), leaf_M)
    value_M = whole.value_M.detach()
    return Surrogate(value_M, whole.slope_M, whole.weight_M), tis_M * value_M, slope_M


def join_mismatch(tis: TIS | None, batches: Sequence[PackedBatch]) -> tuple[Tensor | None, MismatchWeights | None]:
    """Join log pi_old - log mu and the correction over the micro-batches of an update.

    The first is None where log mu is log pi_old, the second where there is no correction.
    """
    if any(b.sampler_logprobs_M is None for b in batches):
        return None, None
    log_mismatch_M = torch.cat([log_mismatch(b) for b in batches])
    if tis is None:
        return log_mismatch_M, None
    parts = [mismatch_weights(tis, b) for b in batches]
    joined = (torch.cat([getattr(p, f) for p in parts]) for f in ("weight_M", "clipped_M"))
    return log_mismatch_M, MismatchWeights(*joined)
