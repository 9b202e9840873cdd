"""Log-probabilities of groups by the forward pass that training uses: log pi_old and log pi_ref of their completions.

The driver packs the groups, trainers compute, and what they return is attached to the completions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from sapo.data import Completion, Group
from sapo.training.experts import RecordedExperts, without_experts
from sapo.training.packer import Packer
from sapo.training.ranks import LogprobsOf, Shares, Trainers


@dataclass(frozen=True)
class GroupLogprobs:
    """Computes log-probabilities of groups and attaches them to their completions."""

    trainers: Trainers
    packer: Packer
    reference: LogprobsOf = "reference"
    """What log pi_ref is of: "reference", or "adapter_off" where only an adapter is trained."""

    def compute(self, groups: Sequence[Group], include_all: bool = True) -> list[list[np.ndarray]]:
        """Return log pi of every completion at the present weights, group by group.

        Experts that the groups carry are replayed. Zero-variance groups are left out (empty arrays) unless
        `include_all`.
        """
        return _by_completion(groups, *self._run(groups, "policy", include_all))

    def attach_old(self, groups: Sequence[Group], sampled_at: int | None, record: bool = False) -> list[Group]:
        """Return the groups with log pi_old computed by the trainer, at the weights that sampled them.

        Args:
            sampled_at: `Trainers.updates` when they were sampled. None for the present weights, whichever sampled: r is
                then 1 by construction at the first update, and the trust region is around it and not around the
                sampler.
            record: keep the experts this forward goes through (R2) in place of any the groups carry.
        """
        updates = self.trainers.updates
        assert sampled_at in (None, updates), f"sampled at update {sampled_at}, weights are at {updates}"
        experts = RecordedExperts() if record else None
        computed = self._run(without_experts(groups) if record else groups, "policy", False, experts)
        if experts is not None:
            groups = experts.attach(groups)
        found = _by_completion(groups, *computed)
        return _with_logprobs(groups, found, lambda c, logprobs: replace(c, old_logprobs=logprobs))

    def attach_reference(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with log pi_ref of every token, by the reference's own routing."""
        found = _by_completion(groups, *self._run(without_experts(groups), self.reference, True))
        return _with_logprobs(groups, found, lambda c, logprobs: replace(c, reference_logprobs=logprobs))

    def _run(
        self, groups: Sequence[Group], of: LogprobsOf, include_all: bool, record: RecordedExperts | None = None
    ) -> tuple[Shares, tuple[torch.Tensor, ...]]:
        shares = self.packer.pack(groups, include_all)
        computed = self.trainers.logprobs(shares, of, record is not None)
        if record is not None:
            assert computed.experts is not None, "a record was asked for and the trainers made none"
            for batch, experts_Nlk in zip(shares.microbatches, computed.experts, strict=True):
                record.add(batch, experts_Nlk)
        return shares, computed.of_batch


def _by_completion(groups: Sequence[Group], shares: Shares, of_batch: Sequence[torch.Tensor]) -> list[list[np.ndarray]]:
    """Return the log-probabilities of packed tokens completion by completion, empty where one was not packed."""
    found: dict[int, np.ndarray] = {}
    for batch, logprob_M in zip(shares.microbatches, of_batch, strict=True):
        if not batch.num_sequences:
            continue
        values_M = logprob_M.numpy()
        values_M.flags.writeable = False  # completions keep views: those of a micro-batch live equally long
        ends = torch.bincount(batch.sequence_M, minlength=batch.num_sequences).cumsum(0).tolist()
        found |= zip(batch.sequence_ids, np.split(values_M, ends[:-1]), strict=True)
    flat = iter(range(sum(len(g.completions) for g in groups)))
    nothing = np.zeros(0, np.float32)
    return [[found.get(next(flat), nothing) for _ in g.completions] for g in groups]


def _with_logprobs(
    groups: Sequence[Group],
    found: list[list[np.ndarray]],
    put: Callable[[Completion, np.ndarray], Completion],
) -> list[Group]:
    """Return the groups with one more set of log-probabilities at each completion."""
    return [
        replace(g, completions=tuple(put(c, logprobs) for c, logprobs in zip(g.completions, per_group, strict=True)))
        for g, per_group in zip(groups, found, strict=True)
    ]
