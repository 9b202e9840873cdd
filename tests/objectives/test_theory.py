"""The bound between token gates and the sequence gate, and the two measures of what a gate leaves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.objectives import (
    discrepancy_bound,
    effective_tokens,
    effective_update_ratio,
    gate_discrepancy,
    gate_weight,
    sequence_gate,
    variance,
)

# Rounding of a mean of up to 40 numbers in [0, 1]: 40 x 2.2e-16 in each of the two gates, and as much again.
ROUNDING = 4e-14

calm = st.lists(st.floats(-1, 1), min_size=1, max_size=40)
wild = st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=40)
two_point = st.builds(
    lambda a, b, n, m: [a] * n + [b] * m, st.floats(-30, 30), st.floats(-30, 30), st.integers(1, 20), st.integers(1, 20)
)
outlier = st.builds(
    lambda body, far: [*body, far], st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=39), st.floats()
)
log_ratios = st.one_of(calm, wild, two_point, outlier.filter(lambda z: abs(z[-1]) < 1e100))


def one_sequence(values):
    return torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.int64), 1


@settings(max_examples=400, deadline=None, derandomize=True)
@given(log_ratios, st.floats(0.01, 50))
def test_discrepancy_never_exceeds_a_quarter_tau_squared_times_the_variance(values, tau):
    discrepancy = gate_discrepancy(*one_sequence(values), tau=tau).item()
    bound = discrepancy_bound(*one_sequence(values), tau=tau).item()
    assert discrepancy <= bound * (1 + 1e-12) + ROUNDING
    assert 0 <= discrepancy <= 1


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.05, 10.0])
def test_the_bound_is_tight_for_two_points_around_zero(tau):
    # By hand: z = +-d has mean 0 and Var = d^2, so D = 1 - sech^2(tau d / 2) = tanh^2(tau d / 2) -> tau^2 d^2 / 4.
    d = 1e-3 / tau
    batch = one_sequence([d, -d])
    discrepancy = gate_discrepancy(*batch, tau=tau).item()
    assert discrepancy == pytest.approx(math.tanh(tau * d / 2) ** 2, rel=1e-8)
    assert 0.999999 < discrepancy / discrepancy_bound(*batch, tau=tau).item() <= 1


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.05, 10.0])
def test_the_second_derivative_of_the_gate_is_at_most_half_tau_squared(tau):
    z = torch.linspace(-20 / tau, 20 / tau, 4001, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(sequence_gate(z, tau).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert second.abs().max().item() == pytest.approx(tau**2 / 2, rel=1e-9)
    assert z[second.abs().argmax()].item() == pytest.approx(0, abs=1e-12)


def test_variance_is_the_population_variance_of_each_sequence():
    # By hand: (1, 3) has mean 2 and variance 1; one token has none; sequence 2 has no tokens.
    sequence_M = torch.tensor([0, 0, 1])
    assert variance(torch.tensor([1.0, 3.0, 9.0]), sequence_M, 3).tolist() == [1.0, 0.0, 0.0]


def test_empty_sequences_and_empty_batches_give_zero():
    sequence_M = torch.tensor([0, 0, 2])
    log_ratio_M = torch.tensor([0.3, -0.2, 0.1])
    for measure in (gate_discrepancy, discrepancy_bound):
        assert measure(log_ratio_M, sequence_M, 3, tau=1.0)[1].item() == 0
    nothing = torch.zeros(0)
    assert gate_discrepancy(nothing, nothing.long(), 2, tau=1.0).tolist() == [0, 0]
    assert effective_update_ratio(nothing).item() == 0
    assert effective_tokens(nothing).item() == 0
    assert effective_tokens(torch.zeros(3)).item() == 0


def test_each_sequence_may_have_a_temperature_of_its_own():
    log_ratio_M, sequence_M = torch.tensor([0.3, -0.2, 0.5, -0.1]).double(), torch.tensor([0, 0, 1, 1])
    tau_B = torch.tensor([1.0, 1.05], dtype=torch.float64)
    for measure in (gate_discrepancy, discrepancy_bound):
        mixed_B = measure(log_ratio_M, sequence_M, 2, tau=tau_B)
        for i, tau in enumerate((1.0, 1.05)):
            assert mixed_B[i] == measure(log_ratio_M, sequence_M, 2, tau=tau)[i]


def test_effective_update_ratio_of_a_hard_clip_is_one_minus_the_clip_fraction():
    generator = torch.Generator().manual_seed(2)
    log_ratio_BT = 0.5 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    mask_BT = torch.rand(6, 9, generator=generator) < 0.7
    clipped = total = 0
    for row, column in mask_BT.nonzero().tolist():
        ratio, positive = math.exp(log_ratio_BT[row, column]), advantages[row] > 0
        clipped += (ratio > 1.27) if positive else (ratio < 0.8)
        total += 1
    assert 0 < clipped < total
    weight_BT = gate_weight("grpo", log_ratio_BT, advantages, mask_BT)
    assert effective_update_ratio(weight_BT[mask_BT]).item() == pytest.approx(1 - clipped / total, rel=1e-14)
    assert bool((weight_BT[~mask_BT] == 0).all())


def test_effective_tokens_is_kish_sample_size():
    # By hand: equal weights count fully whatever their size; (3 + 1)^2 / (9 + 1) = 1.6.
    assert effective_tokens(torch.full((5,), 1e-200, dtype=torch.float64)).item() == pytest.approx(5, rel=1e-15)
    assert effective_tokens(torch.tensor([3.0, 1.0])).item() == pytest.approx(1.6, rel=1e-12)
    assert effective_tokens(torch.tensor([1.0, 0.0, 0.0])).item() == 1
