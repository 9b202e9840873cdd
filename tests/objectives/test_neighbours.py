"""What is each neighbour's own: its published loss, numbers by hand, and what it is in terms of another objective."""

import itertools
import math

import pytest
import torch

from sapo.objectives import gate_weight, make_objective, policy_loss
from support.objective_cases import LENGTHS, flat_batch, leaf, padded_batch


def token(log_ratio, advantage):
    """One sequence of one token."""
    values = torch.tensor([[log_ratio], [advantage]], dtype=torch.float64)
    return values[0], values[1], torch.tensor([0]), 1


def same(ours, theirs, rtol=1e-12):
    for field in ("value_M", "slope_M", "weight_M"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=rtol, atol=1e-15)


def published_gradient(weight_of, batch):
    """Gradient in log pi of the sum of sg(w) A log pi: w A, by autograd, with w a function of the log-ratios."""
    log_ratio_M, advantages_M, sequence_M, _ = batch
    logp_M = leaf(log_ratio_M)  # log pi_old = 0
    loss = (weight_of(logp_M, advantages_M, sequence_M).detach() * advantages_M * logp_M).sum()
    return torch.autograd.grad(loss, logp_M)[0]


@pytest.mark.parametrize(
    ("name", "eps_high", "normalizer"),
    [("dr_grpo", 0.2, "constant_length"), ("dapo", 0.28, "token_mean"), ("minirl", 0.27, "sequence_sum")],
)
def test_dr_grpo_dapo_and_minirl_are_grpo_with_other_settings(name, eps_high, normalizer):
    batch = flat_batch()
    same(make_objective(name).surrogate(*batch), make_objective("grpo", eps_high=eps_high).surrogate(*batch), rtol=0)
    expected = policy_loss("grpo", *padded_batch(), eps_high=eps_high, normalizer=normalizer, max_length=9)
    assert policy_loss(name, *padded_batch(), max_length=9) == expected


def test_minirl_has_the_gradient_of_its_published_loss():
    # -sg(r M) A log pi; M = 0 where A > 0 and r > 1.27, or A < 0 and r < 0.8.
    def weight_of(log_ratio_M, advantages_M, sequence_M):
        r = log_ratio_M.exp()
        return r * ~(((advantages_M > 0) & (r > 1.27)) | ((advantages_M < 0) & (r < 0.8)))

    expected = published_gradient(weight_of, flat_batch())
    torch.testing.assert_close(make_objective("minirl").surrogate(*flat_batch()).slope_M, expected, rtol=1e-12, atol=0)


def every_response(logp_V, length=2):
    """All responses of that length over the vocabulary, (V^T, T): each equally likely under a uniform policy."""
    ids_BT = torch.tensor(list(itertools.product(range(len(logp_V)), repeat=length)))
    return ids_BT, logp_V[ids_BT]


def expected_reward_gradient(logits_V, rewards_B):
    """Gradient of the expected reward of responses of independent tokens, by enumeration."""
    _, logp_BT = every_response(logits_V.log_softmax(0))
    return torch.autograd.grad((logp_BT.sum(1).exp() * rewards_B).sum(), logits_V)[0]


@pytest.mark.parametrize(
    ("name", "logits"), [("reinforce", [0.0] * 3), ("rloo", [0.0] * 3), ("rloo", [0.1, -0.2, 0.15])]
)
def test_reinforce_on_policy_and_rloo_off_policy_too_are_the_gradient_of_the_expected_reward(name, logits):
    # The mean over all responses is the expectation under the uniform pi_old that sampled them.
    logits_V = leaf(torch.tensor(logits, dtype=torch.float64))
    rewards_B = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0, 2.5, 1.5, -0.5], dtype=torch.float64)
    expected_V = expected_reward_gradient(logits_V, rewards_B)
    _, logp_BT = every_response(logits_V.log_softmax(0))
    old_BT = torch.full_like(logp_BT, -math.log(3))
    wide = {"eps_low": 0.99, "eps_high": 0.99} if name == "rloo" else {}
    loss = policy_loss(name, logp_BT, old_BT, rewards_B, torch.ones_like(logp_BT), **wide)
    torch.testing.assert_close(torch.autograd.grad(-loss, logits_V)[0], expected_V, rtol=1e-12, atol=1e-15)


def test_reinforce_is_the_limit_of_sapo_as_tau_goes_to_zero():
    cold = make_objective("sapo", tau_pos=1e-7, tau_neg=1e-7).surrogate(*flat_batch())
    ours = make_objective("reinforce").surrogate(*flat_batch())
    torch.testing.assert_close(ours.slope_M, cold.slope_M, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.value_M, flat_batch()[0].exp() * flat_batch()[1], rtol=1e-15, atol=0)


def test_rloo_by_hand():
    # W = 2 x 0.6 = 1.2 and 0.5 x 0.5 = 0.25; the second is below 1 - 0.2 with A < 0: clipped. Halves: two tokens each.
    log_ratio_M = torch.tensor([2.0, 0.6, 0.5, 0.5], dtype=torch.float64).log()
    out = make_objective("rloo", eps_high=0.3).surrogate(
        log_ratio_M, torch.tensor([3.0, 3.0, -2.0, -2.0]), torch.tensor([0, 0, 1, 1]), 2
    )
    assert out.value_M.tolist() == pytest.approx([1.8, 1.8, -0.8, -0.8], rel=1e-12)
    assert out.slope_M.tolist() == pytest.approx([3.6, 3.6, 0, 0], rel=1e-12)
    assert out.weight_M.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand_below_and_above_the_cap(advantage):
    cispo = make_objective("cispo", ratio_cap=1.5)
    below, above = (cispo.surrogate(*token(math.log(r), advantage)) for r in (0.25, 3.0))
    assert (below.weight_M.item(), below.slope_M.item()) == pytest.approx((1, 0.25 * advantage), rel=1e-12)
    assert (above.weight_M.item(), above.slope_M.item()) == pytest.approx((0.5, 1.5 * advantage), rel=1e-12)
    assert below.value_M.item() == pytest.approx(0.25 * advantage, rel=1e-12)
    assert above.value_M.item() == pytest.approx(1.5 * (1 + math.log(2)) * advantage, rel=1e-12)


def test_cispo_has_the_gradient_of_its_published_loss_and_no_jump_at_the_cap():
    expected = published_gradient(lambda z, a, s: z.exp().clamp(max=1.2), flat_batch())
    cispo = make_objective("cispo", ratio_cap=1.2)
    torch.testing.assert_close(cispo.surrogate(*flat_batch()).slope_M, expected, rtol=1e-12, atol=0)
    below, above = (cispo.surrogate(*token(math.log(1.2) + h, 1.0)) for h in (-1e-9, 1e-9))
    assert above.value_M.item() - below.value_M.item() == pytest.approx(1.2 * 2e-9, rel=1e-6)
    assert above.slope_M.item() == pytest.approx(below.slope_M.item(), rel=1e-8)


def with_probability(objective, ratio, advantage, probability):
    """The surrogate of one token of that pi_old."""
    old_logprob_M = torch.tensor([math.log(probability)], dtype=torch.float64)
    return objective.surrogate(*token(math.log(ratio), advantage), old_logprob_M)


def test_maspo_is_a_gaussian_on_the_side_of_drift_only():
    maspo = make_objective("maspo", sigma=0.5, alpha=0.0, beta_pos=0.0, beta_neg=0.0)
    gaussian = math.exp(-(0.75**2) / (2 * 0.25))
    for ratio, advantage, weight in ((1.75, 2.0, gaussian), (0.25, -2.0, gaussian), (0.25, 2.0, 1), (1.75, -2.0, 1)):
        out = with_probability(maspo, ratio, advantage, 0.3)
        assert out.weight_M.item() == pytest.approx(weight, rel=1e-12)
        assert out.slope_M.item() == pytest.approx(weight * ratio * advantage, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "probability", "width"),
    [
        (1.5, 1.0, 1.0, 1.03),  # the limiter leaves a certain token alone; the controller widens
        (1.5, 2.0, 0.01, 0.01**-0.3 * 1.06),
        (0.5, -2.0, 0.01, 0.01**-0.3 / 1.06),
        (1.5, 2.0, 1e-9, 10 * 1.06),  # 1e-9 to the -0.3 is 501: held at sigma_max
        (9.0, 400.0, 1.0, 10.0),  # 1 + 0.03 x 400 = 13: held at 10
        (0.5, -400.0, 1.0, 0.1),  # 1 / 13: held at 0.1
    ],
)
def test_maspo_by_hand_widens_for_rare_tokens_and_by_the_advantage(ratio, advantage, probability, width):
    out = with_probability(make_objective("maspo"), ratio, advantage, probability)
    weight = math.exp(-((ratio - 1) ** 2) / (2 * width**2))
    assert out.weight_M.item() == pytest.approx(weight, rel=1e-12)
    assert out.slope_M.item() == pytest.approx(weight * ratio * advantage, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "probability", "weight"),
    [
        (1.3, 1.0, 0.6, 1),  # 0.6 -> 0.78: up by 0.18
        (1.4, 1.0, 0.6, 0),  # up by 0.24
        (15.0, 1.0, 0.01, 1),  # up by 0.14: a rare token may grow
        (22.0, 1.0, 0.01, 0),  # up by 0.21
        (0.75, -1.0, 0.6, 1),  # down by 0.15
        (0.6, -1.0, 0.6, 0),  # down by 0.24
        (0.001, -1.0, 0.19, 1),  # there is no more to lose
        (0.1, 1.0, 0.9, 1),  # the way back is open
        (1.5, -1.0, 0.9, 1),
        (25.0, 1.0, 0.001, 0.8),  # 20 / 25: the cap
        (25.0, -1.0, 0.001, 0.8),
    ],
)
def test_dppo_by_hand_keeps_a_token_by_the_probability_that_moved(ratio, advantage, probability, weight):
    out = with_probability(make_objective("dppo_tv"), ratio, advantage, probability)
    assert out.weight_M.item() == pytest.approx(weight, rel=1e-12)
    assert out.slope_M.item() == pytest.approx(weight * ratio * advantage, rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dppo_keeps_a_token_at_the_edge_of_its_band(advantage):
    # 0.5 -> 0.75 or 0.25 and a band of 0.25: every number is exact in binary, exp(log 0.5) too.
    dppo = make_objective("dppo_tv", tv_low=0.25, tv_high=0.25)
    ratio = 1 + 0.5 * advantage
    inside, outside = (with_probability(dppo, ratio * (1 + h * advantage), advantage, 0.5) for h in (-1e-9, 1e-9))
    assert (inside.weight_M.item(), outside.weight_M.item()) == (1, 0)
    assert outside.value_M.item() == pytest.approx(inside.value_M.item(), rel=1e-8)


def test_dppo_value_has_no_jump_at_the_cap_nor_at_an_edge_beyond_it():
    # pi_old = 0.01: the edge is at r = 21, beyond the cap of 20.
    dppo = make_objective("dppo_tv")
    for r in (20.0, 21.0):
        below, above = (with_probability(dppo, r + h, 1.0, 0.01) for h in (-1e-9, 1e-9))
        assert above.value_M.item() == pytest.approx(below.value_M.item(), rel=1e-9)
    assert with_probability(dppo, 30.0, 1.0, 0.01).value_M.item() == pytest.approx(20 * (1 + math.log(21 / 20)))


def test_dppo_has_the_gradient_of_its_published_loss():
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    old_logprob_M = torch.linspace(-0.1, -3, log_ratio_M.numel(), dtype=torch.float64)
    logp_M = leaf(old_logprob_M + log_ratio_M)
    moved_M = logp_M.exp() - old_logprob_M.exp()
    kept_M = torch.where(advantages_M > 0, moved_M <= 0.1, moved_M >= -0.1)
    assert 0 < int(kept_M.sum()) < kept_M.numel()
    ratio_M = (logp_M - old_logprob_M).exp().clamp(max=1.2)
    expected = torch.autograd.grad(((ratio_M * kept_M).detach() * advantages_M * logp_M).sum(), logp_M)[0]
    dppo = make_objective("dppo_tv", tv_low=0.1, tv_high=0.1, ratio_cap=1.2)
    out = dppo.surrogate(log_ratio_M, advantages_M, sequence_M, batch, old_logprob_M)
    torch.testing.assert_close(out.slope_M, expected, rtol=1e-12, atol=1e-15)


def test_dppo_of_certain_tokens_is_grpo_with_a_clip_of_the_same_width():
    # pi_old = 1: pi - pi_old = r - 1.
    ours = make_objective("dppo_tv", tv_low=0.2, tv_high=0.3).surrogate(*flat_batch(), torch.zeros(15).double())
    same(ours, make_objective("grpo", eps_low=0.2, eps_high=0.3).surrogate(*flat_batch()))


@pytest.mark.parametrize("name", ["dppo_tv", "maspo"])
def test_an_objective_that_gates_by_probability_asks_for_it(name):
    expected = rf"{name} gates a token by its probability, so log pi_old must be given; got None; pass old_logprob_M"
    with pytest.raises(ValueError, match=expected):
        make_objective(name).surrogate(*flat_batch())
    logp, old, advantages, mask = padded_batch()
    with pytest.raises(ValueError, match=expected):
        gate_weight(name, logp - old, advantages, mask)


def gmpo_by_loops(log_ratios, advantage, low, high):
    """The published objective of one response: geometric mean of token ratios, each clipped where A pushes it."""
    total = 0.0
    for z in log_ratios:
        sign = 1 if advantage > 0 else -1
        total += sign * min(sign * z, sign * max(-low, min(z, high)))
    return math.exp(total / len(log_ratios)) * advantage


def test_gmpo_is_the_geometric_mean_of_ratios_clipped_on_the_side_of_drift():
    log_ratio_M, advantages_M, sequence_M, batch = flat_batch()
    gmpo = make_objective("gmpo", log_low=0.3, log_high=0.2)
    out = gmpo.surrogate(log_ratio_M, advantages_M, sequence_M, batch)
    for i in (i for i in range(batch) if LENGTHS[i]):
        here = sequence_M == i
        value = gmpo_by_loops(log_ratio_M[here].tolist(), advantages_M[here][0].item(), 0.3, 0.2)
        assert out.value_M[here].tolist() == pytest.approx([value] * LENGTHS[i], rel=1e-12)


def test_gmpo_by_hand():
    # A > 0: 0.5 is cut to 0.4, -0.9 is not cut; the mean is -0.25. The clipped token gets no gradient.
    out = make_objective("gmpo").surrogate(
        torch.tensor([0.5, -0.9]).double(), torch.tensor([2.0, 2.0]), torch.tensor([0, 0]), 1
    )
    value = 2 * math.exp(-0.25)
    assert out.value_M.tolist() == pytest.approx([value, value], rel=1e-7)
    assert out.slope_M.tolist() == pytest.approx([0, value], rel=1e-7)
    assert out.weight_M.tolist() == [0, 1]


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.25, 1.0), (-0.5, -1.0)])
def test_gmpo_keeps_a_log_ratio_at_the_edge_of_its_band(log_ratio, advantage):
    log_ratio_M, *rest = token(log_ratio, advantage)
    log_ratio_M = leaf(log_ratio_M)
    out = make_objective("gmpo", log_low=0.5, log_high=0.25).surrogate(log_ratio_M, *rest)
    (gradient,) = torch.autograd.grad(out.value_M.sum(), log_ratio_M)
    assert out.weight_M.item() == 1
    assert gradient.item() == pytest.approx(math.exp(log_ratio) * advantage, rel=1e-12)


def test_gmpo_without_clipping_is_gspo_without_clipping():
    log_ratio_M, *rest = flat_batch()
    ours = make_objective("gmpo", log_low=9.0, log_high=9.0).surrogate(log_ratio_M, *rest)
    same(ours, make_objective("gspo", eps_low=0.99, eps_high=0.99).surrogate(log_ratio_M, *rest))


def test_luspo_is_gspo_times_the_length_of_the_response():
    logp, old, advantages, mask = padded_batch()
    wide = {"eps_low": 0.1, "eps_high": 0.15}
    expected = sum(
        length * policy_loss("gspo", logp[[i]], old[[i]], advantages[[i]], mask[[i]], num_sequences=6, **wide)
        for i, length in enumerate(LENGTHS)
    )
    ours = policy_loss("luspo", logp, old, advantages, mask, **wide)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def gamma_weight(w, k, rate):
    return w**k * math.exp(rate * (1 - w))


def test_vespo_by_hand():
    # W = 2 x 0.75 = 1.5 with A > 0 (k 2, lambda 3); W = 0.5 with A < 0 (k 3, lambda 2).
    log_ratio_M = torch.tensor([2.0, 0.75, 0.5], dtype=torch.float64).log()
    out = make_objective("vespo").surrogate(log_ratio_M, torch.tensor([2.0, 2.0, -1.0]), torch.tensor([0, 0, 1]), 2)
    first, second = 1.5**2 * math.exp(-1.5), 0.5**3 * math.exp(1)
    assert out.slope_M.tolist() == pytest.approx([2 * first, 2 * first, -second], rel=1e-12)
    assert out.weight_M.tolist() == pytest.approx([first / 1.5, first / 1.5, second / 0.5], rel=1e-12)


def test_vespo_gates_a_zero_advantage_with_the_positive_settings():
    # The paper reads (2, 3) if A >= 0.
    out = make_objective("vespo").surrogate(*token(math.log(2), 0.0))
    assert out.weight_M.item() == pytest.approx(gamma_weight(2.0, 2.0, 3.0) / 2, rel=1e-12)


def test_vespo_value_is_the_integral_of_its_weight():
    # For k = 1 the integral of exp(lambda (1 - W)) over W is elementary: exp(lambda) (1 - exp(-lambda W)) / lambda.
    for w in (0.1, 1.0, 4.0):
        out = make_objective("vespo", k_pos=1.0, lambda_pos=2.0).surrogate(*token(math.log(w), 1.5))
        assert out.value_M.item() == pytest.approx(1.5 * math.exp(2) * (1 - math.exp(-2 * w)) / 2, rel=1e-12)


def test_vespo_has_the_gradient_of_its_published_loss():
    def weight_of(log_ratio_M, advantages_M, sequence_M):
        weights = []
        for i, a in zip(sequence_M.tolist(), advantages_M.tolist(), strict=True):
            w = math.exp(log_ratio_M[sequence_M == i].sum().item())
            weights.append(gamma_weight(w, *((2.0, 3.0) if a >= 0 else (3.0, 2.0))))
        return torch.tensor(weights, dtype=torch.float64)

    expected = published_gradient(weight_of, flat_batch())
    torch.testing.assert_close(make_objective("vespo").surrogate(*flat_batch()).slope_M, expected, rtol=1e-12, atol=0)


def test_vespo_weight_peaks_at_k_over_lambda_and_vanishes_at_both_ends():
    vespo = make_objective("vespo")
    for advantage, k, rate in ((1.0, 2.0, 3.0), (-1.0, 3.0, 2.0)):
        grid = [k / rate * f for f in (0.9, 1.0, 1.1)]
        low, top, high = (abs(vespo.surrogate(*token(math.log(w), advantage)).slope_M.item()) for w in grid)
        assert top == pytest.approx((k / rate) ** k * math.exp(rate - k), rel=1e-12)
        assert max(low, high) < top
        for far in (-19.0, 19.0):
            assert abs(vespo.surrogate(*token(far, advantage)).slope_M.item()) < 1e-12
