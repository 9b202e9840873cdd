"""The paired tests: against hand, against enumeration, against scipy, and under a null hypothesis that is true."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from sapo.data import Status
from sapo.errors import ConfigError
from sapo.evaluation import comparison
from sapo.evaluation.comparison import Discordance, compare, sign_flip_p_value
from support.evaluation_cases import answered, counted, results, sample


def compared(a, b, **more):
    return compare(a.to_json(), b.to_json(), **more)


def test_the_p_value_is_the_share_of_all_choices_of_signs_that_are_as_far_from_0() -> None:
    for differences in ([3, -1, 2, 5], [1, 1, -1, 0, 2], [4, -4], [7], [2, 2, 2, -2, 6, 0, 0, 1, -3]):
        sums = [sum(s) for s in itertools.product(*((-d, d) for d in differences))]
        by_enumeration = np.mean([abs(s) >= abs(sum(differences)) for s in sums])
        assert sign_flip_p_value(np.array(differences)) == pytest.approx(by_enumeration, abs=1e-15), differences


def record(correct, samples: int) -> dict:
    """Of results.json what a comparison reads."""
    problems = [{"key": str(i), "prompt": "", "correct": int(c), "greedy": None} for i, c in enumerate(correct)]
    return {"results": {"threshold": 1.0, "samples": samples, "per_problem": problems}}


@pytest.mark.parametrize("seed", range(5))
def test_the_p_value_is_scipys(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    a, b = generator.binomial(4, 0.5, size=(2, 12))
    # 2**12 choices of signs, all of them tried: scipy's test is exact as well.
    expected = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.sum(y - x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p_value(b - a) == pytest.approx(expected.pvalue, rel=1e-12)


def test_many_problems_and_samples_are_exact_too() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    differences = generator.integers(-16, 17, size=120)
    ways = Counter({0: 1})  # sum -> choices of signs that give it, in Python's whole numbers
    for d in map(abs, differences.tolist()):
        ways = Counter({s: ways[s - d] + ways[s + d] for s in {t + e for t in ways for e in (-d, d)}})
    as_far = sum(count for s, count in ways.items() if abs(s) >= abs(int(differences.sum())))
    assert sign_flip_p_value(differences) == pytest.approx(float(Fraction(as_far, 2**120)), rel=1e-12)


def test_signs_are_drawn_where_the_exact_distribution_would_take_too_long(monkeypatch) -> None:
    differences = np.array([97, -101, 89, 83, 5, -7, 64, 2, 31, -90])
    exact = sign_flip_p_value(differences)
    monkeypatch.setattr(comparison, "MOST_STEPS", 0)
    drawn = sign_flip_p_value(differences)
    assert drawn != exact
    # Of 100,000 draws the standard deviation is sqrt(p (1 - p) / 100000).
    assert abs(drawn - exact) < 4 * np.sqrt(exact * (1 - exact) / comparison.DRAWS)


def test_of_two_equal_models_the_p_value_is_below_any_level_about_as_often_as_it_says() -> None:
    """The problems differ widely, the models do not: an unpaired test would hardly ever reject."""
    generator = np.random.Generator(np.random.PCG64(1))
    levels, trials = (0.05, 0.2, 0.5), 1000
    p_values = []
    for _ in range(trials):
        rates = generator.beta(0.4, 0.6, size=60)
        a, b = generator.binomial(8, rates), generator.binomial(8, rates)
        p_values.append(sign_flip_p_value(b - a))
    for level in levels:
        share = np.mean(np.array(p_values) <= level)
        deviation = np.sqrt(level * (1 - level) / trials)
        # Exact tests on whole numbers reject a little less often than the level; never clearly more.
        assert level - 6 * deviation < share < level + 3.5 * deviation, (level, share)


def test_of_two_different_models_the_paired_test_finds_out_what_two_intervals_do_not_show() -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    rates = generator.beta(0.3, 0.3, size=200)
    a, b = generator.binomial(8, rates), generator.binomial(8, np.minimum(1, rates + 0.06))
    result = compared(counted(a, 8), counted(b, 8))
    assert result.means[0].high > result.means[1].low, "the two intervals overlap"
    assert result.p_value < 0.01
    assert result.difference.low > 0


def test_the_interval_is_that_of_the_problems_differences() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    rates = generator.beta(0.4, 0.6, size=150) * 0.8
    a, b = generator.binomial(4, rates), generator.binomial(4, rates + 0.1)
    difference = compare(record(a, 4), record(b, 4)).difference
    # The normal limit of a mean of 150 differences.
    half_width = 1.96 * np.std((b - a) / 4) / np.sqrt(150)
    assert difference.high - difference.low == pytest.approx(2 * half_width, rel=0.1)
    unpaired = 1.96 * np.sqrt((np.var(a / 4) + np.var(b / 4)) / 150)
    assert half_width < 0.6 * unpaired, "most of the spread is that of the problems, and they share it"


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (3, 3, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemars_p_value_is_that_of_fair_coins(only_a: int, only_b: int, expected: float) -> None:
    assert Discordance(only_a, only_b).p_value == pytest.approx(expected, rel=1e-12)


def test_mcnemars_p_value_is_exact_up_to_rounding() -> None:
    for only_a, only_b in itertools.product(range(0, 60, 7), repeat=2):
        n, fewer = only_a + only_b, min(only_a, only_b)
        tails = Fraction(2 * sum(math.comb(n, i) for i in range(fewer + 1)), 2**n)  # of Python's exact integers
        expected = float(min(Fraction(1), tails))
        assert Discordance(only_a, only_b).p_value == pytest.approx(expected, rel=1e-13), (only_a, only_b)


def test_with_one_sample_of_each_the_two_tests_are_the_same() -> None:
    generator = np.random.Generator(np.random.PCG64(4))
    a, b = generator.integers(2, size=(2, 80))
    result = compared(counted(a, 1), counted(b, 1))
    assert result.single.only_a == int(((a == 1) & (b == 0)).sum())
    assert result.p_value == pytest.approx(result.single.p_value, rel=1e-12)
    assert compared(counted(a, 2), counted(b, 2)).single is None


def test_different_numbers_of_samples_are_compared_as_fractions() -> None:
    # c/n: 1/2 and 2/4 are the same, 0/2 and 1/4 are not, whatever floats make of thirds.
    result = compared(counted([1, 0, 2], 2), counted([2, 1, 4], 4))
    assert (result.better, result.worse) == (1, 0)
    assert result.difference.value == pytest.approx((0 + 1 / 4 + 0) / 3)
    thirds = compared(counted([1, 2], 3), counted([2, 4], 6))
    assert (thirds.better, thirds.worse, thirds.p_value) == (0, 0, 1.0)


def test_the_figures_are_those_of_the_problems() -> None:
    result = compared(counted([4, 2, 0, 1], 4), counted([4, 4, 1, 0], 4))
    assert (result.problems, result.better, result.worse) == (4, 2, 1)
    assert (result.means[0].value, result.means[1].value) == (7 / 16, 9 / 16)
    assert result.difference.value == 2 / 16
    # d = 0, 2, 1, -1: of the 8 choices of signs of 2, 1, 1 the sums 4, 2, 2, 0, 0, -2, -2, -4; 6 are at least 2 away.
    assert result.p_value == 6 / 8


def test_greedy_completions_are_compared_where_both_have_them() -> None:
    a = results([answered(i, sample("x"), greedy=sample("g", float(i < 2))) for i in range(6)])
    b = results([answered(i, sample("x"), greedy=sample("g", float(i != 1))) for i in range(6)])
    assert compared(a, b).greedy == Discordance(only_a=1, only_b=4)
    assert compared(a, counted([0] * 6, 1)).greedy is None


def test_problems_are_matched_by_question_whatever_their_order_and_format() -> None:
    asked = [answered(i, sample("x", float(i % 2)), prompt=f"q{i}", seen=f"Q: q{i}") for i in range(5)]
    again = [answered(4 - i, sample("x", float(i % 2)), prompt=f"q{i}", seen=f"<s>q{i}") for i in range(5)][::-1]
    result = compared(results(asked), results(again))
    assert (result.better, result.worse, result.difference.value) == (0, 0, 0.0)


def test_repeated_rows_are_matched_one_by_one() -> None:
    a = results([answered(i, sample("x", float(i)), prompt="same") for i in range(2)])
    assert compared(a, a).problems == 2
    assert compared(a, a).means[0].value == 0.5


def test_other_problems_are_refused_and_one_of_them_is_named() -> None:
    a, b = counted([1, 0, 1], 1), counted([1, 0], 1)
    with pytest.raises(ConfigError, match=r"got 3 and 2 with 2 in common, 'question 2' is in first only"):
        compared(a, b, names=("first", "second"))
    with pytest.raises(ConfigError, match="with 0 in common"):
        compared(a, counted([1, 0, 1], 1, answer="2"))  # the same questions with other reference answers


def test_other_thresholds_are_refused() -> None:
    problems = [answered(0, sample("x", 0.5))]
    with pytest.raises(ConfigError, match=r"got 1.0 and 0.5; evaluate again with one --threshold"):
        compared(results(problems), results(problems, threshold=0.5))


def test_the_comparison_can_be_written_as_json() -> None:
    record = compared(counted([4, 2, 0, 1], 4), counted([4, 4, 1, 0], 4), names=("x", "y")).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == "sapo.comparison/1"
    assert (record["better"], record["worse"], record["equal"]) == (2, 1, 1)
    assert (record["a"]["name"], record["b"]["mean"]["value"]) == ("x", 9 / 16)


def test_completions_that_failed_leave_the_pass_rates_that_are_compared() -> None:
    lost, right, wrong = sample("", status=Status.ENVIRONMENT_ERROR), sample("x", 1.0), sample("y")
    a = results([answered(0, right, lost, wrong), answered(1, lost, lost, lost), answered(2, wrong, wrong, right)])
    b = results([answered(0, right, right, lost), answered(1, right, right, right), answered(2, lost, lost, right)])
    found = compared(a, b)
    assert found.problems == 2, "of the second problem nothing is known of a"
    assert (found.means[0].value, found.means[1].value) == (pytest.approx((1 / 2 + 1 / 3) / 2), 1.0)
    assert found.difference.value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found.better, found.worse) == (2, 0)
    nothing = results([answered(i, lost, lost, lost) for i in range(3)])
    with pytest.raises(ConfigError, match="problems that both judged; got none of 3"):
        compared(a, nothing)


def test_greedy_completions_that_failed_leave_their_pairs() -> None:
    lost, right, wrong = sample("", status=Status.VERIFIER_ERROR), sample("x", 1.0), sample("y")
    a = results([answered(i, right, greedy=greedy) for i, greedy in enumerate((right, lost, wrong))])
    b = results([answered(i, right, greedy=greedy) for i, greedy in enumerate((wrong, right, right))])
    greedy = compared(a, b).greedy
    assert (greedy.only_a, greedy.only_b) == (1, 1)


def test_graded_rewards_are_compared_by_their_means() -> None:
    a = results(
        [answered(i, sample("x", reward), sample("y", reward + 0.2)) for i, reward in enumerate((0.1, 0.3, 0.5))]
    )
    b = results([answered(i, sample("x", reward), sample("y", reward)) for i, reward in enumerate((0.4, 0.4, 0.9))])
    found = compared(a, b)
    assert (found.means[0].value, found.means[1].value) == (pytest.approx(0.4), pytest.approx(1.7 / 3))
    # .4 - .2, .4 - .4 and .9 - .6: one tie, and of the four signs of the others ++ and -- are as far from 0.
    assert found.difference.value == pytest.approx(0.5 / 3)
    assert (found.better, found.worse, found.p_value) == (2, 0, 0.5)
    assert found.greedy is None
    assert found.to_json()["figure"] == "reward_mean"
