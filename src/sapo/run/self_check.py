"""The self-check of a run's first step: are the engine's log-probabilities the trainer's own?

Both are of the same weights, so on policy every ratio r should be 1. Where the engine's are equal to the trainer's they
serve as log pi_old and a forward pass a step is saved; where not, log pi_old is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sapo.config import TrainConfig
from sapo.data import Group
from sapo.errors import NonFiniteError
from sapo.training.logprobs import GroupLogprobs

LARGE_MISMATCH = 0.05
"""Nats that rounding in float32 never makes: what is more is another model."""

CHECKED_GROUPS = 8
"""Number of groups whose log-probabilities are compared: a few tell as much as all of them."""


@dataclass(frozen=True)
class SelfCheck:
    """The log pi_old that a run uses, and the figures that decided it.

    >>> check = SelfCheck("trainer", equal=False, cut=False, log_ratio_max_abs=0.02, ratio_abs_dev=0.001, tokens=512)
    >>> check.warning is None, check.to_json()["log_ratio/max_abs"]
    (True, 0.02)
    """

    old_logprobs: Literal["engine", "trainer", "current"]
    equal: bool
    """The engine's may be taken as the trainer's."""
    cut: bool
    """The engine's are of another distribution than the policy's, however little the first step happens to show it:
    sampling cuts a tail, or the engine does not give exact log-probabilities."""
    log_ratio_max_abs: float
    """Largest |log r|, in nats."""
    ratio_abs_dev: float
    """Mean |r - 1| over tokens."""
    tokens: int
    """Tokens compared."""
    rounded: bool = False
    """Sampling is, or will be, from rounded weights: the engine's are of another policy than the trainer's."""

    @property
    def warning(self) -> str | None:
        """Return a warning where the recipe insists on log-probabilities that are not the policy's; None elsewhere."""
        if self.equal or self.old_logprobs != "engine":
            return None
        differs = f"differs from the trainer's by up to {self.log_ratio_max_abs:.3g}"
        why = "is of a cut distribution" if self.cut else "is of rounded weights" if self.rounded else differs
        return f"log pi_old is the engine's although it {why}; train.old_logprobs=auto would recompute it"

    def mismatch(self, dtype: str) -> str | None:
        """Return a warning of an engine that computes another model than the trainer; None where they may agree.

        Args:
            dtype: of the trained weights. In 16 bits rounding alone may be as large.
        """
        comparable = dtype == "float32" and not self.cut and not self.rounded
        if not comparable or self.log_ratio_max_abs <= LARGE_MISMATCH:
            return None
        return (
            f"the engine's log-probabilities differ from the trainer's by up to {self.log_ratio_max_abs:.3g} nats of "
            "the same tokens at the same weights, which is no rounding of float32: one of the two computes another "
            "model, or in a lower precision; what is sampled is not what is trained (`sapo doctor --model` tells how "
            "the local engine decodes the model)"
        )

    def to_json(self) -> dict[str, Any]:
        """Return its line of metrics.jsonl, without kind and step."""
        return {
            "old_logprobs": self.old_logprobs,
            "equal": self.equal,
            "log_ratio/max_abs": self.log_ratio_max_abs,
            "ratio/abs_dev": self.ratio_abs_dev,
            "tokens": self.tokens,
        }


def check_sampled(groups: Sequence[Group]) -> None:
    """Refuse completions of a sampler whose weights are no longer finite, before their figures are taken.

    Raises:
        NonFiniteError: a log-probability of the sampler is not finite.
    """
    for group in groups:
        for completion in group.completions:
            if not np.isfinite(completion.logprobs).all():
                raise NonFiniteError("a log-probability of the sampler is not finite: its weights are ruined")


@dataclass(frozen=True)
class Comparison:
    """How far the engine's log-probabilities are from the trainer's.

    >>> Comparison(log_ratio_max_abs=0.25, ratio_abs_dev=0.01, tokens=512, engine=-1.5, trainer=-1.25).tokens
    512
    """

    log_ratio_max_abs: float
    """Largest |log r|, in nats."""
    ratio_abs_dev: float
    """Mean |r - 1| over tokens."""
    tokens: int
    """Tokens compared."""
    engine: float
    """Log-probability by the engine of the token that they differ most about."""
    trainer: float
    """The trainer's of the same token."""


def compare_logprobs(logprobs: GroupLogprobs, groups: Sequence[Group]) -> Comparison:
    """Hold the engine's log-probabilities of a few groups against the trainer's, at the weights that sampled.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    checked = [g for g in groups if any(map(len, g.completions))][:CHECKED_GROUPS]
    theirs = np.concatenate([c.logprobs for g in checked for c in g.completions], dtype=np.float64)
    ours = np.concatenate([part for per_group in logprobs.compute(checked) for part in per_group], dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of two infinities
        difference = ours - theirs
    if len(wrong := np.flatnonzero(~np.isfinite(difference))):
        raise NonFiniteError(
            f"a log-probability is not finite in the self-check: {theirs[wrong[0]]} by the engine, {ours[wrong[0]]} by "
            "the trainer"
        )
    worst, count = int(np.abs(difference).argmax()), len(difference)
    # One after the other by the C library: numpy adds in another order, and its expm1 is another on each processor.
    total = 0.0
    for moved in np.minimum(20.0, difference).tolist():
        total += abs(math.expm1(moved))
    largest = float(abs(difference[worst]))
    return Comparison(largest, total / count, count, float(theirs[worst]), float(ours[worst]))


def check_old_logprobs(
    logprobs: GroupLogprobs,
    groups: Sequence[Group],
    settings: TrainConfig,
    full_distribution: bool,
    *,
    old_logprobs: Literal["auto", "engine", "trainer", "current"] | None = None,
    rounded: bool = False,
    both: bool = False,
) -> SelfCheck:
    """Hold the engine's log-probabilities against the trainer's at the same weights; say which are used.

    Args:
        logprobs: of the trainer, at the weights that sampled.
        groups: of a rollout batch.
        settings: `old_logprobs` and `self_check_tolerance` are used.
        full_distribution: the engine samples without cutting a tail.
        old_logprobs: in place of `settings.old_logprobs`; None leaves that in force.
        rounded: it samples from rounded weights at some step of the run.
        both: the run needs the trainer's beside the engine's, equal or not.

    Raises:
        NonFiniteError: a log-probability is not finite.
    """
    seen = compare_logprobs(logprobs, groups)
    equal = seen.log_ratio_max_abs <= settings.self_check_tolerance and full_distribution and not rounded
    chosen = old_logprobs or settings.old_logprobs
    if chosen == "auto":
        chosen = "engine" if equal and not both else "trainer"
    cut = not full_distribution
    return SelfCheck(chosen, equal, cut, seen.log_ratio_max_abs, seen.ratio_abs_dev, seen.tokens, rounded)
