"""The sampler: draws follow the distribution that transformers' own processors leave, and log-probabilities are its."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sapo.rollout.local.cpu import native
from sapo.rollout.local.sampling import sample_tokens, truncate
from sapo.rollout.params import SamplingParams
from sapo.utils.rng import token_uniforms

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """With the draw of packed.c, and without."""
    if request.param == "torch":
        monkeypatch.setenv("SAPO_NATIVE", "0")
        return
    found = native.kernels(torch.device("cpu"), torch.float32)
    if found is None or not found.packed_precisions:
        pytest.skip("packed.c is not for this processor, or there is no compiler")


def params(**options):
    return SamplingParams(max_new_tokens=4, **options)


def random_logits(rows, vocabulary, seed=0, scale=2.0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def uniforms(count, seed=0):
    return torch.from_numpy(token_uniforms(seed, 0, np.arange(count), 1)[:, 0])


def processed(logits_RV, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The logits after transformers' processors, in the order its generate() applies them."""
    steps = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    for step in steps:
        logits_RV = step(None, logits_RV)
    return logits_RV


@every_setting
def test_draws_follow_the_distribution_transformers_processors_leave(options):
    logits_V, count = random_logits(1, 12, seed=3)[0], 20_000
    tokens_R, _ = sample_tokens(logits_V.expand(count, -1).clone(), uniforms(count), params(**options))
    expected_V = processed(logits_V[None], **options)[0].double().softmax(-1).numpy()
    counts_V = np.bincount(tokens_R, minlength=12)
    alive_V = expected_V > 0
    assert counts_V[~alive_V].sum() == 0
    assert stats.chisquare(counts_V[alive_V], expected_V[alive_V] * count).pvalue > 1e-4


@every_setting
def test_logprobs_are_log_softmax_of_the_processed_logits(options):
    logits_RV = random_logits(500, 30, seed=4)
    expected_RV = torch.log_softmax(processed(logits_RV, **options), dim=-1)
    tokens_R, logprobs_R = sample_tokens(logits_RV.clone(), uniforms(500), params(**options))
    assert logprobs_R.dtype == torch.float32
    torch.testing.assert_close(logprobs_R, expected_RV[range(500), tokens_R], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": k} for k in (1, 5, 29, 30, 1000)),
        *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.95, 0.9999)),
        *({"min_p": p} for p in (1e-6, 0.05, 0.5, 1.0)),
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_the_tokens_kept_are_those_transformers_keeps(options):
    for seed, scale in ((0, 0.3), (1, 2.0), (2, 8.0)):
        logits_RV = random_logits(200, 30, seed, scale)
        kept_RV = torch.isfinite(truncate(logits_RV.clone(), params(**options)))
        assert torch.equal(kept_RV, torch.isfinite(processed(logits_RV, **options)))
        assert bool(kept_RV.any(-1).all())


def test_each_row_is_drawn_from_its_own_logits_by_its_own_uniform():
    # By hand: cumulative probabilities (1/4, 1/2, 1) and (1/2, 3/4, 1).
    logits_RV = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])).repeat_interleave(3, 0)
    uniform_R = torch.tensor([0.1, 0.3, 0.6, 0.3, 0.6, 0.9], dtype=torch.float64)
    tokens_R, logprobs_R = sample_tokens(logits_RV, uniform_R, params())
    assert tokens_R.tolist() == [0, 1, 2, 0, 1, 2]
    expected = [math.log(p) for p in (0.25, 0.25, 0.5, 0.5, 0.25, 0.25)]
    assert logprobs_R.tolist() == pytest.approx(expected, abs=1e-6)


def test_greedy_takes_the_most_likely_token_with_its_untempered_logprob():
    logits_RV = random_logits(50, 20, seed=5)
    expected_R = logits_RV.argmax(-1)
    tokens_R, logprobs_R = sample_tokens(logits_RV.clone(), uniforms(50), params(temperature=0.0))
    assert torch.equal(tokens_R, expected_R)
    assert torch.equal(logprobs_R, torch.log_softmax(logits_RV, -1)[range(50), expected_R])


def test_a_temperature_near_zero_is_nearly_greedy():
    logits_RV = random_logits(50, 20, seed=5)
    tokens_R, logprobs_R = sample_tokens(logits_RV.clone(), uniforms(50), params(temperature=1e-4))
    assert torch.equal(tokens_R, logits_RV.argmax(-1))
    assert bool((logprobs_R > -1e-3).all())


EDGES = (5e-324, 2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53)
"""The smallest double, the ends of what the generator gives, and the borders of the cells below."""


@pytest.mark.parametrize("uniform", EDGES)
@pytest.mark.parametrize("cut", ["logits", "top_k", "underflow"])
def test_a_token_of_probability_zero_is_never_drawn(cut, uniform):
    # Four tokens of probability 1/4 at odd places; those between, before and after them have none.
    nothing = {"logits": -torch.inf, "top_k": -1.0, "underflow": -1e4}[cut]
    logits_RV = torch.full((1, 9), nothing)
    logits_RV[:, 1::2] = 0.0
    options = {"top_k": 4} if cut == "top_k" else {}
    tokens_R, logprobs_R = sample_tokens(logits_RV, torch.tensor([uniform], dtype=torch.float64), params(**options))
    assert tokens_R.item() in (1, 3, 5, 7)
    assert logprobs_R.item() == pytest.approx(-math.log(4), abs=1e-6)


def test_the_border_between_two_tokens_belongs_to_the_second():
    # By hand: four equal tokens are [0, 1/4), [1/4, 1/2), ...: a uniform below the cumulative probability draws.
    uniform_R = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert sample_tokens(torch.zeros(3, 4), uniform_R, params())[0].tolist() == [1, 2, 3]
    assert sample_tokens(torch.zeros(3, 4), uniform_R - 1e-15, params())[0].tolist() == [0, 1, 2]


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token():
    logits_RV = random_logits(2, 40, seed=6, scale=0.5)
    tokens_R, _ = sample_tokens(logits_RV, torch.tensor([EDGES[0], EDGES[-1]], dtype=torch.float64), params())
    assert tokens_R.tolist() == [0, 39]


def test_fifty_thousand_equal_tokens_are_told_apart_to_the_last():
    # By hand: u = (k + 1/2) / V draws token k.
    vocabulary = 50_000
    wanted_R = torch.tensor([0, 1, 24_999, 49_000, 49_997, 49_998, 49_999])
    logits_RV = torch.zeros(len(wanted_R), vocabulary)
    tokens_R, logprobs_R = sample_tokens(logits_RV, (wanted_R.double() + 0.5) / vocabulary, params())
    assert torch.equal(tokens_R, wanted_R)
    assert logprobs_R.tolist() == pytest.approx([-math.log(vocabulary)] * len(wanted_R), abs=1e-5)


def test_a_tail_of_fifty_thousand_tokens_behind_a_likely_one_is_told_apart_to_the_last():
    # By hand: the tail holds 1/1000, 2e-8 a token, a third of what float32 can add to a sum near 1.
    tail, mass = 50_000, 1e-3
    logits_V = torch.full((1 + tail,), math.log(mass / tail / (1 - mass)))
    logits_V[0] = 0.0
    wanted_R = torch.tensor([0, 1, 2, 24_999, 25_000, 49_997, 49_998, 49_999])
    uniform_R = 1 - mass * (1 - (wanted_R.double() + 0.5) / tail)
    tokens_R, _ = sample_tokens(logits_V.expand(len(wanted_R), -1).clone(), uniform_R, params())
    assert torch.equal(tokens_R, 1 + wanted_R)


def test_draws_from_fifty_thousand_unequal_tokens_invert_the_cumulative_distribution():
    # The reference sums in float64; the float32 of log-probabilities may move a border by 1e-6.
    logits_V, count = random_logits(1, 50_000, seed=7)[0], 64
    uniform_R = torch.cat([uniforms(count - 2), torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64)])
    tokens_R, _ = sample_tokens(logits_V.expand(count, -1).clone(), uniform_R, params())
    probability_V = logits_V.double().softmax(-1)
    above_R = probability_V.cumsum(-1)[tokens_R]
    assert bool((uniform_R <= above_R + 1e-6).all())
    assert bool((uniform_R >= above_R - probability_V[tokens_R] - 1e-6).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -0.1}, "temperature must be finite and not negative (0 is greedy); got -0.1"),
        ({"temperature": math.inf}, "temperature must be finite and not negative (0 is greedy); got inf"),
        ({"temperature": math.nan}, "temperature must be finite and not negative (0 is greedy); got nan"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1]; 1 keeps every token; got 0.0"),
        ({"top_p": 1.1}, "top_p must lie in (0, 1]; 1 keeps every token; got 1.1"),
        ({"top_k": -1}, "top_k must not be negative; 0 keeps every token; got -1"),
        ({"min_p": -0.1}, "min_p must lie in [0, 1]; 0 keeps every token; got -0.1"),
        ({"min_p": 1.5}, "min_p must lie in [0, 1]; 0 keeps every token; got 1.5"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused_with_the_rule(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.0}, False),
        ({"top_p": 0.99}, False),
        ({"top_k": 50}, False),
        ({"min_p": 0.01}, False),
    ],
    ids=str,
)
def test_the_distribution_is_full_unless_a_token_is_cut_off(options, full):
    assert params(**options).full_distribution is full


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_top_p_of_a_large_vocabulary_keeps_what_sorting_all_of_it_keeps(top_p):
    # Rows from sharp, where a few tokens hold top_p, to nearly flat, where the first 256 do not and all are sorted.
    scale_R1 = torch.tensor([12.0, 6.0, 4.0, 2.0, 0.5])[:, None]
    logits_RV = random_logits(5, 5000, seed=8, scale=1.0) * scale_R1
    kept_RV = torch.isfinite(truncate(logits_RV.clone(), params(top_p=top_p)))
    expected_RV = torch.isfinite(processed(logits_RV, top_p=top_p))
    # transformers sums 5000 float32 probabilities from the smallest up: its border may be a token off in the tail.
    assert bool(((kept_RV ^ expected_RV).sum(-1) <= 1 + expected_RV.sum(-1) // 500).all())
    assert int(expected_RV[0].sum()) < 256 < int(expected_RV[-1].sum())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_a_logprob_that_is_none(wrong):
    logits_RV = random_logits(3, 40)
    logits_RV[1, 7] = wrong
    tokens_R, logprobs_R = sample_tokens(logits_RV, uniforms(3), params())
    assert logprobs_R.isnan().tolist() == [False, True, False]
    assert ((tokens_R >= 0) & (tokens_R < 40)).all()
