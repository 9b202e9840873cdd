"""Rewards of single turns: reward-to-go against the baseline of whole episodes, by hand and by autograd in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sapo.config import RolloutConfig
from sapo.data import Completion, Group, Observation, Prompt, Score, Status
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.objectives import OBJECTIVES, make_objective, turn_advantages
from sapo.rollout.shaping import require_token_advantages, shape_group
from sapo.run.records import rollout_records
from sapo.tasks.base import checked_score
from sapo.training.batch import cut_groups
from support.plain_models import plain_copy
from support.trainer_cases import assert_same, make_policy, make_trainer, packed_gradient

BY_TOKEN = [name for name, known in OBJECTIVES.items() if not known.shared_advantage]


def episode(*turns: tuple[int, ...], rewards: tuple[float, ...] = (), reward: float = 0.0) -> Completion:
    """Return an episode with an observation of two tokens between turns, log pi_old off the truth."""
    own = [token for turn in turns for token in turn]
    ends = [sum(map(len, turns[: k + 1])) for k in range(len(turns) - 1)]
    score = Score(math.fsum(rewards) if rewards else reward, turn_rewards=rewards)
    return Completion(
        own,
        [-2.9 + 0.3 * math.sin(3 * i + token) for i, token in enumerate(own)],
        "stop",
        score=score,
        observations=tuple(Observation(at, (5, 6)) for at in ends),
    )


def shaped(advantage: str = "group_std", **settings: object) -> Group:
    episodes = (
        episode((1, 2, 3), (4, 5), rewards=(1.0, 0.5)),
        episode((7, 2), (1,), (8, 9, 10, 1), rewards=(0.0, 0.25, 0.0)),
        episode((3, 3, 3), reward=1.0),  # judged as a whole
        episode((2, 4), (6, 1), rewards=(0.0, 0.0)),
    )
    return shape_group(Prompt(0, "t", "", (1, 2, 3)), episodes, RolloutConfig(max_new_tokens=12, **settings), advantage)


def test_advantages_of_turns_are_rewards_to_go_less_the_mean_of_whole_returns() -> None:
    """Returns 1.5, .25, 1 and 0: their mean is .6875."""
    group = shaped("group_mean")
    assert group.advantages == pytest.approx((0.8125, -0.4375, 0.3125, -0.6875))
    expected = [(0.8125, -0.1875), (-0.4375, -0.4375, -0.6875), (0.3125,), (-0.6875, -0.6875)]
    for found, by_hand in zip(group.turn_advantages, expected, strict=True):
        assert found == pytest.approx(by_hand)
    deviation = math.sqrt((0.8125**2 + 0.4375**2 + 0.3125**2 + 0.6875**2) / 3)
    for found, by_hand in zip(shaped("group_std").turn_advantages, expected, strict=True):
        assert found == pytest.approx([a / deviation for a in by_hand])
    # Means of the others: (2.75 - R_i) / 3.
    others = [(2.75 - r) / 3 for r in (1.5, 0.25, 1.0, 0.0)]
    to_go = [(1.5, 0.5), (0.25, 0.25, 0.0), (1.0,), (0.0, 0.0)]
    for found, left, baseline in zip(shaped("leave_one_out").turn_advantages, to_go, others, strict=True):
        assert found == pytest.approx([g - baseline for g in left])


def test_rewards_at_the_end_alone_are_rewards_of_episodes() -> None:
    """Every turn of an episode then has the episode's advantage."""
    episodes = [episode((1,), (2, 3), rewards=(0.0, r)) for r in (1.0, 0.0, 0.25)]
    for kind in ("group_std", "group_mean", "leave_one_out"):
        group = shape_group(Prompt(0, "t", "", (1,)), episodes, RolloutConfig(), kind)
        for whole, by_turn in zip(group.advantages, group.turn_advantages, strict=True):
            assert by_turn == pytest.approx((whole, whole), rel=1e-12)


def test_groups_without_spread_and_failed_episodes_have_no_advantage() -> None:
    flat = [episode((1,), (2,), rewards=r) for r in ((1.0, 0.0), (0.0, 1.0))]
    prompt = Prompt(0, "t", "", (1,))
    group = shape_group(prompt, flat, RolloutConfig(), "group_std")
    assert group.turn_advantages == ((0.0, 0.0), (0.0, 0.0))
    assert group.zero_variance, "the deviation that would divide is 0"
    group = shape_group(prompt, flat, RolloutConfig(), "group_mean")
    assert group.turn_advantages == ((0.0, -1.0), (0.0, 0.0))
    assert not group.zero_variance
    assert group.advantages == (0.0, 0.0)
    assert turn_advantages([[1.0, 0.0]], torch.tensor([1.0]), "group_mean") == [[0.0, 0.0]], "nothing to compare with"
    failed = replace(flat[0], score=Score(0.0, Status.ENVIRONMENT_ERROR))
    group = shape_group(prompt, [*flat, failed], RolloutConfig(), "group_mean")
    assert group.turn_advantages == ((0.0, -1.0), (0.0, 0.0), (0.0, 0.0))
    assert group.masked == (False, False, True)


def test_a_group_whose_only_advantages_are_those_of_masked_completions_has_no_gradient() -> None:
    """The third ends by the limit: its second turn earned 1 of the whole return, and is masked."""
    episodes = [episode((1,), (2,), rewards=r) for r in ((0.0, 1.0), (0.0, 1.0), (1.0, 0.0))]
    episodes[2] = replace(episodes[2], finish_reason="length")
    group = shape_group(Prompt(0, "t", "", (1,)), episodes, RolloutConfig(overlong="mask"), "group_mean")
    assert group.turn_advantages == ((0.0, 0.0), (0.0, 0.0), (0.0, -1.0))
    assert group.masked == (False, False, True)
    assert group.zero_variance
    assert not replace(group, masked=()).zero_variance


def test_credit_by_the_episode_and_a_penalty_on_length_are_as_they_were() -> None:
    assert shaped(turns={"credit": "episode"}).turn_advantages == ()
    group = shaped("group_mean", overlong="penalty", overlong_buffer=6)  # of the seven own tokens of the second alone
    assert group.shaped_rewards[1] == pytest.approx(0.25 - 1 / 6)
    mean = sum(group.shaped_rewards) / 4
    assert group.turn_advantages[1] == pytest.approx([0.25 - 1 / 6 - mean, 0.25 - 1 / 6 - mean, -1 / 6 - mean])


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (Score(1.0, turn_rewards=(1.0, 1.0)), "a reward must be the sum of its turn_rewards; got 1 and 2"),
        (Score(1.0, turn_rewards=(1.0, math.nan)), "a reward must be finite; got nan"),
    ],
)
def test_rewards_of_turns_that_are_none_are_refused(score: Score, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_score(score)


def test_objectives_of_whole_sequences_refuse_them_in_one_line_that_names_the_others() -> None:
    for name, known in OBJECTIVES.items():
        if not known.shared_advantage:
            require_token_advantages(make_objective(name), "task 't'")
            continue
        with pytest.raises(ConfigError, match=f"for each token .*sapo.*; got {name}, .* rollout.turns.credit=episode"):
            require_token_advantages(make_objective(name), "task 't'")
    assert {"sapo", "grpo", "gspo_token"} <= set(BY_TOKEN)


def test_they_survive_a_trip_through_text_and_are_in_the_records() -> None:
    group, arrays = shaped(), FlatArrays()
    value = group_to_json(group, arrays)
    assert group_from_json(value, ArrayReader(arrays.joined())) == group
    records = list(rollout_records([group], {}, sampler_is_old=True))
    assert [r["turn_advantages"] for r in records] == [list(a) for a in group.turn_advantages]
    assert [r.get("turn_rewards") for r in records] == [[1.0, 0.5], [0.0, 0.25, 0.0], None, [0.0, 0.0]]


@pytest.fixture(scope="module")
def compared() -> tuple[Policy, list[Group], torch.nn.Module, list[torch.Tensor]]:
    """A policy, groups with turn rewards and one without, and log pi of every own token by plain forwards."""
    policy = make_policy()
    whole = [episode((4, 1), (2,), reward=1.0), episode((9, 9), reward=0.0)]
    other = shape_group(Prompt(1, "t", "", (4, 4)), whole, RolloutConfig(), "group_std")
    groups = [shaped(), other]
    plain = plain_copy(policy.model)
    logprobs = []
    for group in groups:
        for completion in group.completions:
            ids, drawn = [*group.prompt.token_ids], []
            for own, tokens in completion.spans:
                drawn += range(len(ids), len(ids) + len(tokens)) if own else ()
                ids += tokens.tolist()
            places, tokens = torch.tensor(drawn), torch.tensor([ids])
            logp = plain(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            logprobs.append(logp[places - 1, tokens[0, places]])
    return policy, groups, plain, logprobs


@pytest.mark.parametrize("normalizer", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_the_gradient_is_autograds_of_the_values_with_the_advantage_of_each_turn(
    compared: tuple[Policy, list[Group], torch.nn.Module, list[torch.Tensor]], name: str, normalizer: str
) -> None:
    policy, groups, plain, logprobs = compared
    completions = [c for g in groups for c in g.completions]
    by_turn = [a for g in groups for a in g.turn_advantages or [(a,) * 9 for a in g.advantages]]
    loss = torch.zeros((), dtype=torch.float64)
    for completion, advantages, logp in zip(completions, by_turn, logprobs, strict=True):
        advantage_M = torch.zeros_like(logp)
        for (start, stop), advantage in zip(completion.turns, advantages, strict=False):
            advantage_M[start:stop] = advantage
        old = torch.tensor(completion.logprobs.tolist(), dtype=torch.float64)
        one = torch.zeros(len(completion), dtype=torch.int64)
        value_M = make_objective(name).surrogate(logp - old, advantage_M, one, 1, old).value_M
        tokens = sum(map(len, completions))
        weight = 1 / tokens if normalizer == "token_mean" else 1 / (len(completion) * len(completions))
        loss = loss - weight * value_M.sum()
    names = [n for n, _ in plain.named_parameters()]
    gradients = torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, plain.parameters(), strict=True)]
    expected = dict(zip(names, zeros, strict=True))
    trainer = make_trainer(policy, name, normalizer=normalizer)
    assert_same(packed_gradient(trainer, groups), expected)
    if normalizer == "sequence_mean":
        split = make_trainer(policy, name, tokens_per_microbatch=12)
        assert len(split.pack(groups).microbatches) > 2
        assert_same(packed_gradient(split, groups), expected)


def test_a_group_that_is_cut_keeps_the_advantages_of_its_turns() -> None:
    parts = [part for cut in cut_groups([shaped()], tokens_per_microbatch=12) for part in cut]
    assert len(parts) > 1
    assert tuple(a for part in parts for a in part.turn_advantages) == shaped().turn_advantages


def test_a_batch_without_them_has_none() -> None:
    group = shaped(turns={"credit": "episode"})
    (batch,) = make_trainer(make_policy()).pack([group]).microbatches
    assert batch.advantages_M is None
    assert torch.equal(batch.token_advantages_M, batch.advantages_B[batch.sequence_M])
