"""The effect of a sampler of another precision on training from a checkpoint: `sapo diagnose`.

Completions are drawn from rounded weights (mu) and scored by the policy's own (pi), at the same step: theta has not
moved, so r = pi / mu is the mismatch alone. Where log pi_old is taken from the sampler, a gate mistakes it for drift.

Dose: the mean |r - 1| over tokens, `mismatch/abs_dev` in metrics.jsonl.

Bias force of an objective. Draw the advantages at random, +1 or -1 with probability 1/2 for each response: an unbiased
objective then moves nowhere on average. With c+ and c- the coefficients on grad log pi that the gate leaves
under either sign (c = f'(r) r for token gates; slope = c A), the mean over the advantages is

    B = E[ sum_t w_t 1/2 (c+_t - c-_t) grad log pi(y_t) ],

w_t the weights of the loss (mean over responses of token means) and E over prompts and responses drawn from mu. It
vanishes for a gate that does not depend on the sign of A. It is reported relative to the true policy gradient

    G = E[ sum_t w_t r_t A grad log pi(y_t) ],

A being the real, group-normalised advantages and r the true importance ratio of a token; and by its cosine with the
pull towards the sampler, P = E[ sum_t w_t (1 - r_t) grad log pi(y_t) ]: since E_mu[r grad log pi] = 0 at each position,
that is E_mu[grad log pi] = -grad KL(mu || pi), with a variance that is small where r is near 1.

Both norms are of batch means and hold the batch's noise, which shrinks as completions are added. `force` is the plain
quotient over all completions. `force_unbiased` is of norms without that noise: from K parts of the prompts,
|E x|^2 = (|sum_k x_k|^2 - sum_k |x_k|^2) / (K (K - 1)); it is left out where either estimate is not positive, which
means that the batch does not resolve it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapo.config import RolloutConfig
from sapo.data import Group, PackedBatch
from sapo.errors import ConfigError
from sapo.model.head import LossAndCoefficient, policy_head, token_logprobs
from sapo.model.policy import Policy
from sapo.model.rounding import Rounding, rounded_weights
from sapo.objectives import LOG_RATIO_LIMIT, Factors, Objective, Ratios, TokenObjective
from sapo.objectives.surrogates import bound_log_ratio
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Request
from sapo.rollout.registry import make_engine, require
from sapo.rollout.shaping import advantages_of_scored
from sapo.rollout.weights import loaded
from sapo.tasks import score_groups
from sapo.training.batch import pack
from sapo.training.forward import response_states
from sapo.workflows.evaluate import PlannedEvaluation

PARTS = 8
"""Number of parts of the prompts that the noise is estimated from; fewer where there are fewer prompts."""

HARMLESS, NEARLY_HARMLESS, HARMFUL = 0.001, 0.006, 0.011
"""Doses at which runs on toy models were unharmed, nearly unharmed, and harmed under sharp clips (research/log.md)."""

SMALL_FORCE = 0.1
"""Largest force that is called small: a tenth of the policy gradient is lost in the noise of a batch."""


@dataclass(frozen=True, kw_only=True)
class SymmetricMask(TokenObjective):
    """The control: a mask that does not depend on the sign of A. Slope r A where 0.8 <= r <= 1.27, else 0."""

    name: ClassVar[str] = "symmetric_mask"

    def factors(self, at: Ratios) -> Factors:
        """Mask each token by its ratio."""
        kept = ((at.ratio >= 0.8) & (at.ratio <= 1.27)).double()
        return kept * at.ratio, kept * at.ratio, kept


@dataclass(frozen=True)
class Force:
    """What the mismatch does under one objective.

    >>> Force("sapo", eur=0.999, silenced=0.0, force=0.02).force_unbiased is None
    True
    """

    objective: str
    eur: float
    """Effective update ratio: mean f'(r) over tokens and both signs."""
    silenced: float
    """Share of tokens and signs whose weight is 0."""
    force: float | None = None
    """|B| / |G|; None where every group has zero variance, so that there is no G."""
    force_unbiased: float | None = None
    """The same without the batch's noise; None where the batch does not resolve it."""
    cosine: float | None = None
    """Cosine of B with the pull towards the sampler; None where B is 0."""


@dataclass(frozen=True)
class MismatchDiagnosis:
    """The mismatch of a sampler and its effects.

    >>> MismatchDiagnosis("m", "float8_e4m3fn", "tensor", False, ("add4",), 64, 2000, 0.02, 0.3, 0.25, 0.1).verdict
    'harmful to sharp clips'
    """

    model: str
    sampler_dtype: str
    sampler_scaling: str
    sampler_vectors: bool
    tasks: tuple[str, ...]
    completions: int
    tokens: int
    dose: float
    """Mean |r - 1|."""
    dose_p99: float
    """99th percentile of |r - 1|."""
    reward: float
    """Mean reward of the sampler's completions."""
    gradient_norm: float | None
    """|G|; None where every group has zero variance."""
    forces: tuple[Force, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """Return how the dose compares with those that were tried; see the constants."""
        if self.dose <= HARMLESS:
            return "harmless"
        if self.dose <= NEARLY_HARMLESS:
            return "nearly harmless"
        if self.dose < HARMFUL:
            return "between what was nearly harmless and what was harmful"
        return "harmful to sharp clips"

    @property
    def recommendation(self) -> str:
        """Write one line on what to do."""
        if self.dose <= HARMLESS:
            return "log pi_old may be the sampler's; train.old_logprobs=auto checks it at the first step"
        cure = "take log pi_old from the trainer (train.old_logprobs=trainer)"
        if self.dose <= NEARLY_HARMLESS:
            return f"{cure}: it costs a forward pass a step and rules the mismatch out"
        line = f"{cure} and weigh the mismatch apart (objective.tis={{mode: token, cap: 2.0}})"
        known = {f.objective: f.force for f in self.forces if f.force is not None and f.objective != SYMMETRIC}
        small = [name for name, force in known.items() if force <= SMALL_FORCE]
        large = [name for name, force in known.items() if force > SMALL_FORCE]
        if small:
            line += (
                f"; where only the sampler's log-probabilities exist, {', '.join(small)} would not chase the mismatch "
                f"(bias force at most {SMALL_FORCE})"
            )
        return line + (f"{',' if small else ';'} {', '.join(large)} would" if large else "")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, without what was not measured."""
        forces = [{k: v for k, v in asdict(f).items() if v is not None} for f in self.forces]
        own = {k: v for k, v in self.__dict__.items() if v is not None}
        return {
            **own,
            "tasks": list(self.tasks),
            "forces": forces,
            "verdict": self.verdict,
            "recommendation": self.recommendation,
        }


SYMMETRIC = "symmetric mask"


def diagnose(
    policy: Policy,
    evaluations: Sequence[PlannedEvaluation],
    rounding: Rounding,
    objectives: Mapping[str, Objective],
    *,
    name: str = "",
    tokens_per_microbatch: int = 4096,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MismatchDiagnosis:
    """Draw completions from rounded weights and measure what they would do to each objective.

    Memory: beside the policy, its rounded copy and activations, one gradient for each objective and four more.

    Args:
        policy: left as it was.
        evaluations: the tasks, the problems, and how many samples of each are drawn and how.
        objectives: by the name to show.
        name: how the record names the model.
        on_progress: called with the parts measured, and all of them.

    Raises:
        ConfigError: fewer than 2 problems or samples, a sampler that is greedy, or a verifier that always fails.
    """
    groups = [group for planned in evaluations for group in _draw(policy, planned, rounding)]
    if len(groups) < 2 or min(len(g.completions) for g in groups) < 2:
        raise ConfigError(
            f"a diagnosis needs 2 problems and 2 samples of each; got {len(groups)} and "
            f"{min(len(g.completions) for g in groups)}; raise --problems and --samples"
        )
    rewards = [r for g in groups for r in g.scored_rewards]
    if not rewards:
        first = groups[0].completions[0].score
        raise ConfigError(
            f"a diagnosis needs a completion that was scored; got {first.status.value} on all: {first.detail}; mend "
            "the verifier"
        )
    parts = [groups[i :: min(PARTS, len(groups))] for i in range(min(PARTS, len(groups)))]
    [temperature] = {e.settings.params.temperature for e in evaluations}
    measured = _GradientSums(policy, {**objectives, SYMMETRIC: SymmetricMask()}, temperature)
    for done, part in enumerate(parts):
        on_progress(done, len(parts))
        measured.add(part, tokens_per_microbatch)
    on_progress(len(parts), len(parts))
    deviation_M = torch.cat(measured.log_ratios).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1().abs().sort().values
    return MismatchDiagnosis(
        model=name or policy.source,
        sampler_dtype=rounding.dtype,
        sampler_scaling=rounding.scaling if rounding.dtype != "bfloat16" else "none",
        sampler_vectors=rounding.vectors,
        tasks=tuple(e.task.name for e in evaluations),
        completions=sum(len(g.completions) for g in groups),
        tokens=len(deviation_M),
        dose=deviation_M.mean().item(),
        dose_p99=deviation_M[min(len(deviation_M) - 1, int(0.99 * len(deviation_M)))].item(),
        reward=sum(rewards) / len(rewards),
        gradient_norm=measured.norm("true"),
        forces=tuple(measured.force(objective) for objective in measured.objectives),
    )


def _draw(policy: Policy, planned: PlannedEvaluation, rounding: Rounding) -> list[Group]:
    """Draw and score groups of an evaluation's problems from rounded weights."""
    settings = planned.settings
    if settings.params.temperature == 0:
        raise ConfigError("a diagnosis needs a sampler that draws; got temperature 0; give --temperature 1")
    params = replace(settings.params, stop_token_ids=settings.params.stop_token_ids | policy.stop_token_ids)
    prompts = planned.ask(policy)
    require(settings.engine, "exact_logprobs", "a diagnosis", "give --engine local")
    weights = rounded_weights(policy.weights(), rounding)
    with closing(make_engine(policy, RolloutConfig(engine=settings.engine))) as engine, loaded(engine, weights, 0):
        drawn = draw(engine, [Request(p, settings.samples) for p in prompts], params)
    scored = score_groups([(planned.task, p, c) for p, c in zip(prompts, drawn, strict=True)])
    groups = []
    for prompt, completions in zip(prompts, scored, strict=True):
        rewards = [c.score.reward for c in completions]
        advantages = advantages_of_scored(rewards, [c.score.status.failed for c in completions], "group_std")
        groups.append(Group(prompt, tuple(completions), advantages))
    return groups


class _GradientSums:
    """Sums over parts of the gradients of several coefficients on grad log pi, and the norms of each part's."""

    def __init__(self, policy: Policy, objectives: Mapping[str, Any], temperature: float) -> None:
        self.policy = policy
        self.temperature = temperature
        self.objectives = objectives
        self.parts = 0
        self.log_ratios: list[Tensor] = []
        self.weights: dict[str, list[Tensor]] = {name: [] for name in objectives}
        self.sums: dict[str, list[Tensor]] = {}
        self.squares: dict[str, float] = {}  # sum over parts of |x_k|^2

    def add(self, groups: Sequence[Group], tokens_per_microbatch: int) -> None:
        """Add one part."""
        self.parts += 1
        longest = max(len(c) for g in groups for c in g.completions)
        batches = pack(
            groups,
            normalizer="sequence_mean",
            tokens_per_microbatch=tokens_per_microbatch,
            max_new_tokens=longest,
            device=self.policy.device,
            include_all=True,
        ).microbatches
        gradients: dict[str, list[Tensor]] = {}
        for batch in batches:
            self.policy.run(partial(self._add_gradients, batch, gradients))
        for name, gradient in gradients.items():
            self.squares[name] = self.squares.get(name, 0.0) + _dot(gradient, gradient)
            _accumulate(self.sums, name, gradient)

    def _add_gradients(self, batch: PackedBatch, sums: dict[str, list[Tensor]]) -> None:
        for name, gradient in self._gradients(batch):
            _accumulate(sums, name, gradient)

    def _gradients(self, batch: PackedBatch) -> Iterator[tuple[str, list[Tensor]]]:
        """Yield (name, gradient) of every coefficient that is not 0 on all tokens, from one forward pass."""
        hidden_MH = response_states(self.policy, batch)
        coefficients = self._coefficients(batch, self._log_ratio(hidden_MH.detach(), batch))
        weight_M = batch.weights_B[batch.sequence_M]
        parameters = self.policy.parameters()
        for name, coefficient_M in coefficients.items():
            if not coefficient_M.any():
                continue
            head = policy_head(
                hidden_MH,
                self.policy.head_weight,
                batch.target_M,
                _fixed(weight_M * coefficient_M),
                bias_V=self.policy.head_bias,
                temperature=self.temperature,
                softcap=self.policy.logit_softcap,
                unused_K=self.policy.unused_K,
            )
            found = torch.autograd.grad(head.loss, parameters, retain_graph=True, allow_unused=True)
            yield name, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def _log_ratio(self, hidden_MH: Tensor, batch: PackedBatch) -> Tensor:
        logprob_M = token_logprobs(
            hidden_MH,
            self.policy.head_weight,
            batch.target_M,
            bias_V=self.policy.head_bias,
            temperature=self.temperature,
            softcap=self.policy.logit_softcap,
            unused_K=self.policy.unused_K,
        )
        log_ratio_M = logprob_M.double() - batch.old_logprobs_M
        self.log_ratios.append(log_ratio_M.cpu())
        return log_ratio_M

    def _coefficients(self, batch: PackedBatch, log_ratio_M: Tensor) -> dict[str, Tensor]:
        ratio_M = bound_log_ratio(log_ratio_M)[0].exp()
        found = {"pull": 1 - ratio_M, "true": ratio_M * batch.token_advantages_M}
        for name, objective in self.objectives.items():
            plus, minus = (
                objective.surrogate(
                    log_ratio_M,
                    torch.full_like(log_ratio_M, sign),
                    batch.sequence_M,
                    batch.num_sequences,
                    batch.old_logprobs_M,
                )
                for sign in (1.0, -1.0)
            )
            self.weights[name] += [plus.weight_M.cpu(), minus.weight_M.cpu()]
            found[name] = (plus.slope_M + minus.slope_M) / 2  # slope = c A, so that is (c+ - c-) / 2
        return found

    def norm(self, name: str) -> float | None:
        """Return |mean over the parts|; None where the coefficients were 0 everywhere."""
        total = self.sums.get(name)
        return None if total is None else math.sqrt(_dot(total, total)) / self.parts

    def unbiased_square(self, name: str) -> float:
        """Estimate |E x|^2; the estimate may be negative."""
        total, count = self.sums[name], self.parts
        return (_dot(total, total) - self.squares[name]) / (count * (count - 1))

    def force(self, name: str) -> Force:
        """Return what was measured of an objective."""
        weight = torch.cat(self.weights[name])
        plain = Force(name, weight.mean().item(), (weight == 0).double().mean().item())
        gradient_norm, force_norm = self.norm("true"), self.norm(name)
        if gradient_norm is None:
            return plain
        if force_norm is None:
            return Force(name, plain.eur, plain.silenced, 0.0, 0.0)
        squares = self.unbiased_square(name), self.unbiased_square("true")
        unbiased = math.sqrt(squares[0] / squares[1]) if min(squares) > 0 else None
        pull = self.sums["pull"]
        cosine = _dot(self.sums[name], pull) / (force_norm * self.parts * math.sqrt(_dot(pull, pull)))
        return Force(name, plain.eur, plain.silenced, force_norm / gradient_norm, unbiased, cosine)


def _fixed(coefficient_M: Tensor) -> LossAndCoefficient:
    """Return a loss that is linear in log pi; its gradient is the direction of ascent."""
    return lambda logprob, at: ((coefficient_M[at] * logprob).sum(), coefficient_M[at])


def _accumulate(sums: dict[str, list[Tensor]], name: str, gradient: Sequence[Tensor]) -> None:
    present = [g.float() if g.dtype == torch.bfloat16 else g for g in gradient]
    if name in sums:
        for total, part in zip(sums[name], present, strict=True):
            total += part
    else:
        sums[name] = [part.clone() for part in present]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
