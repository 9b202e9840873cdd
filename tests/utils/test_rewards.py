"""Rewards that were rounded on their way: equal, centred and right but for rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sapo.data import Completion, Group, Prompt, Score
from sapo.objectives import group_advantages
from sapo.utils.rewards import all_equal, is_right

# 0.1 + 0.2 is 0.30000000000000004: one bit beside 0.3. And what a sum becomes that was taken in float32.
LAST_BITS = [
    [0.1 + 0.2, *[0.3] * 7],
    [*[1 / 3] * 7, float(np.float32(1 / 3))],
    [sum([0.1] * 10), *[1.0] * 7],
    [-1e15, *[-1e15 + 0.125] * 7],
]


@pytest.mark.parametrize("rewards", LAST_BITS)
@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
def test_rewards_that_differ_by_rounding_give_no_advantage(rewards: list[float], kind: str) -> None:
    assert len(set(rewards)) == 2
    assert all_equal(rewards)
    assert not group_advantages(torch.tensor(rewards, dtype=torch.float64), kind).any()
    completions = tuple(Completion((1,), (-0.1,), "stop", score=Score(reward)) for reward in rewards)
    assert Group(Prompt(0, "t", "?"), completions, (0.0,) * len(rewards)).zero_variance


@pytest.mark.parametrize("scale", [1e-300, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("rewards", [[0.0, 1.0, 1.0, 1.0], [1.0, 1.00001, 1.0, 1.0], [0.3, 0.7, 0.1, 0.2]])
def test_advantages_are_centred_and_do_not_depend_on_the_scale(scale: float, rewards: list[float]) -> None:
    scaled = group_advantages(torch.tensor(rewards, dtype=torch.float64) * scale)
    torch.testing.assert_close(scaled, group_advantages(torch.tensor(rewards, dtype=torch.float64)), rtol=1e-9, atol=0)
    # By the definition of equation (2): mean 0, and squares that sum to G - 1. 2^-52 of 1, over a spread of 1e-5.
    assert abs(float(scaled.sum())) < 1e-10
    assert math.isclose(float(scaled.square().sum()), len(rewards) - 1, rel_tol=1e-9)


def test_a_reward_that_misses_the_threshold_by_rounding_is_right() -> None:
    assert is_right(sum([0.1] * 10))
    assert is_right(float(np.float32(0.7)) + float(np.float32(0.3)) - 6e-8)
    assert not is_right(0.9999)
    assert is_right(-2.0, threshold=-2.0)
    assert not is_right(-2.001, threshold=-2.0)
