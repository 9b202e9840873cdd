"""From completion to score: every way to get a reward of 0 keeps its own status."""

from dataclasses import replace

import numpy as np
import pytest

from sapo.data import Completion, Prompt, Score, Status
from sapo.tasks import score_completions, status_counts

PROMPT = Prompt(id=0, task="t", text="?", answer="1")


class Judge:
    """A task whose verifier returns, or raises, what it was made with."""

    name = "judge"

    def __init__(self, verdict):
        self.verdict = verdict
        self.seen = []

    def train_prompt(self, index):
        return PROMPT

    def held_out(self, count):
        return []

    def verify(self, text, prompt):
        self.seen.append((text, prompt))
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


def completion(text="1", finish_reason="stop"):
    return Completion(token_ids=(5, 1), logprobs=(-0.5, -0.1), finish_reason=finish_reason, text=text)


def score_of(verdict, **kwargs):
    return score_completions(Judge(verdict), PROMPT, [completion(**kwargs)])[0].score


@pytest.mark.parametrize("score", [Score(1.0), Score(0.0), Score(-0.5), Score(0.0, Status.UNPARSEABLE, "no number")])
def test_a_verifiers_score_is_kept(score):
    assert score_of(score) == score


def test_only_the_score_changes_and_the_order_stays():
    judge = Judge(Score(1.0))
    completions = [completion("a"), completion("b"), completion("c", "length")]
    scored = score_completions(judge, PROMPT, completions)
    assert [replace(c, score=Score(0.0)) for c in scored] == completions
    assert [c.score.reward for c in scored] == [1.0, 1.0, 0.0]
    assert judge.seen == [("a", PROMPT), ("b", PROMPT)]
    assert isinstance(scored, tuple)


def test_a_truncated_completion_is_not_verified():
    score = score_of(Score(1.0), finish_reason="length")
    assert (score.reward, score.status) == (0.0, Status.TRUNCATED)
    assert "2 tokens" in score.detail


def test_a_truncated_completion_is_verified_when_the_task_wants_it():
    judge = Judge(Score(0.25))
    judge.score_truncated = True
    assert score_completions(judge, PROMPT, [completion(finish_reason="length")])[0].score == Score(0.25)


def test_an_exception_in_the_verifier_is_an_error_with_its_type_and_message():
    score = score_of(KeyError("answer"))
    assert score == Score(0.0, Status.VERIFIER_ERROR, "KeyError: 'answer'")


def test_a_figure_that_is_no_finite_number_is_an_error():
    score = score_of(Score(1.0, figures={"cell_accuracy": float("nan")}))
    assert (score.reward, score.status) == (0.0, Status.VERIFIER_ERROR)
    assert "figures must be finite numbers; got cell_accuracy=nan" in score.detail
    assert score_of(Score(1.0, figures={"cell_accuracy": 0.5})).figures == {"cell_accuracy": 0.5}


def test_a_long_exception_is_cut():
    assert len(score_of(ValueError("x" * 10_000)).detail) == 500


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_reward_that_is_not_finite_is_an_error(reward):
    score = score_of(Score(reward))
    assert (score.reward, score.status) == (0.0, Status.VERIFIER_ERROR)
    assert "must be finite" in score.detail


@pytest.mark.parametrize(("reward", "kind"), [("1.0", "str"), (None, "NoneType"), ([1.0], "list"), (1j, "complex")])
def test_a_reward_that_is_no_number_is_an_error(reward, kind):
    score = score_of(Score(reward))
    assert (score.reward, score.status) == (0.0, Status.VERIFIER_ERROR)
    assert f"got {kind}" in score.detail


@pytest.mark.parametrize("verdict", [1.0, None, "right"])
def test_a_task_that_returns_no_score_is_an_error(verdict):
    score = score_of(verdict)
    assert (score.reward, score.status) == (0.0, Status.VERIFIER_ERROR)
    assert "must return a Score" in score.detail


@pytest.mark.parametrize("reward", [True, 1, np.float32(1), np.int64(1), np.bool_(True)])
def test_every_kind_of_number_becomes_a_float(reward):
    score = score_of(Score(reward))
    assert score == Score(1.0)
    assert type(score.reward) is float


def test_status_counts_has_all_four_statuses_even_at_zero():
    assert status_counts([]) == {"scored": 0, "unparseable": 0, "truncated": 0, "verifier_error": 0}
    scored = [
        *score_completions(Judge(Score(1.0)), PROMPT, [completion(), completion(), completion(finish_reason="length")]),
        *score_completions(Judge(Score(0.0, Status.UNPARSEABLE)), PROMPT, [completion()]),
        *score_completions(Judge(RuntimeError()), PROMPT, [completion()] * 3),
    ]
    assert status_counts(scored) == {"scored": 2, "unparseable": 1, "truncated": 1, "verifier_error": 3}
