"""The parity check of an engine that copies the weights: does it sample with the policy's?

An engine with a copy of its own can hold other weights than the policy without any error: a layer that a sync left as
it was, an adapter that was not folded in, a cache of older weights. Its log-probabilities of what it has just drawn are
therefore held against the trainer's after the first syncs and every so often, and a run whose engine differs stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sapo.config import RunConfig
from sapo.data import Group, Prompt
from sapo.errors import ParityError
from sapo.model.policy import Policy
from sapo.rollout.collector import Collector
from sapo.run.self_check import CHECKED_GROUPS, Comparison, compare_logprobs
from sapo.training.logprobs import GroupLogprobs

FIRST_BATCHES = 4
"""Batches from the run's first that are all checked: the one at the starting weights, and those of the first three
syncs of weights that an update has changed. Reloading the same weights hides most faults of a sync."""
EVERY = 10
"""Batches between two checks after that, where the recipe does not say."""
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1


def prompts_to_check(prompts: Sequence[Prompt]) -> list[int]:
    """Return which prompts of a batch are looked at: the first, half of them with pictures where there are as many.

    >>> prompts_to_check([Prompt(id=i, task="t", text="") for i in range(20)])
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    pictured = [i for i, prompt in enumerate(prompts) if prompt.pictures][: CHECKED_GROUPS // 2]
    others = [i for i in range(len(prompts)) if i not in pictured]
    return sorted(pictured + others[: CHECKED_GROUPS - len(pictured)])


class ParityCheck:
    """The parity checks of one run.

    Args:
        config: `rollout.parity_every`, `rollout.parity_tolerance` and what decides how the engine samples are used.
        collector: draws anew where the batch's own log-probabilities are of another distribution than the policy's.
        directory: of the run, for the message.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, collector: Collector, logprobs: GroupLogprobs, directory: Path
    ) -> None:
        rollout, copies = config.rollout, collector.engine.capabilities.copies_weights
        self._config = config
        self._policy = policy
        self.ahead = rollout.staleness > 0 or rollout.schedule == "free"
        """A batch may be drawn while its weights are left behind, so completions of its first prompts are drawn for
        the check, and compared, before that."""
        self._collector = collector
        self._logprobs = logprobs
        self._directory = directory
        self._every = (EVERY if copies else 0) if rollout.parity_every is None else rollout.parity_every
        # Under staleness, batches are drawn ahead of the first update.
        self._first = FIRST_BATCHES + -(-rollout.staleness // config.train.minibatches)
        self._by_token = policy.dtype not in (torch.bfloat16, torch.float16)
        self._tolerance = rollout.parity_tolerance or (TOLERANCE if self._by_token else TOLERANCE_16_BITS)

    def due(self, batch: int) -> bool:
        """Return whether a batch (0, 1, ...) is checked."""
        return self._every > 0 and (batch < self._first or batch % self._every == 0)

    def check(self, groups: Sequence[Group], step: int, version: int) -> dict[str, float]:
        """Compare a few groups of a batch that was just drawn; return the figures for metrics.jsonl.

        Where these were not drawn from the policy as it is, others of the same prompts are compared.

        Args:
            step: 0, 1, ...
            version: updates made by the weights that drew them.

        Raises:
            ParityError: the engine differs by more than the tolerance.
        """
        rounded = self._config.experiments.sampler_dtype_at(step) is not None
        if self._collector.params.full_distribution and not rounded:
            return self._compare([groups[i] for i in prompts_to_check([group.prompt for group in groups])], step)
        return self.check_prompts([group.prompt for group in groups], step, version)

    def check_prompts(self, prompts: Sequence[Prompt], step: int, version: int) -> dict[str, float]:
        """Draw completions of a few encoded prompts and compare these; see `check`."""
        few = [prompts[i] for i in prompts_to_check(prompts)]
        return self._compare(self._collector.probe(few, self._policy.weights(), version), step)

    def _compare(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        found = compare_logprobs(self._logprobs, groups)
        worst = found.log_ratio_max_abs if self._by_token else found.ratio_abs_dev
        if not worst <= self._tolerance:
            raise ParityError(self._message(found, step))
        return {
            "log_ratio/max_abs": found.log_ratio_max_abs,
            "ratio/abs_dev": found.ratio_abs_dev,
            "tokens": found.tokens,
        }

    def _message(self, found: Comparison, step: int) -> str:
        name, what = self._config.rollout.engine, "largest |log r|" if self._by_token else "mean |r - 1|"
        return (
            f"step {step + 1}: the engine does not sample with the policy's weights: of the token they differ most "
            f"about, log-probability {found.engine:.4f} by rollout.engine={name} and {found.trainer:.4f} by the "
            f"trainer (|log r| {found.log_ratio_max_abs:.2g}, mean |r - 1| {found.ratio_abs_dev:.2g} over "
            f"{found.tokens} tokens; rollout.parity_tolerance allows {self._tolerance:g} of {what}); look at how the "
            f"weights of this model reach the engine (docs/engines.md), then `sapo resume {self._directory}`, or start "
            "again with rollout.engine=local"
        )
