"""Episodes of several turns in the update, against plain forwards: an own token is predicted by what the model saw."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data import Completion, Group, Observation, Prompt, Score
from sapo.model.adapters import add_adapter
from sapo.model.routing import Routers
from sapo.objectives import NORMALIZERS
from sapo.run.records import rollout_records, token_gates
from sapo.training.batch import pack, split_minibatches
from sapo.training.trajectories import lay_out, own_places
from support.plain_models import plain_copy
from support.trainer_cases import assert_same, make_policy, make_trainer, packed_gradient, take_gradient

VOCABULARY = 17


def trajectory(r: random.Random, prompt: tuple[int, ...], keep: bool) -> tuple[Completion, list[list[int]]]:
    """Return a random episode of one to five turns, and what the model sees before each of its own tokens."""
    own: list[int] = []
    observations: list[Observation] = []
    view, pasts = list(prompt), []

    def observe() -> None:
        nonlocal view
        kept = r.randrange(len(view) + 1) if keep and r.random() < 0.5 else None
        ids = tuple(r.randrange(VOCABULARY) for _ in range(r.randrange(1 if kept == 0 else 0, 7)))
        observations.append(Observation(len(own), ids, "", kept))
        view = view[:kept] + list(ids)

    turns = r.randrange(1, 6)
    for turn in range(turns):
        if turn or r.random() < 0.2:
            observe()
        for _ in range(r.randrange(1, 5)):
            token = r.randrange(VOCABULARY)
            pasts.append(list(view))
            own.append(token)
            view.append(token)
    if r.random() < 0.2:  # the last observation got no answer
        observe()
    logprobs = [r.gauss(-2.8, 0.3) for _ in own]
    return Completion(own, logprobs, "stop", score=Score(r.random()), observations=tuple(observations)), pasts


def episodes(seed: int, keep: bool, groups: int = 3) -> tuple[list[Group], list[list[list[int]]]]:
    """Return groups whose prompts begin alike, and the pasts of every completion."""
    r = random.Random(seed)
    preamble = tuple(r.randrange(VOCABULARY) for _ in range(18 if seed % 2 else 0))
    made, pasts = [], []
    for g in range(groups):
        prompt = (*preamble, *(r.randrange(VOCABULARY) for _ in range(r.randrange(2, 9))))
        drawn = [trajectory(r, prompt, keep) for _ in range(3)]
        pasts += [past for _, past in drawn]
        advantages = tuple(r.uniform(-1, 1) for _ in drawn)
        made.append(Group(Prompt(g, "t", "", prompt), tuple(c for c, _ in drawn), advantages))
    return made, pasts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 60), st.sampled_from(NORMALIZERS))
def test_every_own_token_is_a_target_once_predicted_by_what_the_model_saw(
    seed: int, keep: bool, tokens: int, normalizer: str
) -> None:
    groups, pasts = episodes(seed, keep)
    shares = pack(groups, normalizer=normalizer, tokens_per_microbatch=tokens, max_new_tokens=24)
    completions = [c for g in groups for c in g.completions]
    seen = []
    for batch in shares.microbatches:
        paths = [paths_of(batch.segments, place) for place in range(batch.num_tokens)]
        for b, i in enumerate(batch.sequence_ids):
            seen.append(i)
            own = batch.sequence_M == b
            assert batch.target_M[own].tolist() == completions[i].token_ids.tolist()
            for predictor, past in zip(batch.predictor_M[own].tolist(), pasts[i], strict=True):
                assert batch.token_ids_N[paths[predictor]].tolist() == past
                assert batch.position_ids_N[paths[predictor]].tolist() == list(range(len(past)))
    assert sorted(seen) == list(range(len(completions)))
    assert (shares.num_sequences, shares.num_tokens) == (len(completions), sum(map(len, completions)))


def paths_of(segments: tuple, place: int) -> list[int]:
    """Return the packed positions that a packed token sees, its own included."""
    at = next(i for i, s in enumerate(segments) if s.start <= place < s.stop)
    path = list(range(segments[at].start, place + 1))
    while (at := segments[at].parent) >= 0:
        path = [*range(segments[at].start, segments[at].stop), *path]
    return path


@pytest.mark.parametrize(
    ("architecture", "objective", "normalizer", "checkpointing"),
    [
        ("qwen3", "sapo", "sequence_mean", False),
        ("qwen3", "gspo", "token_mean", True),
        ("llama", "sapo", "constant_length", False),
        ("qwen3_moe", "sapo", "sequence_mean", False),
    ],
)
@pytest.mark.parametrize("keep", [False, True], ids=["appended", "rewritten"])
def test_logprobs_and_gradient_are_those_of_plain_forwards(
    architecture: str, objective: str, normalizer: str, checkpointing: bool, keep: bool
) -> None:
    policy = make_policy(architecture=architecture)
    plain = plain_copy(policy.model)
    groups, pasts = episodes(7, keep, groups=2)
    trainer = make_trainer(
        policy,
        objective,
        normalizer=normalizer,
        tokens_per_microbatch=80,
        max_new_tokens=24,
        activation_checkpointing=checkpointing,
    )
    computed = [values for per_group in trainer.groups.compute(groups) for values in per_group]
    completions = [c for g in groups for c in g.completions]
    by_hand = []
    for completion, past, values in zip(completions, pasts, computed, strict=True):
        own = [
            plain(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token]
            for seen, token in zip(past, completion.token_ids.tolist(), strict=True)
        ]
        by_hand.append(torch.stack(own).double())
        np.testing.assert_allclose(values, by_hand[-1].detach().numpy(), atol=1e-5, rtol=0)
    packed = packed_gradient(trainer, groups)
    advantages = [a for g in groups for a in g.advantages]
    loss_by_hand(by_hand, completions, advantages, objective, normalizer).backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
    assert_same(packed, gradient, tolerance=1e-5)


def loss_by_hand(
    logprobs: list[torch.Tensor],
    completions: list[Completion],
    advantages: list[float],
    objective: str,
    normalizer: str,
) -> torch.Tensor:
    """The losses of equations (5) and (6) over the policy's own tokens, sequence by sequence."""
    tokens = sum(map(len, completions))
    weights = {
        "sequence_mean": [1 / (len(c) * len(completions)) for c in completions],
        "token_mean": [1 / tokens] * len(completions),
        "constant_length": [1 / (24 * len(completions))] * len(completions),
    }[normalizer]
    loss = torch.zeros((), dtype=torch.float64)
    for logp, completion, advantage, weight in zip(logprobs, completions, advantages, weights, strict=True):
        log_ratio = logp - torch.tensor(completion.logprobs.tolist(), dtype=torch.float64)
        if objective == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            values = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau * advantage
        else:  # GSPO: the ratio is the geometric mean over all own tokens of the trajectory
            ratio = log_ratio.mean().exp()
            clipped = ratio.clamp(1 - 3e-4, 1 + 4e-4)
            values = torch.minimum(ratio * advantage, clipped * advantage).expand(len(completion))
        loss = loss - weight * values.sum()
    return loss


def test_logprobs_of_a_policy_with_an_adapter_are_those_of_plain_forwards() -> None:
    policy = make_policy()
    add_adapter(policy, rank=2, alpha=4, targets="all-linear", seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # 0 at first: the adapter would change nothing
            parameter.data.normal_(0, 0.1, generator=generator)
    plain = plain_copy(policy.model)
    groups, pasts = episodes(3, keep=True, groups=1)
    trainer = make_trainer(policy, tokens_per_microbatch=60)
    for completion, past, values in zip(groups[0].completions, pasts, trainer.groups.compute(groups)[0], strict=True):
        for seen, token, value in zip(past, completion.token_ids.tolist(), values.tolist(), strict=True):
            by_hand = plain(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token].item()
            assert value == pytest.approx(by_hand, abs=1e-5)


def test_routes_of_observations_are_recorded_and_replayed_with_those_of_the_policy() -> None:
    policy = make_policy(architecture="qwen3_moe")
    groups, _ = episodes(4, keep=False)
    trainer = make_trainer(policy, routers=Routers(policy), tokens_per_microbatch=60)
    recorded = trainer.groups.attach_old(groups, sampled_at=0, record=True)
    for group in recorded:
        for completion in group.completions:
            assert completion.experts is not None
            assert completion.experts.num_tokens == own_places(completion)[-1]
    # At the same weights the replayed forward is the recorded one.
    replayed = trainer.groups.compute(recorded)
    for group, values in zip(recorded, replayed, strict=True):
        for completion, found in zip(group.completions, values, strict=True):
            np.testing.assert_allclose(found, completion.old_logprobs, atol=1e-6, rtol=0)


def test_a_rewritten_history_is_refused_with_routing_replay() -> None:
    policy = make_policy(architecture="qwen3_moe")
    groups, _ = episodes(3, keep=True)
    trainer = make_trainer(policy, routers=Routers(policy))
    with pytest.raises(ValueError, match="routing replay has no record of a rewritten history"):
        trainer.groups.compute(trainer.groups.attach_old(groups, sampled_at=0, record=True))


def test_what_branches_share_is_packed_once() -> None:
    # 9 8 | 1 2 | then all but the first own token is dropped and 3 shown | 4 5
    rewritten = Completion((1, 2, 4, 5), (0.0,) * 4, "stop", observations=(Observation(2, (3,), keep=3),))
    laid = lay_out(2, rewritten)
    # Inputs: 1 (own), 3 and 4; 2 is a target at a place where nothing follows, 5 is the last.
    assert laid.source_R.tolist() == [2, 4, 5]
    assert laid.seen_R.tolist() == [2, 3, 4]
    assert laid.predictor_T.tolist() == [-1, 0, 1, 2]
    assert laid.segments == ((0, 3, -1),)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_an_episode_without_a_turn_is_not_packed_and_counts_as_a_sequence(normalizer: str) -> None:
    empty = Completion((), (), "length", observations=(Observation(0, (5, 6)),))
    drawn = Completion((2, 0), (-1.0, -2.0), "stop", score=Score(1.0))
    group = Group(Prompt(0, "t", "", (1, 2)), (empty, drawn), (-0.7, 0.7))
    trainer = make_trainer(make_policy(), normalizer=normalizer)
    shares = trainer.pack([group])
    assert (shares.num_sequences, shares.num_tokens) == (2, 2)
    assert shares.microbatches[0].sequence_ids == (1,)
    weight = {"sequence_mean": 1 / 4, "token_mean": 1 / 2, "constant_length": 1 / 24, "sequence_sum": 1 / 2}
    assert shares.microbatches[0].weights_B.tolist() == [weight[normalizer]]
    assert [len(values) for values in trainer.groups.compute([group])[0]] == [0, 2]
    assert np.isfinite(trainer.update(shares, 1e-3).loss)


def test_failed_completions_leave_the_gradient_as_if_they_had_not_been_sampled() -> None:
    groups, _ = episodes(5, keep=False)
    masked = [replace(g, masked=(False, True, False)) for g in groups]
    without = [replace(g, completions=g.completions[::2], advantages=g.advantages[::2]) for g in groups]
    trainer = make_trainer(make_policy())
    left, right = packed_gradient(trainer, masked), packed_gradient(trainer, without)
    assert all(torch.equal(left[name], right[name]) for name in right)
    take_gradient(trainer.policy)


def test_rollout_records_show_observations_and_gates_of_groups_of_unequal_size() -> None:
    groups, _ = episodes(5, keep=True)
    groups[0] = replace(groups[0], completions=groups[0].completions[:2], advantages=groups[0].advantages[:2])
    trainer = make_trainer(make_policy())
    gates: dict[str, dict] = {}
    for update, part in enumerate(split_minibatches(groups, 3)):
        result = trainer.update(trainer.pack(part), 1e-3)
        gates |= token_gates(result, update, 3, [len(g.completions) for g in groups], on_policy=True)
    records = list(rollout_records(groups, gates, sampler_is_old=True))
    completions = [c for g in groups for c in g.completions]
    assert [r["update"] for r in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(r["gate_weight"]) for r in records] == [len(c) for c in completions]
    for record, completion in zip(records, completions, strict=True):
        assert record["token_ids"] == completion.token_ids.tolist()
        assert record.get("observations", []) == [
            [o.at, list(o.token_ids), "", o.keep] for o in completion.observations
        ]
