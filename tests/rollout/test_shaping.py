"""Overlong completions: the penalty by hand, and what masking leaves in the group's statistics."""

from __future__ import annotations

import math

import pytest

from sapo.config import RolloutConfig
from sapo.data import Completion, Group, Prompt, Score, Status
from sapo.diagnostics import minibatch_metrics, rollout_metrics
from sapo.rollout.shaping import overlong_penalty, random_reward, shape_group

PROMPT = Prompt(0, "t", "?", (1,))


def completion(length: int, reward: float, limit: int = 20) -> Completion:
    truncated = length == limit
    status = Status.TRUNCATED if truncated else Status.SCORED
    return Completion((1,) * length, (-0.5,) * length, "length" if truncated else "stop", score=Score(reward, status))


def shaped(
    completions: list[Completion], advantage: str = "group_mean", coin_seed: int | None = None, **settings: object
) -> Group:
    return shape_group(PROMPT, completions, RolloutConfig(max_new_tokens=20, **settings), advantage, coin_seed)


@pytest.mark.parametrize(
    ("length", "penalty"),
    # The paper's own setting: at most 20,480 tokens of which the last 4,096 are the buffer; values by hand.
    [(1, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (18_432, -0.5), (19_456, -0.75), (20_480, -1.0)],
)
def test_the_penalty_is_equation_13(length: int, penalty: float) -> None:
    assert overlong_penalty(length, max_length=20_480, buffer=4096) == penalty


def test_a_penalty_shapes_the_advantages_and_leaves_the_verifiers_reward() -> None:
    group = shaped(
        [completion(5, 1.0), completion(18, 1.0), completion(20, 0.0)], overlong="penalty", overlong_buffer=4
    )
    assert group.rewards == (1.0, 1.0, 0.0)
    assert group.shaped_rewards == group.training_rewards == (1.0, 0.5, -1.0)
    mean = (1.0 + 0.5 - 1.0) / 3
    assert group.advantages == pytest.approx([1.0 - mean, 0.5 - mean, -1.0 - mean])
    assert not any(group.masked)


def test_a_penalty_gives_spread_to_a_group_of_equal_rewards() -> None:
    right = [completion(5, 1.0), completion(19, 1.0)]
    assert shaped(right).zero_variance
    assert not shaped(right, overlong="penalty", overlong_buffer=4).zero_variance


def test_a_mask_takes_the_loss_and_leaves_the_statistics() -> None:
    group = shaped([completion(5, 1.0), completion(8, 0.0), completion(20, 0.0)], "group_std", overlong="mask")
    assert group.masked == (False, False, True)
    assert group.counted == (True, True, False)
    assert group.shaped_rewards == ()
    # Mean 1/3 and deviation sqrt(1/3) of all three, the truncated one's 0 among them.
    assert group.advantages == pytest.approx([2 / 3 * math.sqrt(3), -1 / 3 * math.sqrt(3), -1 / 3 * math.sqrt(3)])


def test_only_truncation_masks_not_length() -> None:
    last_token_stops = Completion((1,) * 20, (-0.5,) * 20, "stop", score=Score(1.0))
    assert shaped([last_token_stops, completion(20, 0.0)], overlong="mask").masked == (False, True)


def test_a_group_of_masked_completions_has_zero_variance_whatever_its_rewards() -> None:
    cut = [completion(20, reward) for reward in (0.0, 0.5)]  # a task may judge truncated completions
    assert not shaped(cut).zero_variance
    assert shaped(cut, overlong="mask").zero_variance


def test_without_options_a_group_is_the_verifiers() -> None:
    group = shaped([completion(5, 1.0), completion(20, 0.0)])
    assert (group.shaped_rewards, group.masked, group.training_rewards) == ((), (), (1.0, 0.0))


def test_random_rewards_are_fair_coins_that_know_nothing_of_the_answer() -> None:
    prompts = [Prompt(i, "t", "?", (1,)) for i in range(500)]
    coins = [[random_reward(3, p, s, completion(5, 1.0)) for s in range(8)] for p in prompts]
    flat = [coin for group in coins for coin in group]
    assert set(flat) == {0.0, 1.0}
    # 4000 tosses of a fair coin lie within 4 deviations, 4 sqrt(1000) = 126.5, of 2000.
    assert abs(sum(flat) - 2000) < 126.5
    again = [[random_reward(3, p, s, completion(5, 0.0)) for s in range(8)] for p in prompts]
    assert again == coins, "the verifier's reward does not enter, and nothing but its arguments does"
    for other in (
        [[random_reward(4, p, s, completion(5, 1.0)) for s in range(8)] for p in prompts],
        [[random_reward(3, p, s, completion(6, 1.0)) for s in range(8)] for p in prompts],
    ):
        same = sum(a == b for x, y in zip(coins, other, strict=True) for a, b in zip(x, y, strict=True))
        assert abs(same - 2000) < 126.5, "another seed, or other tokens, and the coin is another"


def test_advantages_of_random_rewards_are_of_the_coins_and_the_verifiers_reward_stays() -> None:
    answers = [completion(n, 1.0) for n in range(1, 9)]
    group = shaped(answers, coin_seed=0)
    assert group.rewards == (1.0,) * 8, "all right: by the verifier there is nothing to learn"
    coins = tuple(random_reward(0, PROMPT, s, c) for s, c in enumerate(answers))
    assert group.shaped_rewards == coins
    assert group.advantages == pytest.approx([c - sum(coins) / 8 for c in coins])
    assert not group.zero_variance
    assert not any(name.startswith("overlong/") for name in rollout_metrics([group], penalised=False))
    assert rollout_metrics([group], penalised=False)["reward/shaped_mean"] == sum(coins) / 8


def failed(status: Status) -> Completion:
    return Completion((1,) * 5, (-0.5,) * 5, "stop", score=Score(0.0, status, "it broke"))


@pytest.mark.parametrize("status", [Status.VERIFIER_ERROR, Status.ENVIRONMENT_ERROR])
@pytest.mark.parametrize("advantage", ["group_mean", "group_std", "leave_one_out"])
def test_failed_completions_leave_baseline_deviation_and_loss(status: Status, advantage: str) -> None:
    with_failed = shaped([completion(5, 1.0), failed(status), completion(6, 0.0), completion(7, 0.0)], advantage)
    without = shaped([completion(5, 1.0), completion(6, 0.0), completion(7, 0.0)], advantage)
    assert with_failed.masked == (False, True, False, False)
    assert with_failed.advantages == (without.advantages[0], 0.0, *without.advantages[1:])
    assert without.masked == ()


def test_a_group_has_zero_variance_when_only_a_failure_differs() -> None:
    assert shaped([completion(5, 1.0), failed(Status.VERIFIER_ERROR), completion(6, 1.0)]).zero_variance
    assert shaped([failed(Status.VERIFIER_ERROR)] * 3).zero_variance
    assert not shaped([completion(5, 1.0), failed(Status.VERIFIER_ERROR), completion(6, 0.0)]).zero_variance


def figures_without_counts(group: Group) -> dict[str, float]:
    """Return the figures of a batch that are about rewards."""
    figures = {**rollout_metrics([group]), **minibatch_metrics([group])}
    return {k: v for k, v in figures.items() if "reward" in k or "right" in k or k.startswith(("pass@", "overlong/pe"))}


@pytest.mark.parametrize("status", [Status.VERIFIER_ERROR, Status.ENVIRONMENT_ERROR])
def test_failed_completions_leave_the_figures_of_rewards_and_are_counted(status: Status) -> None:
    penalty = {"overlong": "penalty", "overlong_buffer": 16}
    for rewards, options in (([1.0, 0.0, 1.0], {}), ([1.0, 1.0, 1.0], {}), ([1.0, 0.0, 0.5], penalty)):
        answers = [completion(5, reward) for reward in rewards]
        with_failed = shaped([*answers, failed(status)], **options)
        found = figures_without_counts(with_failed)
        assert found == figures_without_counts(shaped(answers, **options))
        assert {"reward/mean", "reward/std", "pass@1", "groups/none_right", "batch/reward_mean"} <= found.keys()
        assert rollout_metrics([with_failed])[f"status/{status.value}"] == 1
    right, none = shaped([completion(5, 1.0)] * 2), shaped([completion(5, 0.0)] * 2)
    lost = shaped([failed(status)] * 2)
    assert rollout_metrics([right, none, lost])["groups/none_right"] == 0.5, (
        "of a group without scores nothing is known"
    )
    assert rollout_metrics([lost])["groups"] == 1
    assert figures_without_counts(lost) == {}


def test_failed_and_truncated_completions_are_masked_and_counted_apart() -> None:
    scored = [completion(5, 1.0), failed(Status.VERIFIER_ERROR), completion(20, 0.0), completion(6, 0.0)]
    group = shaped(scored, overlong="mask")
    assert group.masked == (False, True, True, False)
    metrics = rollout_metrics([group])
    assert metrics["overlong/masked"] == 0.25
    assert metrics["status/verifier_error"] == 1
    assert "status/environment_error" not in metrics
    assert "overlong/masked" not in rollout_metrics([shaped(scored)])
    assert (
        rollout_metrics([shaped([completion(5, 1.0), failed(Status.ENVIRONMENT_ERROR)])])["status/environment_error"]
        == 1
    )
