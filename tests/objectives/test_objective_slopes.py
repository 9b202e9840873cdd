"""Value, slope and weight of every objective agree: closed form against autograd, finite differences and the papers."""

import dataclasses
import math

import pytest
import torch

from sapo.objectives import GATES, LOG_RATIO_LIMIT, OBJECTIVES, make_objective
from sapo.objectives.theory import sequence_mean
from support.objective_cases import UNGATED, VARIANT_IDS, VARIANTS, evaluate, flat_batch, leaf

every_variant = pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=VARIANT_IDS)


def weights_of(num_sequences: int) -> torch.Tensor:
    """Loss weights, constant within a sequence as the contract asks, different between sequences."""
    return 0.1 + torch.arange(num_sequences, dtype=torch.float64)


def token(log_ratio: float, advantage: float, dtype: torch.dtype = torch.float64):
    """One sequence of one token."""
    one = torch.tensor([0])
    return torch.tensor([log_ratio], dtype=dtype), torch.tensor([advantage], dtype=dtype), one, 1


@every_variant
def test_autograd_of_the_value_equals_the_closed_form_slope(name, hyper):
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    log_ratio_M = leaf(log_ratio_M)
    out = evaluate(make_objective(name, **hyper), log_ratio_M, advantages_M, sequence_M, batch)
    weights_M = weights_of(batch)[sequence_M]
    (gradient,) = torch.autograd.grad((weights_M * out.value_M).sum(), log_ratio_M)
    torch.testing.assert_close(gradient, weights_M * out.slope_M, rtol=1e-12, atol=1e-14)
    assert not out.slope_M.requires_grad
    assert not out.weight_M.requires_grad
    # The batch reaches every case: gates closed and open, slopes of both signs, and 0 where A = 0.
    assert bool((out.weight_M < 0.999).any()) is (name not in UNGATED)
    assert bool((out.slope_M > 0).any())
    assert bool((out.slope_M < 0).any())
    assert bool((out.slope_M[advantages_M == 0] == 0).all())


@every_variant
def test_finite_differences_of_the_value_equal_the_closed_form_slope(name, hyper):
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    objective, weights_M = make_objective(name, **hyper), weights_of(batch)[sequence_M]

    def total(log_ratio_M):
        return (weights_M * evaluate(objective, log_ratio_M, advantages_M, sequence_M, batch).value_M).sum()

    step = 1e-6
    steps = step * torch.eye(log_ratio_M.numel(), dtype=torch.float64)
    difference = torch.stack([(total(log_ratio_M + e) - total(log_ratio_M - e)) / (2 * step) for e in steps])
    slope_M = evaluate(objective, log_ratio_M, advantages_M, sequence_M, batch).slope_M
    torch.testing.assert_close(difference, weights_M * slope_M, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_sapo_is_equations_5_to_8_by_hand(ratio, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    out = make_objective("sapo").surrogate(*token(math.log(ratio), advantage))
    weight = 1 / math.cosh(tau / 2 * (ratio - 1)) ** 2
    assert out.value_M.item() == pytest.approx(4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage, rel=1e-12)
    assert out.weight_M.item() == pytest.approx(weight, rel=1e-12)
    assert out.slope_M.item() == pytest.approx(weight * ratio * advantage, rel=1e-12)


def test_sapo_gates_a_zero_advantage_with_the_negative_temperature():
    # Equation (6) reads tau_pos if A > 0, else tau_neg.
    out = make_objective("sapo", tau_pos=1.0, tau_neg=3.0).surrogate(*token(math.log(2), 0.0))
    assert out.weight_M.item() == pytest.approx(1 / math.cosh(1.5) ** 2, rel=1e-12)


def test_sapo_sequence_gate_is_equation_23_by_hand():
    log_ratio_M, advantages_M = torch.tensor([0.1, 0.5, -0.3, 0.8]).double(), torch.tensor([1.0, 1.0, -2.0, -2.0])
    out = make_objective("sapo_seq", tau_pos=1.5, tau_neg=2.5).surrogate(
        log_ratio_M, advantages_M, torch.tensor([0, 0, 1, 1]), 2
    )
    # Means of the log-ratios: 0.3 and 0.25.
    first, second = 1 / math.cosh(0.75 * 0.3) ** 2, 1 / math.cosh(1.25 * 0.25) ** 2
    assert out.slope_M.tolist() == pytest.approx([first, first, -2 * second, -2 * second], rel=1e-7)
    assert out.value_M[2].item() == pytest.approx(-2 * 2 / 2.5 * math.tanh(1.25 * 0.25), rel=1e-7)


def test_grpo_keeps_a_ratio_at_the_edge_of_its_band():
    # eps = 0 puts the edge at r = 1, which log r = 0 reaches exactly.
    for advantage in (1.0, -1.0):
        log_ratio_M, *rest = token(0.0, advantage)
        log_ratio_M = leaf(log_ratio_M)
        out = make_objective("grpo", eps_low=0, eps_high=0).surrogate(log_ratio_M, *rest)
        (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
        assert (out.weight_M.item(), out.slope_M.item(), gradient.item()) == (1.0, advantage, advantage)


def test_gspo_token_equals_gspo_in_value_clip_and_gradient_when_the_advantage_is_shared():
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    results = []
    for name in ("gspo", "gspo_token"):
        variable_M = leaf(log_ratio_M)
        out = make_objective(name, eps_low=0.1, eps_high=0.15).surrogate(variable_M, advantages_M, sequence_M, batch)
        (gradient,) = torch.autograd.grad((weights_of(batch)[sequence_M] * out.value_M).sum(), variable_M)
        results.append((out.value_M, out.weight_M, out.slope_M, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gspo_token_gives_each_token_its_own_advantage():
    log_ratio_M = leaf(torch.tensor([0.02, -0.04], dtype=torch.float64))
    out = make_objective("gspo_token", eps_low=0.5, eps_high=0.5).surrogate(
        log_ratio_M, torch.tensor([1.0, -3.0]), torch.tensor([0, 0]), 1
    )
    s = math.exp(-0.01)
    (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
    assert out.value_M.tolist() == pytest.approx([s, -3 * s], rel=1e-12)
    assert out.slope_M.tolist() == pytest.approx([s, -3 * s], rel=1e-12)
    assert gradient.tolist() == pytest.approx([s, -3 * s], rel=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_sapo_tends_to_the_unclipped_surrogate_as_tau_goes_to_zero(gate):
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    unclipped = log_ratio_M.exp() * advantages_M
    for tau in (1e-3, 1e-6):
        slope_M = (
            make_objective("sapo", tau_pos=tau, tau_neg=tau, gate=gate)
            .surrogate(log_ratio_M, advantages_M, sequence_M, batch)
            .slope_M
        )
        # 1 - f'(r) is at most 3/2 tau^2 (r-1)^2 for every gate of the family, and |r - 1| < 2 here.
        torch.testing.assert_close(slope_M, unclipped, rtol=6 * tau**2 + 1e-15, atol=0)


def test_sapo_sequence_gate_is_the_limit_of_sapo_for_small_dispersed_ratios():
    # (A1), (A2): with log r of order h both slopes are A (1 + O(h)).
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    for h in (1e-3, 1e-5):
        token_form, sequence_form = (
            make_objective(n).surrogate(h * log_ratio_M, advantages_M, sequence_M, batch).slope_M
            for n in ("sapo", "sapo_seq")
        )
        torch.testing.assert_close(token_form, sequence_form, rtol=2 * h, atol=0)


@every_variant
def test_on_policy_every_objective_has_weight_one_and_slope_equal_to_the_advantage(name, hyper):
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    out = evaluate(make_objective(name, **hyper), 0 * log_ratio_M, advantages_M, sequence_M, batch)
    assert bool((out.weight_M == 1).all())
    torch.testing.assert_close(out.slope_M, advantages_M, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.5, 0.0, -1.5])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, math.inf, -math.inf])
@every_variant
def test_beyond_the_limit_the_value_is_that_of_the_limit_and_slope_and_gradient_are_zero(
    name, hyper, log_ratio, advantage, dtype
):
    objective = make_objective(name, **hyper)
    log_ratio_M, *rest = token(log_ratio, advantage, dtype)
    log_ratio_M = leaf(log_ratio_M)
    out = evaluate(objective, log_ratio_M, *rest)
    at_limit = evaluate(objective, *token(math.copysign(LOG_RATIO_LIMIT, log_ratio), advantage, dtype))
    (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
    assert (out.slope_M.item(), gradient.item()) == (0, 0)
    assert math.isfinite(out.value_M.item())
    assert out.value_M.item() == at_limit.value_M.item()
    assert out.weight_M.item() == at_limit.weight_M.item()
    assert out.value_M.dtype == out.slope_M.dtype == out.weight_M.dtype == gradient.dtype == dtype


@pytest.mark.parametrize("log_ratio", [LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT])
@every_variant
def test_at_the_limit_autograd_and_slope_still_agree(name, hyper, log_ratio):
    log_ratio_M, *rest = token(log_ratio, -1.0)
    log_ratio_M = leaf(log_ratio_M)
    out = evaluate(make_objective(name, **hyper), log_ratio_M, *rest)
    (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
    # Near saturation autograd subtracts nearly equal numbers; the remainder is far below the advantage of 1.
    torch.testing.assert_close(gradient, out.slope_M, rtol=1e-9, atol=1e-6)


@every_variant
def test_a_nan_comes_out_as_nan_and_stays_in_its_sequence(name, hyper):
    for poisoned in ("log_ratio", "advantage"):
        log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
        log_ratio_M = log_ratio_M.clone()
        (log_ratio_M if poisoned == "log_ratio" else advantages_M)[1] = torch.nan
        log_ratio_M = leaf(log_ratio_M)
        out = evaluate(make_objective(name, **hyper), log_ratio_M, advantages_M, sequence_M, batch)
        (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
        for tensor in (out.value_M, out.slope_M, out.weight_M, gradient):
            assert tensor[1].isnan()
            assert bool(tensor[sequence_M != 0].isfinite().all())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_coupled_says_whether_a_slope_depends_on_other_tokens_of_its_sequence(name):
    log_ratio_M = leaf(torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64))
    sequence_M = torch.tensor([0, 0, 1])
    wide = {f.name: 0.9 for f in dataclasses.fields(OBJECTIVES[name]) if f.name.startswith("eps_")}
    slopes = [
        evaluate(make_objective(name, **wide), z, torch.ones(3).double(), sequence_M, 2).slope_M
        for z in (log_ratio_M, log_ratio_M + torch.tensor([0.0, 0.1, 0.0]))
    ]
    assert bool(slopes[0][0] != slopes[1][0]) is OBJECTIVES[name].coupled
    assert slopes[0][2] == slopes[1][2]


def test_sequence_objectives_average_over_the_tokens_of_each_sequence():
    # By hand; sequence 1 has no tokens.
    mean = sequence_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 2]), 3)
    assert mean.tolist() == [1.5, 0.0, 6.0]
