"""Forward passes of training: packed tokens to a loss, or to log-probabilities.

Each is one `policy.run`: hidden states, head and loss within it. Whoever needs a head of another kind (the cold start,
`sapo diagnose`) calls `response_states` within a `policy.run` of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.model.attention import TreeLayout
from sapo.model.context import ContextGroup, ContextSlice, own_slice
from sapo.model.gather import gather_rows
from sapo.model.head import HeadOutput, LossAndCoefficient, policy_head, token_logprobs
from sapo.model.policy import Policy
from sapo.objectives import KLPenalty, Surrogate
from sapo.training.mismatch_correction import correct, mismatch_weights
from sapo.training.settings import TrainerSettings
from sapo.utils.spans import span


def loss_and_surrogate(
    policy: Policy, batch: PackedBatch, settings: TrainerSettings, context: ContextGroup | None = None
) -> tuple[Tensor, HeadOutput, Surrogate]:
    """Return the loss of a batch with its graph, what the head measured, and what the objective made of each token.

    The loss stands beside the head's output, and not only in it, since sharding looks for the outputs of a forward in
    tuples and not in dataclasses.

    Args:
        context: the ranks that share the batch. The loss is then of this rank's tokens, all else of the whole batch.
    """
    part = None if context is None else own_slice(batch, context, policy.device)

    def work() -> tuple[Tensor, HeadOutput, Surrogate]:
        with span("forward"):
            hidden_MH = response_states(policy, batch, part)
        with span("head"):
            head, surrogate = _surrogate_head(policy, hidden_MH, batch, settings, part, context)
        return head.loss, head, surrogate

    loss, head, surrogate = policy.run(work)
    if part is None or context is None:
        return loss, head, surrogate
    return loss, *_of_the_whole(head, surrogate, part.at, batch.num_targets, context, settings.objective.coupled)


@torch.no_grad()
def response_logprobs(
    policy: Policy, batch: PackedBatch, temperature: float, context: ContextGroup | None = None
) -> Tensor:
    """Return (M,) log pi of the response tokens, float32 (float64 for a float64 model)."""
    if context is None:
        return policy.run(lambda: _token_logprobs(policy, response_states(policy, batch), batch, temperature))
    part = own_slice(batch, context, policy.device)
    own = policy.run(lambda: _token_logprobs(policy, response_states(policy, batch, part), part.batch, temperature))
    return context.whole(own, part.at, batch.num_targets)


def response_states(policy: Policy, batch: PackedBatch, part: ContextSlice | None = None) -> Tensor:
    """Return (M, H) last hidden states that predict the response tokens. Called within `policy.run`.

    Args:
        part: a rank's slice of the batch, whose response tokens alone are then returned.
    """
    run, layout = (batch, TreeLayout(batch.segments, policy.device)) if part is None else (part.batch, part.layout)
    hidden_NH = policy.hidden(run.token_ids_N, run.position_ids_N, layout, run.pictures)
    return gather_rows(hidden_NH, run.predictor_M)


def _surrogate_head(
    policy: Policy,
    hidden_MH: Tensor,
    batch: PackedBatch,
    settings: TrainerSettings,
    part: ContextSlice | None,
    context: ContextGroup | None,
) -> tuple[HeadOutput, Surrogate]:
    """Return what the head gives of this rank's tokens; a coupled objective's surrogate is of the whole batch."""
    objective = settings.objective
    own = batch if part is None else part.batch
    at = slice(None) if part is None else part.at
    if not batch.num_targets:  # what a rank passes over while others have more micro-batches
        nothing = hidden_MH.new_zeros(0, dtype=torch.float64)
        head = _head(policy, hidden_MH, own, settings, lambda logprob, at: (nothing.sum(), nothing))
        return head, Surrogate(nothing, nothing, nothing)
    advantage_M = batch.token_advantages_M
    tis_M = None if settings.tis is None else mismatch_weights(settings.tis, batch).weight_M
    loss_of = _weighted_loss(own, settings.kl)
    if objective.coupled:  # a token's slope needs the whole sequence: a first pass for log pi
        logprob_M = _token_logprobs(policy, hidden_MH.detach(), own, settings.temperature)
        if part is not None and context is not None:
            logprob_M = context.whole(logprob_M, part.at, batch.num_targets)
        log_ratio_M = logprob_M.double() - batch.old_logprobs_M
        whole, value_M, slope_M = correct(objective, log_ratio_M, advantage_M, batch, tis_M)
        value, slope = value_M[at], slope_M[at]
        head = _head(policy, hidden_MH, own, settings, lambda lp, at: loss_of(lp, at, value[at], slope[at]))
        return head, whole
    advantage, tis = advantage_M[at], None if tis_M is None else tis_M[at]
    nothing = hidden_MH.new_zeros(0, dtype=torch.float64)
    parts = [Surrogate(nothing, nothing, nothing)]

    def per_token(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        log_ratio = logprob.double() - own.old_logprobs_M[at]
        surrogate = objective.surrogate(
            log_ratio, advantage[at], own.sequence_M[at], own.num_sequences, own.old_logprobs_M[at]
        )
        parts.append(surrogate)
        if tis is not None:
            return loss_of(logprob, at, tis[at] * surrogate.value_M, tis[at] * surrogate.slope_M)
        return loss_of(logprob, at, surrogate.value_M, surrogate.slope_M)

    head = _head(policy, hidden_MH, own, settings, per_token)
    joined = Surrogate(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value_M", "slope_M", "weight_M")))
    return head, joined


def _of_the_whole(
    head: HeadOutput, surrogate: Surrogate, at: Tensor, length: int, context: ContextGroup, coupled: bool
) -> tuple[HeadOutput, Surrogate]:
    """Gather what the ranks of a context group measured of their tokens."""
    entropy_M = None if head.entropy_M is None else context.whole(head.entropy_M, at, length)
    gathered = HeadOutput(head.loss, context.whole(head.logprob_M, at, length), entropy_M)
    if coupled or not length:
        return gathered, surrogate
    parts = (surrogate.value_M, surrogate.slope_M, surrogate.weight_M)
    return gathered, Surrogate(*(context.whole(x.double(), at, length) for x in parts))


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
        unused_K=policy.unused_K,
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
        unused_K=policy.unused_K,
    )
