"""The reference policy in an update: its pull, under one normalizer, and nothing of it where nothing is trained."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sapo.data import Group
from sapo.diagnostics import update_metrics
from sapo.errors import NonFiniteError
from sapo.model.policy import Policy
from sapo.objectives import KLPenalty
from support.plain_models import plain_copy
from support.trainer_cases import (
    assert_same,
    make_groups,
    make_policy,
    make_trainer,
    packed_gradient,
    plain_gradient,
)


def with_reference(groups: list[Group], seed: int = 5) -> list[Group]:
    """The groups with made-up log pi_ref, far enough from a fresh model's to pull."""
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(
            g,
            completions=tuple(
                replace(c, reference_logprobs=tuple((-2.5 + 0.5 * torch.randn(len(c), generator=generator)).tolist()))
                for c in g.completions
            ),
        )
        for g in groups
    ]


def plain_kl_gradient(policy: Policy, groups: list[Group], estimator: str, coefficient: float) -> dict:
    """coefficient x mean over sequences of token means of k2 or k3, by autograd through transformers' own forward."""
    model = plain_copy(policy.model)
    rows = [(g.prompt, c) for g in groups for c in g.completions]
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0]
        start = len(prompt.token_ids) - 1
        logp = torch.log_softmax(logits[start:-1], -1).gather(1, ids[0, start + 1 :, None])[:, 0]
        d = logp - torch.tensor(completion.reference_logprobs).float().double()
        total = total + (d.square() / 2 if estimator == "k2" else torch.exp(-d) - 1 + d).mean() / len(rows)
    (coefficient * total).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("tokens_per_microbatch", [10_000, 15])
@pytest.mark.parametrize("objective", ["sapo", "gspo"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_penalty_adds_its_own_gradient_under_the_same_normalizer(
    estimator: str, objective: str, tokens_per_microbatch: int
) -> None:
    policy, groups = make_policy(), with_reference(make_groups())
    penalty = KLPenalty(coefficient=0.3, estimator=estimator)
    trainer = make_trainer(policy, objective, kl=penalty, tokens_per_microbatch=tokens_per_microbatch)
    together = packed_gradient(trainer, groups)
    alone = plain_gradient(policy, groups, objective, "sequence_mean")
    pull = plain_kl_gradient(policy, groups, estimator, 0.3)
    assert max(p.abs().max() for p in pull.values()) > 1e-3
    assert_same(together, {n: alone[n] + pull[n] for n in alone})


def test_a_group_without_spread_still_feels_the_reference() -> None:
    policy, groups = make_policy(), with_reference(make_groups())
    flat = [g for g in groups if g.zero_variance]
    assert flat
    assert not make_trainer(policy).pack(flat).microbatches
    trainer = make_trainer(policy, kl=KLPenalty(coefficient=0.3, estimator="k2"))
    assert_same(packed_gradient(trainer, flat), plain_kl_gradient(policy, flat, "k2", 0.3))


def test_reference_logprobs_are_those_of_the_reference_policy() -> None:
    policy, reference, groups = make_policy(seed=1), make_policy(seed=2), make_groups()
    trainer = make_trainer(policy, kl=KLPenalty(coefficient=0.1), reference=reference)
    found = trainer.groups.attach_reference(groups)
    expected = make_trainer(reference).groups.compute(groups)
    for group, per_group in zip(found, expected, strict=True):
        for completion, logprobs in zip(group.completions, per_group, strict=True):
            assert np.array_equal(completion.reference_logprobs, logprobs)
    result = trainer.update(trainer.pack(found), 1e-9)
    d = torch.cat([torch.tensor(p) for per_group in trainer.groups.compute(groups) for p in per_group]).double()
    d -= torch.cat([torch.tensor(p) for per_group in expected for p in per_group])
    assert result.kl_M is not None
    assert result.kl_M.mean().item() == pytest.approx((torch.exp(-d) - 1 + d).mean().item(), rel=1e-4)


def masked(group: Group, *which: bool) -> Group:
    return replace(group, masked=which)


def test_the_reference_does_not_pull_on_masked_completions() -> None:
    policy, groups = make_policy(), with_reference(make_groups())
    penalty = KLPenalty(coefficient=0.3, estimator="k2")
    trainer = make_trainer(policy, kl=penalty)
    some = [masked(groups[0], True, False, False), *groups[1:]]
    counted = trainer.pack(some).num_targets
    assert counted == sum(len(c) for g in groups for c in g.completions) - len(groups[0].completions[0])
    everything = [masked(g, True, True, True) for g in groups]
    assert trainer.update(trainer.pack(everything), 1.0).skipped  # no step, not even one of momentum


def test_figures_of_the_gate_leave_out_what_only_the_penalty_brought_along() -> None:
    groups = with_reference(make_groups())
    with_penalty = make_trainer(make_policy(), kl=KLPenalty(coefficient=1e-12))
    without = make_trainer(make_policy())
    more = update_metrics(with_penalty.update(with_penalty.pack(groups), 1e-9))
    less = update_metrics(without.update(without.pack(groups), 1e-9))
    assert more["tokens/gradient"] > less["tokens/gradient"]
    for name in less:
        if name.startswith(("gate/", "ratio/", "theory/")):
            assert more[name] == pytest.approx(less[name], rel=1e-9), name


def test_a_mini_batch_that_only_the_penalty_moves_has_no_figures_of_a_gate() -> None:
    flat = [g for g in with_reference(make_groups()) if g.zero_variance]
    trainer = make_trainer(make_policy(), kl=KLPenalty(coefficient=0.1))
    figures = update_metrics(trainer.update(trainer.pack(flat), 1e-9))
    assert figures["kl"] > 0
    assert not [name for name in figures if name.startswith(("gate/", "ratio/", "theory/"))]


def test_a_reference_that_is_not_finite_is_named() -> None:
    (first, *rest) = with_reference(make_groups())
    spoilt = replace(first.completions[0], reference_logprobs=(math.nan,) * len(first.completions[0]))
    groups = [replace(first, completions=(spoilt, *first.completions[1:])), *rest]
    trainer = make_trainer(make_policy(), kl=KLPenalty(coefficient=0.1))
    with pytest.raises(NonFiniteError, match="log pi_ref is not finite"):
        trainer.update(trainer.pack(groups), 1e-3)
