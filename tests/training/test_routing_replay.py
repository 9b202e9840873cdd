"""Routing replay in the update: records stand beside their tokens whatever the packing; R2 and R3 record the routes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sapo.data import Completion, Group, Prompt, RoutedExperts, Score
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.model.policy import Policy
from sapo.model.routing import Routers, routed_experts
from sapo.objectives import OBJECTIVES, KLPenalty, group_advantages
from sapo.rollout.engine import Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.training.batch import split_minibatches
from sapo.training.experts import without_experts
from sapo.training.forward import loss_and_surrogate
from support import trainer_cases
from support.moe_cases import EXPERTS, LAYERS, PER_TOKEN, ByHand, make_moe, perturb
from support.trainer_cases import MAX_NEW_TOKENS, DrivenTrainer

PREAMBLE = tuple(range(16)) + (3, 1)


def make_trainer(policy: Policy, objective: str = "grpo", **options: Any) -> DrivenTrainer:
    return trainer_cases.make_trainer(policy, objective, **{"routers": Routers(policy), **options})


def random_record(generator: np.random.Generator, tokens: int) -> RoutedExperts:
    experts = generator.random((tokens, LAYERS, EXPERTS)).argsort(-1)[..., :PER_TOKEN]
    return routed_experts(experts.astype(np.uint8))


def make_groups(count: int = 4, samples: int = 3, preamble: tuple[int, ...] = (), experts: bool = True) -> list[Group]:
    """Groups of completions of unequal length, of one token too, the second group flat, with experts of no router."""
    generator = np.random.default_rng(0)
    shared = random_record(generator, len(preamble))
    groups = []
    for i in range(count):
        prompt = Prompt(i, "random", "", preamble + tuple(generator.integers(0, 17, 3 + 2 * i).tolist()))
        own = random_record(generator, 3 + 2 * i)
        completions = []
        for j in range(samples):
            length = 1 if (i, j) == (2, 1) else int(generator.integers(1, MAX_NEW_TOKENS + 1))
            reward = 1.0 if i == 1 else float((i + j) % 2)
            completions.append(
                Completion(
                    tuple(generator.integers(0, 18, length).tolist()),
                    tuple((-2.9 + 0.4 * generator.standard_normal(length)).tolist()),
                    "stop",
                    score=Score(reward),
                    experts=random_record(generator, length - 1),
                )
            )
        advantages = group_advantages(torch.tensor([c.score.reward for c in completions], dtype=torch.float64))
        joined = replace(shared, indices=shared.indices + own.indices)
        groups.append(Group(prompt, tuple(completions), tuple(advantages.tolist()), prompt_experts=joined))
    return groups if experts else without_experts(groups)


def experts_of(group: Group, sample: int) -> list:
    """By token, layer and place, of the inputs of one sequence."""
    completion = group.completions[sample]
    assert group.prompt_experts is not None
    assert completion.experts is not None
    flat = group.prompt_experts.indices + completion.experts.indices
    return np.frombuffer(flat, dtype=np.uint8).reshape(-1, LAYERS, PER_TOKEN).tolist()


def logprobs_by_hand(policy: Policy, groups: list[Group]) -> list[Tensor]:
    by_hand = ByHand(policy, "qwen3_moe")
    return [
        by_hand.logprobs([*g.prompt.token_ids, *c.token_ids], experts_of(g, j))[-len(c) :]
        for g in groups
        for j, c in enumerate(g.completions)
    ]


def packed_gradient(trainer: DrivenTrainer, groups: list[Group]) -> dict[str, Tensor]:
    for batch in trainer.pack(groups).microbatches:
        with trainer.replaying(batch):
            loss_and_surrogate(trainer.policy, batch, trainer.settings)[0].backward()
    gradient = {n: p.grad.clone() for n, p in trainer.policy.model.named_parameters() if p.grad is not None}
    trainer.policy.model.zero_grad()
    return gradient


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Equal up to the float32 in which transformers computes norms, rotations and routing."""
    assert left.keys() == right.keys()
    scale = max(g.abs().max().item() for g in right.values())
    assert scale > 0
    for name, gradient in right.items():
        torch.testing.assert_close(
            left[name], gradient, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tokens", [10_000, 40, 17, 1])
@pytest.mark.parametrize("preamble", [(), PREAMBLE], ids=["", "preamble"])
@torch.no_grad()
def test_every_token_goes_through_its_own_record_however_it_is_packed(preamble: tuple, tokens: int) -> None:
    policy, groups = make_moe(dtype=torch.float64), make_groups(preamble=preamble)
    trainer = make_trainer(policy, tokens_per_microbatch=tokens)
    expected = logprobs_by_hand(policy, groups)
    got = [torch.tensor(logp) for per_group in trainer.groups.compute(groups) for logp in per_group]
    free = [torch.tensor(logp) for per_group in trainer.groups.compute(without_experts(groups)) for logp in per_group]
    assert any((a - b).abs().max() > 0.1 for a, b in zip(got, free, strict=True)), "the records change nothing here"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs_with_replay_and_splits_without_a_trace(objective: str) -> None:
    policy, groups = make_moe(dtype=torch.float64), make_groups()
    whole = packed_gradient(make_trainer(policy, objective), groups)
    split = make_trainer(policy, objective, tokens_per_microbatch=17)
    assert len(split.pack(groups).microbatches) > 2
    assert_same(packed_gradient(split, groups), whole)
    result = split.update(split.pack(groups), learning_rate=1e-3)
    assert result.changed_share is not None
    assert 0 < result.changed_share < 1
    free = packed_gradient(make_trainer(make_moe(dtype=torch.float64), objective), without_experts(groups))
    assert any((free[n] - g).abs().max() > 0.01 * g.abs().max() for n, g in whole.items()), "replay changes nothing"


def test_activation_checkpointing_leaves_the_update_with_replay_unchanged() -> None:
    updated = []
    for checkpointing in (False, True):
        policy = make_moe()
        trainer = make_trainer(policy, activation_checkpointing=checkpointing, tokens_per_microbatch=40)
        result = trainer.update(trainer.pack(make_groups()), learning_rate=1e-2)
        updated.append((result.loss, result.changed_share, policy.model.state_dict()))
    assert updated[0][:2] == updated[1][:2]
    assert all(torch.equal(updated[1][2][n], w) for n, w in updated[0][2].items())


def test_the_trainer_records_what_its_old_logprobs_were_computed_by() -> None:
    policy, groups = make_moe(), make_groups(preamble=PREAMBLE)
    trainer = make_trainer(policy, tokens_per_microbatch=40)
    recorded = trainer.groups.attach_old(groups, sampled_at=0, record=True)
    for group in recorded:
        assert (group.prompt_experts is None) == group.zero_variance, "what carries no gradient is not run"
        for completion in group.completions:
            assert (completion.experts is None) == group.zero_variance
    teaching = [g for g in recorded if not g.zero_variance]
    olds = [torch.tensor(c.old_logprobs) for g in teaching for c in g.completions]
    with torch.no_grad():
        for old, by_hand in zip(olds, logprobs_by_hand(policy, teaching), strict=True):
            torch.testing.assert_close(old, by_hand, rtol=0, atol=1e-4)
    result = trainer.update(trainer.pack(recorded), learning_rate=1e-2)
    assert result.changed_share == 0.0, "the weights that recorded choose the same"
    assert result.log_ratio_M.abs().max() < 1e-4
    perturb(policy)
    result = trainer.update(trainer.pack(recorded), learning_rate=1e-2)
    assert result.changed_share is not None
    assert result.changed_share > 0.05


def test_replay_at_the_weights_that_recorded_is_the_update_without_it() -> None:
    updated = []
    for record in (False, True):
        policy = make_moe()
        trainer = make_trainer(policy, "sapo", tokens_per_microbatch=40)
        groups = trainer.groups.attach_old(make_groups(experts=False), sampled_at=0, record=record)
        result = trainer.update(trainer.pack(groups), learning_rate=1e-2)
        assert (result.changed_share is None) == (not record)
        updated.append((result.loss, result.grad_norm, policy.model.state_dict()))
    assert updated[0][:2] == updated[1][:2]
    assert all(torch.equal(updated[1][2][n], w) for n, w in updated[0][2].items()), "to the bit"


def test_the_share_is_over_all_minibatches_of_an_update_by_hand() -> None:
    policy, groups = make_moe(), make_groups()
    trainer = make_trainer(policy, tokens_per_microbatch=40)
    minibatch = trainer.pack(groups)
    changed = choices = 0
    for batch in minibatch.microbatches:
        with trainer.replaying(batch) as replay, torch.no_grad():
            loss_and_surrogate(policy, batch, trainer.settings)
        assert replay is not None
        changed, choices = changed + replay.changed, choices + batch.num_tokens * LAYERS * PER_TOKEN
    assert trainer.update(minibatch, learning_rate=0.0).changed_share == changed / choices


def test_a_reference_policy_routes_freely() -> None:
    policy, reference = make_moe(), make_moe(seed=7)
    trainer = make_trainer(policy, kl=KLPenalty(coefficient=0.1, estimator="k3"), reference=reference)
    groups = trainer.groups.attach_reference(make_groups())
    free = make_trainer(reference).groups.compute(make_groups(experts=False))
    for group, expected in zip(groups, free, strict=True):
        for completion, logprobs in zip(group.completions, expected, strict=True):
            assert np.array_equal(completion.reference_logprobs, logprobs)
    assert groups[0].prompt_experts == make_groups()[0].prompt_experts, "the groups keep what they carry"
    assert trainer.update(trainer.pack(groups), learning_rate=1e-3).changed_share is not None


def test_groups_that_carry_experts_are_not_run_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_moe())
    shares = trainer.pack(make_groups())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "replaying", lambda _: nullcontext())
        with pytest.raises(AssertionError, match="is run within `replaying`"):
            trainer.logprobs(shares)
    without = make_trainer(make_moe(), routers=None)
    with pytest.raises(AssertionError, match="given no routers"):
        without.update(without.pack(make_groups()), learning_rate=1e-3)
    mixed = [*make_groups()[:1], *make_groups(experts=False)[1:]]
    with pytest.raises(AssertionError, match="and others not"):
        trainer.pack(mixed)


def test_records_survive_a_checkpoint() -> None:
    groups, arrays = make_groups(), FlatArrays()
    values = json.loads(json.dumps([group_to_json(g, arrays) for g in groups]))
    reader = ArrayReader(arrays.joined())
    assert [group_from_json(v, reader) for v in values] == groups


def sample_groups(policy: Policy, max_rows: int = 256, preamble: tuple[int, ...] = ()) -> list[Group]:
    """Completions of many lengths, with the experts that the engine went through."""
    generator = np.random.default_rng(5)
    requests = [
        Request(Prompt(i, "t", "", preamble + tuple(generator.integers(0, 17, 2 + 3 * i).tolist())), 4)
        for i in range(6)
    ]
    log = ExpertLog()
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=3, stop_token_ids=frozenset({1, 2, 3}))
    drawn = LocalEngine(policy, max_rows).generate(requests, params, experts=log)
    groups = [
        Group(r.prompt, c, advantages=tuple(np.linspace(-1, 1, len(c)))) for r, c in zip(requests, drawn, strict=True)
    ]
    return log.attach([_scored(g) for g in groups])


def _scored(group: Group) -> Group:
    return replace(group, completions=tuple(replace(c, score=Score(float(i))) for i, c in enumerate(group.completions)))


@pytest.mark.parametrize("max_rows", [256, 9], ids=["at once", "in turns"])
@pytest.mark.parametrize("preamble", [(), PREAMBLE], ids=["", "preamble"])
def test_the_engine_records_what_the_trainer_would_choose_for_the_same_tokens(preamble: tuple, max_rows: int) -> None:
    policy = make_moe()
    sampled = sample_groups(policy, max_rows, preamble)
    lengths = {len(c) for g in sampled for c in g.completions}
    assert {1, MAX_NEW_TOKENS} <= lengths, f"rows leave at many moments: {sorted(lengths)}"
    trained = make_trainer(policy).groups.attach_old(sampled, sampled_at=0, record=True)
    for ours, theirs in zip(sampled, trained, strict=True):
        for sample in range(4):
            mine, other = np.array(experts_of(ours, sample)), np.array(experts_of(theirs, sample))
            # These routers are far from undecided, so rounding swaps none; the order within a token is the router's.
            assert np.array_equal(mine, other)


def test_recording_changes_no_token_and_evaluation_records_nothing() -> None:
    policy = make_moe()
    groups = sample_groups(policy)
    requests = [Request(g.prompt, 4) for g in groups]
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=3, stop_token_ids=frozenset({1, 2, 3}))
    plain = LocalEngine(policy).generate(requests, params)
    assert all(c.experts is None for completions in plain for c in completions)
    for group, completions in zip(groups, plain, strict=True):
        assert [tuple(c.token_ids) for c in group.completions] == [tuple(c.token_ids) for c in completions]
        for recorded, unrecorded in zip(group.completions, completions, strict=True):  # by the fast forward: it rounds
            assert recorded.logprobs == pytest.approx(unrecorded.logprobs, abs=1e-5)


def test_an_engines_record_is_replayed_in_every_update() -> None:
    policy = make_moe()
    groups = sample_groups(policy)
    trainer = make_trainer(policy)
    shares = []
    for minibatch in split_minibatches(groups, 3):
        result = trainer.update(trainer.pack(minibatch), learning_rate=3e-2)
        assert result.changed_share is not None
        shares.append(result.changed_share)
        with torch.no_grad():
            expected = logprobs_by_hand(policy, list(minibatch))
        got = [torch.tensor(logp) for per_group in trainer.groups.compute(minibatch) for logp in per_group]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    assert shares[0] == 0.0, "at the weights that sampled the trainer chooses the same"
    assert shares[2] > 0.0


@pytest.mark.parametrize("change", ["a token too few", "another sample"])
def test_a_log_that_does_not_fit_its_completions_is_an_error(change: str) -> None:
    policy = make_moe()
    request = Request(Prompt(0, "t", "", (1, 2, 3)), 2)
    log = ExpertLog()
    params = SamplingParams(max_new_tokens=6, seed=3)
    (drawn,) = LocalEngine(policy).generate([request], params, experts=log)
    cuts: dict[str, Callable[[Completion], tuple[Completion, ...]]] = {
        "a token too few": lambda c: (replace(c, token_ids=c.token_ids[:-1]), drawn[1]),
        "another sample": lambda c: (c,),
    }
    with pytest.raises(AssertionError, match=r"records of|that are not there"):
        log.attach([Group(request.prompt, cuts[change](copy.copy(drawn[0])))])
