"""The loss of a padded batch: padding, splits and order leave it alone; wrong calls are refused."""

import functools
import math

import pytest
import torch

from sapo.objectives import NORMALIZERS, OBJECTIVES, gate_weight, make_objective, policy_loss
from support.objective_cases import (
    ADVANTAGES,
    AMPLIFYING,
    LENGTHS,
    NORMALIZER_OPTIONS,
    VARIANT_IDS,
    VARIANTS,
    evaluate,
    leaf,
    padded_batch,
)

every_variant = pytest.mark.parametrize(("name", "hyper"), VARIANTS, ids=VARIANT_IDS)
every_normalizer = pytest.mark.parametrize("options", NORMALIZER_OPTIONS, ids=NORMALIZERS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
GARBAGE = (math.nan, math.inf, -math.inf, 1e38)


def loss_and_gradient(name, logp_BT, logp_old_BT, advantages, mask_BT, **options):
    logp_BT = leaf(logp_BT)
    options = {"normalizer": "sequence_mean", **options}
    loss = policy_loss(name, logp_BT, logp_old_BT, advantages, mask_BT, **options)
    (gradient_BT,) = torch.autograd.grad(loss, logp_BT)
    assert loss.dim() == 0
    assert loss.dtype == gradient_BT.dtype == logp_BT.dtype
    return loss, gradient_BT


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_sapo_loss_of_two_sequences_by_hand():
    # r = 2 and 1 for A = 1 (tau 1); r = 0.5 for A = -1 (tau 1.05). 1/G sum_i 1/|y_i| sum_t f(r) A, sign turned.
    logp_BT = torch.tensor([[math.log(2), 0.0], [math.log(0.5), 9.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[1, 1], [1, 0]])
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss, gradient_BT = loss_and_gradient("sapo", logp_BT, torch.zeros(2, 2), advantages, mask_BT)
    first, second = (4 / (1 + math.exp(-1)) + 2) / 2, -4 / 1.05 / (1 + math.exp(1.05 / 2))
    assert loss.item() == pytest.approx(-(first + second) / 2, rel=1e-12)
    expected = [[-2 / math.cosh(0.5) ** 2 / 4, -1 / 4], [0.5 / math.cosh(1.05 / 4) ** 2 / 2, 0]]
    torch.testing.assert_close(gradient_BT, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("advantage", [0.8, -0.8])
def test_on_policy_gradient_on_logits_is_equation_9(advantage):
    logits_V = leaf(torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64))
    logp_V = logits_V.log_softmax(0)
    sampled = 3
    logp_BT = logp_V[sampled].reshape(1, 1)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss = policy_loss("sapo", logp_BT, logp_BT.detach(), advantages, torch.ones(1, 1))
    (gradient_V,) = torch.autograd.grad(-loss, logits_V)
    # (1 - pi(y)) A for the sampled token, -pi(v) A for the others.
    expected = -logp_V.detach().exp() * advantage
    expected[sampled] += advantage
    close(gradient_V, expected)


@every_normalizer
@every_variant
def test_microbatch_split_leaves_gradient_unchanged(name, hyper, options):
    logp, old, advantages, mask = padded_batch()
    loss, gradient_BT = loss_and_gradient(name, logp, old, advantages, mask, **options, **hyper)
    counts = {"num_sequences": len(LENGTHS), "num_tokens": sum(LENGTHS)}
    for split in (
        [[0], [1], [2], [3], [4], [5]],
        [[0, 1], [2, 3, 4, 5]],
        [[5, 2, 0], [3], [1, 4]],
        [[2], [5, 4, 3, 1, 0]],
    ):
        total, gathered_BT = torch.zeros_like(loss), torch.zeros_like(gradient_BT)
        for rows in split:
            batch = (logp[rows], old[rows], advantages[rows], mask[rows])
            part, gathered_BT[rows] = loss_and_gradient(name, *batch, **counts, **options, **hyper)
            total = total + part
        close(total, loss)
        close(gathered_BT, gradient_BT)


@every_normalizer
@every_variant
def test_padding_leaves_loss_and_gradient_unchanged(name, hyper, options):
    loss, gradient_BT = loss_and_gradient(name, *padded_batch(), **options, **hyper)
    for width in (5, 11):
        wide_loss, wide_gradient_BT = loss_and_gradient(name, *padded_batch(width=width), **options, **hyper)
        close(wide_loss, loss)
        close(wide_gradient_BT[:, :5], gradient_BT[:, :5])
        assert bool((wide_gradient_BT[:, 5:] == 0).all())


@every_normalizer
@every_variant
def test_order_of_sequences_leaves_gradient_unchanged(name, hyper, options):
    batch = padded_batch()
    loss, gradient_BT = loss_and_gradient(name, *batch, **options, **hyper)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]):
        permuted_loss, permuted_BT = loss_and_gradient(name, *(x[order] for x in batch), **options, **hyper)
        close(permuted_loss, loss)
        close(permuted_BT, gradient_BT[order])


@both_dtypes
@pytest.mark.parametrize("garbage", GARBAGE)
@every_variant
def test_padding_may_hold_anything(name, hyper, garbage, dtype):
    logp, old, advantages, mask = padded_batch(dtype)
    advantages_BT = advantages[:, None].expand_as(logp).clone()
    loss, gradient_BT = loss_and_gradient(name, logp, old, advantages, mask, **hyper)
    weight_BT = gate_weight(name, logp - old, advantages, mask, logp_old_BT=old, **hyper)
    dirty = [torch.where(mask, x, torch.tensor(garbage, dtype=dtype)) for x in (logp, old, advantages_BT)]
    dirty_loss, dirty_BT = loss_and_gradient(name, *dirty, mask, **hyper)
    assert dirty_loss.item() == loss.item()
    assert torch.equal(dirty_BT, gradient_BT)
    assert torch.equal(gate_weight(name, dirty[0] - dirty[1], dirty[2], mask, logp_old_BT=dirty[1], **hyper), weight_BT)


@both_dtypes
@pytest.mark.parametrize("far", [100.0, -100.0])
@every_variant
def test_a_token_a_hundred_nats_off_leaves_loss_and_gradient_finite(name, hyper, far, dtype):
    logp, old, advantages, mask = padded_batch(dtype)
    logp[:, 0] = old[:, 0] + far
    loss, gradient_BT = loss_and_gradient(name, logp, old, advantages, mask, **hyper)
    assert loss.isfinite()
    assert bool(gradient_BT.isfinite().all())
    assert bool((gradient_BT[torch.tensor(ADVANTAGES) == 0] == 0).all())
    # Sequence 1 is that one token, whose log-ratio, alone or as a mean, is beyond the limit; token gates cut each.
    assert gradient_BT[1, 0].item() == 0
    if not OBJECTIVES[name].coupled:
        assert bool((gradient_BT[:, 0] == 0).all())
        assert gradient_BT[4, 1].item() != 0


@every_variant
def test_an_empty_row_counts_as_a_sequence_and_gets_no_gradient(name, hyper):
    logp, old, advantages, mask = padded_batch()
    empty = LENGTHS.index(0)
    rest = [i for i in range(len(LENGTHS)) if i != empty]
    loss, gradient_BT = loss_and_gradient(name, logp, old, advantages, mask, **hyper)
    without, rest_BT = loss_and_gradient(name, logp[rest], old[rest], advantages[rest], mask[rest], **hyper)
    # Six sequences below the mean instead of five.
    close(6 * loss, 5 * without)
    close(6 * gradient_BT[rest], 5 * rest_BT)
    assert bool((gradient_BT[empty] == 0).all())


@both_dtypes
@every_normalizer
@every_variant
def test_a_batch_without_response_tokens_has_zero_loss_and_zero_gradient(name, hyper, options, dtype):
    logp, old, advantages, mask = padded_batch(dtype)
    loss, gradient_BT = loss_and_gradient(name, logp, old, advantages, torch.zeros_like(mask), **options, **hyper)
    assert loss.item() == 0
    assert bool((gradient_BT == 0).all())


@every_variant
def test_a_nan_at_a_response_token_is_not_hidden(name, hyper):
    for i in range(3):
        batch = list(padded_batch())
        batch[i].view(len(LENGTHS), -1)[0, 0] = torch.nan
        loss, gradient_BT = loss_and_gradient(name, *batch, **hyper)
        assert loss.isnan()
        assert gradient_BT[0, 0].isnan()


def test_gate_weight_is_that_of_the_surrogate_and_zero_on_padding():
    logp, old, advantages, mask = padded_batch()
    for name, hyper in VARIANTS:
        weight_BT = gate_weight(name, logp - old, advantages, mask, logp_old_BT=old, **hyper)
        sequence_M = mask.nonzero()[:, 0]
        out = evaluate(make_objective(name, **hyper), (logp - old)[mask], advantages[sequence_M], sequence_M, len(mask))
        assert torch.equal(weight_BT[mask], out.weight_M)
        assert bool((weight_BT[~mask] == 0).all())
        assert bool((weight_BT[mask] <= 1).all()) is (name not in AMPLIFYING)


def test_old_logprobs_and_advantages_get_no_gradient():
    logp, old, advantages, mask = padded_batch()
    logp, old, advantages = leaf(logp), leaf(old), leaf(advantages)
    for name in OBJECTIVES:
        policy_loss(name, logp, old, advantages, mask, max_length=6).backward()
    assert old.grad is None
    assert advantages.grad is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_sequence_objectives_refuse_advantages_that_vary_within_a_sequence(name):
    logp, old, advantages, mask = padded_batch()
    shared_BT = advantages[:, None].expand_as(logp).clone()
    loss = functools.partial(policy_loss, name, logp, old, mask_BT=mask, max_length=6)
    close(loss(shared_BT), loss(advantages))
    varied_BT = shared_BT.clone()
    varied_BT[3, 1] = 2.0
    assert OBJECTIVES[name].shared_advantage is (name in ("gspo", "sapo_seq", "rloo", "gmpo", "luspo", "vespo"))
    if OBJECTIVES[name].shared_advantage:
        with pytest.raises(
            ValueError, match=rf"{name} takes one advantage per sequence; got -0.4 to 2 within sequence 3"
        ):
            loss(varied_BT)
        with pytest.raises(ValueError, match="one advantage per sequence"):
            gate_weight(name, logp - old, varied_BT, mask)
    else:
        assert loss(varied_BT) != loss(advantages)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_a_normalizer_the_loss_is_that_of_the_objectives_source(name):
    batch = padded_batch()
    # As the sources have it; the docstring of each objective cites it.
    source = {
        "dr_grpo": "constant_length",
        "dapo": "token_mean",
        "cispo": "token_mean",
        "vespo": "token_mean",
        "maspo": "token_mean",
        "dppo_tv": "token_mean",
        "minirl": "sequence_sum",
        "reinforce": "sequence_sum",
        "rloo": "sequence_sum",
        "luspo": "sequence_sum",
    }.get(name, "sequence_mean")
    expected = {n: policy_loss(name, *batch, normalizer=n, max_length=9) for n in NORMALIZERS}
    assert len({loss.item() for loss in expected.values()}) == len(NORMALIZERS)
    assert policy_loss(name, *batch, max_length=9) == expected[source]


def test_dr_grpo_asks_for_the_length_it_divides_by():
    with pytest.raises(ValueError, match="constant_length needs a positive max_length; got None; pass the longest"):
        policy_loss("dr_grpo", *padded_batch())


def test_shapes_that_do_not_fit_are_refused_by_name():
    logp, old, advantages, mask = padded_batch()
    with pytest.raises(ValueError, match=r"must all be \(B, T\); got \(6, 6\), \(6, 5\) and mask \(6, 6\)"):
        policy_loss("sapo", logp, old[:, :5], advantages, mask)
    with pytest.raises(ValueError, match=r"must all be \(B, T\); got \(6, 6\), \(6, 6\) and mask \(5, 6\)"):
        policy_loss("sapo", logp, old, advantages, mask[:5])
    with pytest.raises(ValueError, match=r"advantages must be \(B,\) = \(6,\) or \(B, T\) = \(6, 6\); got \(6, 1\)"):
        policy_loss("sapo", logp, old, advantages[:, None], mask)
    with pytest.raises(ValueError, match=r"must all be \(B, T\); got \(6,\)"):
        policy_loss("sapo", logp[:, 0], old[:, 0], advantages, mask[:, 0])
    with pytest.raises(ValueError, match=r"mask must be bool or hold only 0 and 1"):
        policy_loss("sapo", logp, old, advantages, 0.5 * mask)
