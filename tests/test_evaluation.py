"""Evaluation: pass@k against enumeration, intervals against theory, figures against completions counted by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from math import comb

import numpy as np
import pytest

from sapo.data import Completion, Prompt, Score
from sapo.evaluation import bootstrap, evaluate_policy, pass_at_k
from sapo.rollout.sampling import SamplingParams


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


class ScriptedEngine:
    """Answers problem i with a fixed list of texts."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts = texts

    def generate(self, requests, params, should_stop=lambda: False):
        return [
            tuple(
                Completion((1,) * (len(t) + 1), (-0.5,) * (len(t) + 1), "length" if t == "cut" else "stop", t)
                for t in self.texts[request.prompt.id]
            )
            for request in requests
        ]


class TwoProblems:
    name = "two"

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, "two", "1", answer="1")

    def held_out(self, count: int) -> list[Prompt]:
        return [Prompt(9, "two", "1", answer="1"), Prompt(9, "two", "2", answer="2")][:count]

    def verify(self, text: str, prompt: Prompt) -> Score:
        if text == "bug":
            raise RuntimeError("no")
        return Score(1.0 if text == prompt.answer else 0.0)


class PlainPolicy:
    def encode(self, text: str) -> tuple[int, ...]:
        return (0,)


def test_the_figures_are_those_of_the_completions() -> None:
    engine = ScriptedEngine([["1", "1", "3", "cut"], ["2", "1", "bug", "1"]])
    result = evaluate_policy(
        PlainPolicy(), engine, TwoProblems(), problems=5, samples=4, params=SamplingParams(max_new_tokens=4), ks=(1, 2)
    )
    assert (result.problems, result.samples) == (2, 4)
    assert result.mean.value == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert result.pass_at[1].value == result.mean.value
    assert result.pass_at[2].value == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6)) / 2)  # 1 - C(n-c, 2) / C(4, 2)
    assert result.statuses == {"scored": 6, "unparseable": 0, "truncated": 1, "verifier_error": 1}
    assert result.length_mean == pytest.approx((2 + 2 + 2 + 4 + 2 + 2 + 4 + 2) / 8)
    assert json.loads(json.dumps(result.to_json()))["completions"][1]["samples"][2]["status"] == "verifier_error"
    assert "timing" not in result.metrics()
    assert "seconds" not in result.metrics()


def test_the_same_draws_are_made_whatever_the_problems_were_numbered() -> None:
    class Renumbered(TwoProblems):
        def held_out(self, count: int) -> list[Prompt]:
            return [replace(p, id=77 + i) for i, p in enumerate(super().held_out(count))]

    texts = [["1"], ["2"]]
    results = [
        evaluate_policy(
            PlainPolicy(), ScriptedEngine(texts), task, problems=2, samples=1, params=SamplingParams(max_new_tokens=4)
        )
        for task in (TwoProblems(), Renumbered())
    ]
    assert results[0].metrics() == results[1].metrics()
