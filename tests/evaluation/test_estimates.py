"""pass@k against enumeration, the majority against cases by hand, intervals against theory."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from scipy import stats

from sapo.evaluation import estimates
from sapo.evaluation.estimates import bootstrap, bootstrap_ratio, majority_share, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_pass_at_k_is_the_chance_that_some_of_k_chosen_completions_is_right(n: int) -> None:
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        right = [i < c for i in range(n)]
        choices = list(itertools.combinations(right, k))
        by_enumeration = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(by_enumeration), (n, k, c)


def test_pass_at_k_does_not_overflow_where_the_binomials_would() -> None:
    n, c, k = 4096, 3, 2048
    exact = 1 - comb(n - c, k) / comb(n, k)  # Python's integers are exact
    assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(exact, rel=1e-12)


def test_pass_at_1_is_the_share_of_right_completions() -> None:
    correct = np.array([0, 1, 3, 4])
    np.testing.assert_allclose(pass_at_k(4, correct, 1), correct / 4)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in 1..samples \(4\); got {k}"):
        pass_at_k(4, np.array([1]), k)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    covered = 0
    for trial in range(200):
        estimate = bootstrap(generator.binomial(4, 0.3, size=200) / 4, seed=trial, resamples=500)
        covered += estimate.low <= 0.3 <= estimate.high
    # 95% of 200 is 190, with a standard deviation of 3.1; percentile intervals fall a little short.
    assert 180 <= covered <= 199


@pytest.mark.parametrize("problems", [2, 17, 256, 1000])
def test_the_bootstrap_interval_is_that_of_scipy(problems: int) -> None:
    values = np.random.Generator(np.random.PCG64(problems)).binomial(4, 0.3, size=problems) / 4
    own = bootstrap(values, seed=5)
    resampled = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.Generator(np.random.PCG64(5))
    )
    # The same draws; the percentiles are interpolated at shares that may differ in their last bit.
    assert (own.low, own.high) == pytest.approx(tuple(resampled.confidence_interval), rel=1e-14)


def test_many_problems_are_resampled_in_parts_without_another_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.Generator(np.random.PCG64(1)).random(100)
    at_once = bootstrap(values)
    monkeypatch.setattr(estimates, "DRAWN_AT_ONCE", 250)
    assert bootstrap(values) == at_once


def test_the_bootstrap_resamples_problems_and_not_completions() -> None:
    # Every problem all right or all wrong: the interval is that of 100 coin tosses, however many samples each had.
    values = np.repeat([0.0, 1.0], 50)
    estimate = bootstrap(values)
    half_width = 1.96 * 0.5 / np.sqrt(100)
    assert estimate.value == 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * half_width, rel=0.1)


def test_the_bootstrap_of_a_constant_is_that_constant() -> None:
    estimate = bootstrap(np.full(10, 0.25))
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("7 8 7", "1 0 1", 1.0),
        ("7 8 8", "1 0 0", 0.0),
        ("7 8", "1 0", 1 / 2),  # a tie of two, one of them right
        ("7 8 9", "1 0 0", 1 / 3),
        ("7 8 8 7 9", "1 0 0 1 0", 1 / 2),  # 9 has fewer votes and no part in the tie
        ("- - - 7", "0 0 0 1", 1.0),  # no answer, no vote
        ("- -", "0 0", 0.0),  # nobody votes: wrong
        ("- -", "1 1", 0.0),  # right, the verifier says, but of what answer it does not
        ("7 7 7 8", "1 0 1 0", 2 / 3),  # a verifier that judged equal answers differently
    ],
)
def test_the_majority_is_the_most_frequent_answer_and_a_tie_counts_with_its_expectation(
    answers: str, right: str, expected: float
) -> None:
    given = [None if a == "-" else a for a in answers.split()]
    judged = [r == "1" for r in right.split()]
    assert majority_share(given, judged) == pytest.approx(expected)
    assert majority_share(given[::-1], judged[::-1]) == pytest.approx(expected), "the order of samples means nothing"


def test_a_ratio_is_the_mean_over_completions_and_not_of_the_problems_means() -> None:
    # 1 completion of 0.0 and 3 of 1.0: 3/4, where the mean of the problems' means would be 1/2.
    assert bootstrap_ratio(np.array([0.0, 3.0]), np.array([1, 3])).value == 0.75


def test_a_ratio_resamples_problems() -> None:
    # As above, 100 problems all 0 or all 1, four completions each: the interval of 100 coin tosses.
    estimate = bootstrap_ratio(np.repeat([0.0, 4.0], 50), np.full(100, 4))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(100), rel=0.1)


def test_a_ratio_leaves_out_resamples_without_a_completion_that_has_the_figure() -> None:
    # One problem of eight has it: about a third of the resamples miss that one, and none may become 0/0.
    estimate = bootstrap_ratio(np.array([2.0, *[0.0] * 7]), np.array([4, *[0] * 7]))
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


def test_a_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a completion that has it"):
        bootstrap_ratio(np.zeros(3), np.zeros(3))
