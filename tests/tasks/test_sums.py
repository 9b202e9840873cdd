"""Sums: exact answers, disjoint sides up to commutation, balanced examples."""

from __future__ import annotations

import pytest

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks import make_task
from sapo.tasks.generated.sums import SumsTask


def operands(text: str) -> tuple[frozenset[int], str] | tuple[tuple[int, int], str]:
    a, sign, b, _ = text.split()
    pair = (int(a), int(b))
    return (frozenset(pair), sign) if sign == "+" else (pair, sign)


@pytest.mark.parametrize("options", [{"digits": 1}, {"digits": 2, "operations": ["add"]}])
def test_no_held_out_problem_is_trained_on_even_the_other_way_round(options: dict) -> None:
    held_out = {operands(p.text) for p in SumsTask(**options, seed=1).held_out(10_000)}
    other = SumsTask(**options, seed=2)
    trained = {operands(other.train_prompt(i).text) for i in range(3000)}
    assert held_out
    assert not held_out & trained
    shots = {operands(question) for question, _ in SumsTask(**options).shots(4)}
    assert not held_out & shots


def test_answers_are_right_and_never_negative() -> None:
    task = make_task("sums", seed=3, digits=2)
    for i in range(500):
        prompt = task.train_prompt(i)
        a, sign, b, equals = prompt.text.split()
        expected = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert equals == "="
        assert int(prompt.answer) == expected >= 0
        assert prompt.id == i
        assert prompt.metadata["subject"] == {"+": "add", "-": "subtract"}[sign]


def test_operations_take_turns() -> None:
    signs = [SumsTask().train_prompt(i).text.split()[1] for i in range(6)]
    assert signs == ["+", "-"] * 3
    assert [q.split()[1] for q, _ in SumsTask().shots(4)] == ["+", "-"] * 2


def test_held_out_problems_are_distinct_and_the_same_for_a_seed() -> None:
    first = [p.text for p in SumsTask(seed=5).held_out(30)]
    assert first == [p.text for p in SumsTask(seed=5).held_out(30)]
    assert len({operands(t) for t in first}) == 30
    assert first != [p.text for p in SumsTask(seed=6).held_out(30)]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 7", Score(1.0, answer="7")),
        ("7\n", Score(1.0, answer="7")),
        (" 8", Score(0.0, answer="8")),
        (" 07", Score(0.0, Status.UNPARSEABLE, "not an integer and nothing else: '07'")),
        (" seven", Score(0.0, Status.UNPARSEABLE, "not an integer and nothing else: 'seven'")),
        ("", Score(0.0, Status.UNPARSEABLE, "not an integer and nothing else: ''")),
        ("7 7", Score(0.0, Status.UNPARSEABLE, "not an integer and nothing else: '7 7'")),
    ],
)
def test_the_number_alone_is_the_answer(text: str, score: Score) -> None:
    assert SumsTask().verify(text, Prompt(id=0, task="sums1", text="3 + 4 =", answer="7")) == score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": 0}, r"digits must be a whole number in 1\.\.3; got 0"),
        ({"digits": 4}, "got 4"),
        ({"operations": "add"}, "operations must be a list"),
        ({"operations": ["ad"]}, "did you mean 'add'"),
        ({"operations": []}, "operations must be a list"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be between 0 and 1"),
        ({"held_out_fraction": 0.001}, "no problem of 1 digits is held out"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        SumsTask(**options)
