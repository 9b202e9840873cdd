"""Forward passes of training: packed tokens to a loss, or to log-probabilities.

Each is one `policy.run`: hidden states, head and loss within it. Whoever needs a head of another kind (the cold start,
`sapo diagnose`) calls `response_states` within a `policy.run` of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.model.attention import TreeLayout, gather_rows
from sapo.model.head import HeadOutput, LossAndCoefficient, policy_head, token_logprobs
from sapo.model.policy import Policy
from sapo.objectives import KLPenalty, Surrogate
from sapo.training.mismatch_correction import correct, mismatch_weights
from sapo.training.settings import TrainerSettings
from sapo.utils.spans import span


def loss_and_surrogate(
    policy: Policy, batch: PackedBatch, settings: TrainerSettings
) -> tuple[Tensor, HeadOutput, Surrogate]:
    """Return the loss of a batch with its graph, what the head measured, and what the objective made of each token.

    The loss stands beside the head's output, and not only in it, since sharding looks for the outputs of a forward in
    tuples and not in dataclasses.
    """

    def work() -> tuple[Tensor, HeadOutput, Surrogate]:
        with span("forward"):
            hidden_MH = response_states(policy, batch)
        with span("head"):
            head, surrogate = _surrogate_head(policy, hidden_MH, batch, settings)
        return head.loss, head, surrogate

    return policy.run(work)


@torch.no_grad()
def response_logprobs(policy: Policy, batch: PackedBatch, temperature: float) -> Tensor:
    """Return (M,) log pi of the response tokens, float32 (float64 for a float64 model)."""
    return policy.run(lambda: _token_logprobs(policy, response_states(policy, batch), batch, temperature))


def response_states(policy: Policy, batch: PackedBatch) -> Tensor:
    """Return (M, H) last hidden states that predict the response tokens. Called within `policy.run`."""
    layout = TreeLayout(batch.segments, policy.device)
    hidden_NH = policy.hidden(batch.token_ids_N, batch.position_ids_N, layout)
    return gather_rows(hidden_NH, batch.predictor_M)


def _surrogate_head(
    policy: Policy, hidden_MH: Tensor, batch: PackedBatch, settings: TrainerSettings
) -> tuple[HeadOutput, Surrogate]:
    objective = settings.objective
    if not batch.num_targets:  # what a rank passes over while others have more micro-batches
        nothing = hidden_MH.new_zeros(0, dtype=torch.float64)
        head = _head(policy, hidden_MH, batch, settings, lambda logprob, at: (nothing.sum(), nothing))
        return head, Surrogate(nothing, nothing, nothing)
    advantage_M = batch.advantages_B[batch.sequence_M]
    tis_M = None if settings.tis is None else mismatch_weights(settings.tis, batch).weight_M
    loss_of = _weighted_loss(batch, settings.kl)
    parts: list[Surrogate] = []

    def per_token(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        log_ratio = logprob.double() - batch.old_logprobs_M[at]
        surrogate = objective.surrogate(
            log_ratio, advantage_M[at], batch.sequence_M[at], batch.num_sequences, batch.old_logprobs_M[at]
        )
        parts.append(surrogate)
        if tis_M is not None:
            return loss_of(logprob, at, tis_M[at] * surrogate.value_M, tis_M[at] * surrogate.slope_M)
        return loss_of(logprob, at, surrogate.value_M, surrogate.slope_M)

    if objective.coupled:  # a token's slope needs the whole sequence: a first pass for log pi
        logprob_M = _token_logprobs(policy, hidden_MH.detach(), batch, settings.temperature)
        log_ratio_M = logprob_M.double() - batch.old_logprobs_M
        whole, value_M, slope_M = correct(objective, log_ratio_M, advantage_M, batch, tis_M)
        head = _head(policy, hidden_MH, batch, settings, lambda lp, at: loss_of(lp, at, value_M[at], slope_M[at]))
        return head, whole
    head = _head(policy, hidden_MH, batch, settings, per_token)
    joined = Surrogate(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value_M", "slope_M", "weight_M")))
    return head, joined


def _weighted_loss(
    batch: PackedBatch, kl: KLPenalty | None
) -> Callable[[Tensor, slice, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the function from value and slope of some tokens to their part of the loss and its slope."""
    weight_M = batch.weights_B[batch.sequence_M]

    def loss_of(logprob: Tensor, at: slice, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        if kl is not None:
            assert batch.reference_logprobs_M is not None, "reference log-probabilities come before the update"
            penalty, pull = kl.value_and_slope(logprob.double() - batch.reference_logprobs_M[at])
            value, slope = value - kl.coefficient * penalty, slope - kl.coefficient * pull
        return -(weight_M[at] * value).sum(), -weight_M[at] * slope

    return loss_of


def _head(
    policy: Policy,
    hidden_MH: Tensor,
    batch: PackedBatch,
    settings: TrainerSettings,
    loss_and_coefficient: LossAndCoefficient,
) -> HeadOutput:
    return policy_head(
        hidden_MH,
        policy.head_weight,
        batch.target_M,
        loss_and_coefficient,
        bias_V=policy.head_bias,
        temperature=settings.temperature,
        softcap=policy.logit_softcap,
        entropy=settings.entropy,
    )


def _token_logprobs(policy: Policy, hidden_MH: Tensor, batch: PackedBatch, temperature: float) -> Tensor:
    return token_logprobs(
        hidden_MH,
        policy.head_weight,
        batch.target_M,
        bias_V=policy.head_bias,
        temperature=temperature,
        softcap=policy.logit_softcap,
    )
