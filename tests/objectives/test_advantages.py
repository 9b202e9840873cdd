"""Group advantages against equation (2) by hand."""

import math

import pytest
import torch

from sapo.objectives import ADVANTAGES, group_advantages

INF, NAN = math.inf, math.nan


def test_group_std_is_equation_2_with_the_unbiased_deviation():
    # By hand: mean 1/4, variance (9 + 1 + 1 + 1)/16 / 3 = 1/4, std 1/2.
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert group_advantages(rewards).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-15)


def test_group_mean_leaves_the_scale_of_the_rewards():
    assert group_advantages(torch.tensor([3.0, 0.0, 0.0, 1.0]), kind="group_mean").tolist() == [2.0, -1.0, -1.0, 0.0]


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    # By hand: 3 - (0 + 0 + 1)/3, 0 - (3 + 0 + 1)/3 twice, 1 - (3 + 0 + 0)/3.
    rewards = torch.tensor([3.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    expected = [8 / 3, -4 / 3, -4 / 3, 0.0]
    assert group_advantages(rewards, kind="leave_one_out").tolist() == pytest.approx(expected, rel=1e-15)


def test_leading_dimensions_are_groups_of_their_own():
    rewards = torch.tensor([[[1.0, 0.0], [4.0, 8.0]], [[0.0, 0.0], [5.0, -5.0]]])
    # Two samples: std = |a - b| / sqrt 2, so advantages are +-1/sqrt 2 or 0.
    h = math.sqrt(0.5)
    expected = torch.tensor([[[h, -h], [-h, h]], [[0.0, 0.0], [h, -h]]])
    torch.testing.assert_close(group_advantages(rewards), expected)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1e30] * 3, [-0.3] * 10, [5.0]])
def test_a_group_of_equal_rewards_gets_exactly_zero(kind, rewards):
    assert group_advantages(torch.tensor(rewards), kind=kind).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_group_std_does_not_depend_on_the_scale_of_the_rewards(scale):
    rewards = scale * torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert group_advantages(rewards).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-12)


def test_integer_rewards_give_float_advantages():
    assert group_advantages(torch.tensor([2, 0])).dtype == torch.float32


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"rewards must be finite; got .*(nan|inf); give"):
        group_advantages(torch.tensor([1.0, bad]))


def test_no_samples_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"at least one sample per group; got shape \(3, 0\)"):
        group_advantages(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"advantages must be one of .*got 'group_sdt'; did you mean 'group_std'"):
        group_advantages(torch.zeros(2), kind="group_sdt")
