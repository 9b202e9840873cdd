"""The KL estimators: unbiased, and pulling the way their expectation says."""

from __future__ import annotations

import pytest
import torch

from sapo.objectives import KL_ESTIMATORS, LOG_RATIO_LIMIT, KLPenalty

LOGITS_V = torch.tensor([0.3, -1.2, 2.0, 0.0, 0.7], dtype=torch.float64)
REFERENCE_V = torch.log_softmax(torch.tensor([1.0, 0.1, 0.9, -0.5, 0.2], dtype=torch.float64), -1)


def expectations(estimator: str) -> tuple[float, torch.Tensor]:
    """E[value] and E[slope grad log pi] over y ~ pi, summed over the vocabulary, with respect to the logits."""
    logits_V = LOGITS_V.clone().requires_grad_(True)
    logp_V = torch.log_softmax(logits_V, -1)
    penalty = KLPenalty(coefficient=1.0, estimator=estimator)
    value_V, slope_V = penalty.value_and_slope(logp_V.detach() - REFERENCE_V)
    probability_V = logp_V.detach().exp()
    gradient_V = torch.autograd.grad((probability_V * slope_V * logp_V).sum(), logits_V)[0]
    return float((probability_V * value_V).sum()), gradient_V


def divergence(of: str) -> tuple[float, torch.Tensor]:
    """KL(pi || ref) or KL(ref || pi) and its gradient by autograd."""
    logits_V = LOGITS_V.clone().requires_grad_(True)
    logp_V = torch.log_softmax(logits_V, -1)
    if of == "pi||ref":
        kl = (logp_V.exp() * (logp_V - REFERENCE_V)).sum()
    else:
        kl = (REFERENCE_V.exp() * (REFERENCE_V - logp_V)).sum()
    return kl.item(), torch.autograd.grad(kl, logits_V)[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_estimates_of_the_divergence(estimator: str) -> None:
    assert expectations(estimator)[0] == pytest.approx(divergence("pi||ref")[0], rel=1e-12)


@pytest.mark.parametrize(("estimator", "of"), [("k1", "pi||ref"), ("k2", "pi||ref"), ("k3", "ref||pi")])
def test_the_expected_pull_is_the_gradient_of_the_divergence_the_table_names(estimator: str, of: str) -> None:
    torch.testing.assert_close(expectations(estimator)[1], divergence(of)[1], rtol=1e-12, atol=1e-14)


def test_the_derivative_of_k1_itself_would_be_noise_alone() -> None:
    logits_V = LOGITS_V.clone().requires_grad_(True)
    logp_V = torch.log_softmax(logits_V, -1)
    gradient_V = torch.autograd.grad((logp_V.detach().exp() * logp_V).sum(), logits_V)[0]
    assert gradient_V.abs().max() < 1e-15


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_slope_is_the_derivative_of_the_value(estimator: str) -> None:
    difference_M = torch.linspace(-3, 3, 25, dtype=torch.float64)
    penalty, step = KLPenalty(coefficient=1.0, estimator=estimator), 1e-6
    above, below = (penalty.value_and_slope(difference_M + s)[0] for s in (step, -step))
    torch.testing.assert_close(
        penalty.value_and_slope(difference_M)[1], (above - below) / (2 * step), rtol=1e-7, atol=1e-8
    )


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_far_apart_policies_give_the_finite_value_and_pull_of_the_bound(estimator: str) -> None:
    penalty = KLPenalty(coefficient=1.0, estimator=estimator)
    far = penalty.value_and_slope(torch.tensor([-100.0, 100.0]))
    at_the_bound = penalty.value_and_slope(torch.tensor([-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT]))
    for left, right in zip(far, at_the_bound, strict=True):
        assert torch.isfinite(left).all()
        assert torch.equal(left, right)
    assert far[1][0] < 0 < far[1][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": 0.0}, "coefficient must be .*positive.*; got 0"),
        ({"coefficient": -1.0}, "coefficient must be .*positive.*; got -1"),
        ({"coefficient": 0.1, "estimator": "k4"}, "KL estimator must be one of k1, k2, k3; got 'k4'"),
    ],
)
def test_a_penalty_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLPenalty(**options)
