"""The gates are what arXiv 2602.19345 asks of them. Expected numbers: the formulas, evaluated by `math`, and limits."""

import math

import pytest
import torch

from sapo.objectives.gates import GATES, apply_hard_clip, apply_soft_gate, sech_squared
from sapo.objectives.surrogates import LOG_RATIO_LIMIT

TAUS = (0.01, 0.5, 1.0, 1.05, 2.0, 12.0)


def at(ratio: float, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([ratio], dtype=torch.float64), torch.tensor([tau], dtype=torch.float64)


# By hand at r = 2, tau = 2, where tau (r - 1) = 2.
BY_HAND = {
    "sigmoid": (2 / (1 + math.exp(-2)), 1 / math.cosh(1) ** 2),
    "erf": (1 + math.sqrt(math.pi / 2) / 2 * math.erf(2 / math.sqrt(2)), math.exp(-2)),
    "arctan": (1 + math.atan(2) / 2, 1 / 5),
    "softsign": (1 + 1 / math.sqrt(5), 5**-1.5),
}


@pytest.mark.parametrize("name", GATES)
def test_gate_value_and_weight_are_the_formulas_of_the_papers(name):
    ratio, tau = at(2.0, 2.0)
    assert GATES[name].value(ratio, tau).item() == pytest.approx(BY_HAND[name][0], rel=1e-14)
    assert GATES[name].weight(ratio, tau).item() == pytest.approx(BY_HAND[name][1], rel=1e-14)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_weighs_exactly_one_at_ratio_one_whatever_the_temperature(name, tau):
    assert GATES[name].weight(*at(1.0, tau)).item() == 1.0


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", GATES)
def test_weight_never_exceeds_one_and_falls_away_from_ratio_one(name, tau):
    ratio = torch.linspace(0, 5, 2001, dtype=torch.float64)
    weight = GATES[name].weight(ratio, torch.full_like(ratio, tau))
    assert bool((weight <= 1).all())
    assert ratio[weight.argmax()].item() == 1.0
    assert bool((weight[ratio <= 1].diff() >= 0).all())
    assert bool((weight[ratio >= 1].diff() <= 0).all())
    assert weight[0] < 1
    assert weight[-1] < 1


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("name", GATES)
def test_ratio_times_weight_vanishes_far_out(name, tau):
    ratio = torch.tensor([1e5, 1e8, 1e12, 1e16], dtype=torch.float64)
    slope = ratio * GATES[name].weight(ratio, torch.full_like(ratio, tau))
    # The slowest of the family, arctan, falls as 1 / (tau^2 r).
    assert bool((slope <= 1.01 / (tau**2 * ratio)).all())


@pytest.mark.parametrize("side", ["both", "drift"])
@pytest.mark.parametrize("name", GATES)
def test_weight_is_the_derivative_of_the_value(name, side):
    ratio = torch.linspace(0.05, 4, 80, dtype=torch.float64, requires_grad=True)
    for positive in (True, False):
        sign = torch.full_like(ratio, positive, dtype=torch.bool)
        value, weight = apply_soft_gate(ratio, torch.full_like(ratio, 1.7), sign, gate=name, side=side)
        (derivative,) = torch.autograd.grad(value.sum(), ratio)
        torch.testing.assert_close(weight, derivative, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", GATES)
def test_drift_side_attenuates_only_where_the_advantage_pushes(name):
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5], dtype=torch.float64)
    positive = torch.tensor([True, True, False, False])
    tau = torch.full_like(ratio, 2.0)
    value, weight = apply_soft_gate(ratio, tau, positive, gate=name, side="drift")
    both_value, both_weight = apply_soft_gate(ratio, tau, positive, gate=name, side="both")
    # Pushed down at r = 1.5, or up at r = 0.5, a token returns to 1: weight 1, value f(1) + (r - 1). f(1) = 2 / tau = 1
    # for the sigmoid at tau = 2, and 1 for the others at any tau.
    assert weight[[0, 3]].tolist() == [1.0, 1.0]
    assert value[[0, 3]].tolist() == pytest.approx([0.5, 1.5], rel=1e-15)
    torch.testing.assert_close(weight[[1, 2]], both_weight[[1, 2]], rtol=0, atol=0)
    torch.testing.assert_close(value[[1, 2]], both_value[[1, 2]], rtol=0, atol=0)
    assert bool((weight[[1, 2]] < 1).all())


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_drift_side_has_no_jump_in_value_or_slope_at_ratio_one(name, positive):
    ratio = torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=torch.float64)
    sign = torch.full_like(ratio, positive, dtype=torch.bool)
    value, weight = apply_soft_gate(ratio, torch.full_like(ratio, 3.0), sign, gate=name, side="drift")
    torch.testing.assert_close(value.diff(), torch.full((2,), 1e-9, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-7)


def test_hard_clip_keeps_the_edge_of_the_band_as_equation_24_does():
    # Powers of two, so that 1 + eps and the ratio are the same float.
    ratio = torch.tensor([1.25, 1.25 + 1e-9, 0.5, 0.5 - 1e-9, 0.1, 9.0], dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([True, True, False, False, True, False])
    value, weight = apply_hard_clip(ratio, positive, eps_low=0.5, eps_high=0.25)
    assert weight.tolist() == [1, 0, 1, 0, 1, 1]
    assert value.tolist() == [1.25, 1.25, 0.5, 0.5, 0.1, 9.0]
    (derivative,) = torch.autograd.grad(value.sum(), ratio)
    assert derivative.tolist() == weight.tolist()


@pytest.mark.parametrize("name", GATES)
def test_gates_are_finite_and_at_their_limits_at_both_ends_of_the_log_ratio(name):
    tau = torch.ones(1, dtype=torch.float64)
    gate = GATES[name]
    far = torch.tensor([LOG_RATIO_LIMIT], dtype=torch.float64).exp()
    # Limits for tau = 1 as r -> inf, and the values at r = 0.
    top = {"sigmoid": 4.0, "erf": 1 + math.sqrt(math.pi / 2), "arctan": 1 + math.pi / 2, "softsign": 2.0}[name]
    bottom = {"sigmoid": 1 / math.cosh(0.5) ** 2, "erf": math.exp(-0.5), "arctan": 0.5, "softsign": 2**-1.5}[name]
    assert gate.value(far, tau).item() == pytest.approx(top, abs=1e-8)
    assert gate.weight(far, tau).item() == pytest.approx(0, abs=1e-16)
    assert gate.weight(1 / far, tau).item() == pytest.approx(bottom, abs=1e-8)


def test_sech_squared_does_not_overflow_and_keeps_its_tail():
    x = torch.tensor([0.0, 1.0, -20.0, 350.0, 1e300], dtype=torch.float64)
    # 4 exp(-2|x|) is the tail; 1 - tanh(20)^2 would be 0.
    expected = [1.0, 1 / math.cosh(1) ** 2, 4 * math.exp(-40), 4 * math.exp(-700), 0.0]
    assert sech_squared(x).tolist() == pytest.approx(expected, rel=1e-12, abs=0)
