"""The update: one mini-batch of packed groups to one step of the optimiser.

`update` is the whole method on one screen: hidden states of a shared-prefix micro-batch, the policy head with the
objective's closed-form slope, gradients summed over micro-batches, one clipped AdamW step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sapo.data import Completion, Group, PackedBatch
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.adapters import adapter_off
from sapo.model.attention import TreeLayout, gather_rows
from sapo.model.head import HeadOutput, LossAndCoefficient, policy_head, token_logprobs
from sapo.model.policy import Policy
from sapo.model.routing import Replay, Routers
from sapo.objectives import TIS, KLPenalty, MismatchWeights, Objective, Surrogate
from sapo.training.batch import MiniBatch, pack
from sapo.training.experts import RecordedExperts, without_experts
from sapo.training.mismatch import correct, join_mismatch, mismatch_weights
from sapo.training.optimizer import PolicyOptimizer
from sapo.utils.spans import span


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


class Trainer:
    """Updates a policy by an objective.

    Args:
        policy: changed in place.
        objective: see `sapo.objectives.make_objective`.
        optimizer: over the policy's parameters.
        temperature: the sampling temperature; the policy in the loss is the one that was sampled.
        normalizer, tokens_per_microbatch, max_new_tokens: see `batch.pack`.
        activation_checkpointing: recompute each block in the backward pass.
        entropy: measure the entropy at each token.
        kl: penalty for leaving the reference policy, whose log-probabilities the groups then carry.
        routers: the policy's, for routing replay: groups that carry recorded experts are run through these. None
            without it.
        tis: correction of the policy term for a sampler that is not the policy; the groups then carry log pi_old
            beside the sampler's own. A KL penalty is not weighted by it.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: PolicyOptimizer,
        *,
        temperature: float,
        normalizer: str,
        tokens_per_microbatch: int,
        max_new_tokens: int,
        activation_checkpointing: bool = False,
        entropy: bool = True,
        kl: KLPenalty | None = None,
        routers: Routers | None = None,
        tis: TIS | None = None,
    ) -> None:
        self.policy = policy
        self.objective = objective
        self.optimizer = optimizer
        self.temperature = temperature
        self.normalizer = normalizer
        self.tokens_per_microbatch = tokens_per_microbatch
        self.max_new_tokens = max_new_tokens
        self.entropy = entropy
        self.kl = kl
        self.routers = routers
        self.tis = tis
        self.updates = 0
        """Updates made: the version of the weights."""
        if activation_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._checkpointing = activation_checkpointing

    def pack(self, groups: Sequence[Group], include_all: bool = False) -> MiniBatch:
        """The groups of one mini-batch, packed as this trainer takes them.

        With a KL penalty groups without spread are among them: there the reference still pulls.
        """
        return pack(
            groups,
            normalizer=self.normalizer,
            tokens_per_microbatch=self.tokens_per_microbatch,
            max_new_tokens=self.max_new_tokens,
            device=self.policy.device,
            include_flat=self.kl is not None,
            include_all=include_all,
        )

    def update(
        self, minibatch: MiniBatch, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> UpdateResult:
        """One step of the optimiser.

        Raises:
            NonFiniteError: naming the cause; weights and optimiser are as before.
            Interrupted: when `should_stop` says so between micro-batches; likewise.
        """
        if not minibatch.microbatches:
            return _nothing_to_learn()
        outputs: list[tuple[PackedBatch, HeadOutput, Surrogate]] = []
        replays: list[Replay | None] = []
        self.policy.model.train(self._checkpointing)  # transformers checkpoints only in training mode; dropout is off
        try:
            for batch in minibatch.microbatches:
                if should_stop():
                    raise Interrupted
                with self.replaying(batch) as replay:
                    head, surrogate = self._forward(batch)
                    with span("backward"):
                        head.loss.backward()
                self.optimizer.collect_gradients()
                outputs.append((batch, head, surrogate))
                replays.append(replay)
            loss = sum(head.loss.item() for _, head, _ in outputs)
            norm = self.optimizer.gradient_norm()
            self._check_finite(loss, norm, outputs)
        except BaseException:
            self.optimizer.zero_grad()
            raise
        finally:
            self.policy.model.eval()
        with span("optimizer"):
            self.optimizer.step(learning_rate, norm)
        self.updates += 1
        log_mismatch_M, tis = join_mismatch(self.tis, [batch for batch, _, _ in outputs])
        result = _collect(loss, norm.item(), outputs, self.kl)
        return replace(result, log_mismatch_M=log_mismatch_M, tis=tis, changed_share=_changed_share(replays))

    @contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[Replay | None]:
        """Within it one forward over a batch, and its backward, go through the experts it carries, if it does."""
        if batch.experts_Nlk is None:
            yield None
            return
        assert self.routers is not None, "the groups carry experts and the trainer was given no routers"
        recomputed = self._checkpointing and self.policy.model.training
        with self.routers.replay(batch.experts_Nlk, recomputed) as replay:
            yield replay

    def _forward(self, batch: PackedBatch) -> tuple[HeadOutput, Surrogate]:
        with span("forward"):
            hidden_MH = self._hidden(batch)
        with span("head"):
            return self._surrogate(hidden_MH, batch)

    def _surrogate(self, hidden_MH: Tensor, batch: PackedBatch) -> tuple[HeadOutput, Surrogate]:
        advantage_M = batch.advantages_B[batch.sequence_M]
        weight_M = batch.weights_B[batch.sequence_M]
        tis_M = None if self.tis is None else mismatch_weights(self.tis, batch).weight_M
        parts: list[Surrogate] = []

        def loss_of(logprob: Tensor, at: slice, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
            if self.kl is not None:
                penalty, pull = self._kl(logprob, batch, at)
                value, slope = value - self.kl.coefficient * penalty, slope - self.kl.coefficient * pull
            return -(weight_M[at] * value).sum(), -weight_M[at] * slope

        def per_token(logprob: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            log_ratio = logprob.double() - batch.old_logprobs_M[at]
            surrogate = self.objective.surrogate(
                log_ratio, advantage_M[at], batch.sequence_M[at], batch.num_sequences, batch.old_logprobs_M[at]
            )
            parts.append(surrogate)
            if tis_M is not None:
                return loss_of(logprob, at, tis_M[at] * surrogate.value_M, tis_M[at] * surrogate.slope_M)
            return loss_of(logprob, at, surrogate.value_M, surrogate.slope_M)

        if self.objective.coupled:  # a token's slope needs the whole sequence: a first pass for log pi
            logprob_M = self._token_logprobs(hidden_MH.detach(), batch)
            log_ratio_M = logprob_M.double() - batch.old_logprobs_M
            whole, value_M, slope_M = correct(self.objective, log_ratio_M, advantage_M, batch, tis_M)
            return self._head(
                hidden_MH, batch, lambda logprob, at: loss_of(logprob, at, value_M[at], slope_M[at])
            ), whole
        head = self._head(hidden_MH, batch, per_token)
        joined = Surrogate(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value_M", "slope_M", "weight_M")))
        return head, joined

    def _kl(self, logprob: Tensor, batch: PackedBatch, at: slice) -> tuple[Tensor, Tensor]:
        assert self.kl is not None
        assert batch.reference_logprobs_M is not None, "with_reference_logprobs comes before the update"
        return self.kl.value_and_slope(logprob.double() - batch.reference_logprobs_M[at])

    def _head(self, hidden_MH: Tensor, batch: PackedBatch, loss_and_coefficient: LossAndCoefficient) -> HeadOutput:
        return policy_head(
            hidden_MH,
            self.policy.head_weight,
            batch.target_M,
            loss_and_coefficient,
            bias_V=self.policy.head_bias,
            temperature=self.temperature,
            softcap=self.policy.logit_softcap,
            entropy=self.entropy,
        )

    def _token_logprobs(self, hidden_MH: Tensor, batch: PackedBatch, policy: Policy | None = None) -> Tensor:
        policy = policy or self.policy
        return token_logprobs(
            hidden_MH,
            policy.head_weight,
            batch.target_M,
            bias_V=policy.head_bias,
            temperature=self.temperature,
            softcap=policy.logit_softcap,
        )

    def _hidden(self, batch: PackedBatch, policy: Policy | None = None) -> Tensor:
        policy = policy or self.policy
        replayed = self.routers is not None and isinstance(self.routers.active, Replay)
        assert replayed == (batch.experts_Nlk is not None), "a batch that carries experts is run within `replaying`"
        layout = TreeLayout(batch.segments, policy.device)
        hidden_NH = policy.hidden(batch.token_ids_N, batch.position_ids_N, layout)
        return gather_rows(hidden_NH, batch.predictor_M)

    @torch.no_grad()
    def logprobs(
        self,
        groups: Sequence[Group],
        include_all: bool = True,
        policy: Policy | None = None,
        record: RecordedExperts | None = None,
    ) -> list[list[np.ndarray]]:
        """log pi of every completion at the present weights, float32, by the forward pass that training uses.

        Zero-variance groups are left out (empty arrays) unless `include_all`. `policy`: another than the trained.
        Experts that the groups carry are replayed; `record` collects those of groups that carry none.
        """
        found: dict[int, np.ndarray] = {}
        for batch in self.pack(groups, include_all).microbatches:
            with self.replaying(batch), self._recording(batch, record):
                hidden_MH = self._hidden(batch, policy)
            logprob_M = self._token_logprobs(hidden_MH, batch, policy).float().cpu().numpy()
            logprob_M.flags.writeable = False  # completions keep views: those of a micro-batch live equally long
            ends = torch.bincount(batch.sequence_M, minlength=batch.num_sequences).cumsum(0).tolist()
            found |= zip(batch.sequence_ids, np.split(logprob_M, ends[:-1]), strict=True)
        flat = iter(range(sum(len(g.completions) for g in groups)))
        nothing = np.zeros(0, np.float32)
        return [[found.get(next(flat), nothing) for _ in g.completions] for g in groups]

    @contextmanager
    def _recording(self, batch: PackedBatch, record: RecordedExperts | None) -> Iterator[None]:
        if record is None:
            yield
            return
        assert self.routers is not None, "a record was asked for and the trainer was given no routers"
        with self.routers.recording() as recording:
            yield
            record.add(batch, recording.take())

    def with_old_logprobs(self, groups: Sequence[Group], sampled_at: int | None, record: bool = False) -> list[Group]:
        """The groups with log pi_old computed by the trainer, at the weights that sampled them.

        Args:
            sampled_at: `updates` when they were sampled. None for the present weights, whichever sampled: r is then 1
                by construction at the first update, and the trust region is around it and not around the sampler.
            record: keep the experts this forward goes through (R2) in place of any the groups carry.
        """
        assert sampled_at in (None, self.updates), f"sampled at update {sampled_at}, weights are at {self.updates}"
        experts = RecordedExperts() if record else None
        found = self.logprobs(without_experts(groups) if record else groups, include_all=False, record=experts)
        groups = groups if experts is None else experts.attach(groups)
        return _with_logprobs(groups, found, lambda c, logprobs: replace(c, old_logprobs=logprobs))

    def with_reference_logprobs(self, groups: Sequence[Group], reference: Policy | None) -> list[Group]:
        """The groups with log pi_ref of every token, by the reference's own routing.

        Args:
            reference: the reference policy; None for the trained one with its adapter switched off.
        """
        with adapter_off(self.policy) if reference is None else nullcontext():
            found = self.logprobs(without_experts(groups), policy=reference)
        return _with_logprobs(groups, found, lambda c, logprobs: replace(c, reference_logprobs=logprobs))

    def _check_finite(
        self, loss: float, norm: Tensor, outputs: list[tuple[PackedBatch, HeadOutput, Surrogate]]
    ) -> None:
        if torch.isfinite(norm) and loss == loss and abs(loss) != float("inf"):
            return
        causes = (
            ("an advantage", lambda b, h, s: b.advantages_B),
            ("log pi_old", lambda b, h, s: b.old_logprobs_M),
            ("log mu", lambda b, h, s: b.old_logprobs_M if self.tis is None else b.sampler_logprobs_M),
            ("log pi_ref", lambda b, h, s: h.logprob_M[:0] if self.kl is None else b.reference_logprobs_M),
            ("log pi of the policy", lambda b, h, s: h.logprob_M),
            ("the objective's value", lambda b, h, s: s.value_M),
            ("the objective's slope", lambda b, h, s: s.slope_M),
        )
        for name, pick in causes:
            if any(not torch.isfinite(pick(*output)).all() for output in outputs):
                raise NonFiniteError(f"{name} is not finite (loss {loss}, gradient norm {norm.item()})")
        parameter = self.optimizer.first_nonfinite_gradient()
        where = f"the gradient of {parameter}" if parameter else "the gradient norm"
        raise NonFiniteError(f"{where} is not finite (loss {loss}, gradient norm {norm.item()})")


def _with_logprobs(
    groups: Sequence[Group],
    found: list[list[np.ndarray]],
    put: Callable[[Completion, np.ndarray], Completion],
) -> list[Group]:
    """The groups with one more set of log-probabilities at each completion."""
    return [
        replace(g, completions=tuple(put(c, logprobs) for c, logprobs in zip(g.completions, per_group, strict=True)))
        for g, per_group in zip(groups, found, strict=True)
    ]


def _collect(
    loss: float, norm: float, outputs: list[tuple[PackedBatch, HeadOutput, Surrogate]], kl: KLPenalty | None
) -> UpdateResult:
    """Join the micro-batches, sequences numbered through."""
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


def _kl_of(outputs: list[tuple[PackedBatch, HeadOutput, Surrogate]], kl: KLPenalty | None) -> Tensor | None:
    if kl is None:
        return None
    differences = [
        h.logprob_M.double() - b.reference_logprobs_M for b, h, _ in outputs if b.reference_logprobs_M is not None
    ]
    return kl.value_and_slope(torch.cat(differences))[0]


def _changed_share(replays: Sequence[Replay | None]) -> float | None:
    made = [r for r in replays if r is not None]
    return sum(r.changed for r in made) / sum(r.choices for r in made) if made else None


def _nothing_to_learn() -> UpdateResult:
    empty = torch.zeros(0, dtype=torch.float64)
    return UpdateResult(0.0, 0.0, empty, empty, empty, empty, empty.long(), (), None, 0, skipped=True)
