"""One question about many pictures is many prompts: where prompts are split, compared, deduplicated and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sapo.data import PictureTokens, Prompt
from sapo.errors import TaskError
from sapo.evaluation.records import Answered
from sapo.rollout.encoded import EncodedPrompts
from sapo.tasks.rows.task import RowTask, refuse_shared_prompts, split_prompts
from sapo.tasks.verifiers import load_verifier
from support.pictures import picture

QUESTION = "How many shapes?"
PICTURES = [picture(i) for i in range(1000)]
ROWS = [Prompt(0, "shapes", QUESTION, answer=str(i % 7), pictures=(p,)) for i, p in enumerate(PICTURES)]


def task(train, held_out):
    return RowTask(name="shapes", train=train, held_out=held_out, verifier=load_verifier("exact"))


def test_a_thousand_pictures_with_one_question_are_split_into_a_hundred_held_out():
    train, held_out = split_prompts("rows.jsonl", ROWS, 0.1)
    assert len(train) + len(held_out) == 1000
    assert 70 <= len(held_out) <= 130  # a hash: 100 and three standard deviations of 9.5
    asked = task(train, held_out).held_out(2000)
    assert len({p.pictures for p in asked}) == len(held_out)
    assert {p.pictures for p in train}.isdisjoint({p.pictures for p in asked})
    assert len(task([], ROWS).held_out(2000)) == 1000


def test_copies_of_a_picture_with_its_question_stay_on_one_side():
    copies = [*ROWS[:200], *(replace(row, answer="other") for row in ROWS[:200])]
    train, held_out = split_prompts("rows.jsonl", copies, 0.3)
    assert len(train) % 2 == len(held_out) % 2 == 0
    assert len(task(train, held_out).held_out(2000)) == len(held_out) // 2


def test_only_a_prompt_with_the_same_picture_is_shared_by_both_sides():
    refuse_shared_prompts("a", ROWS[:10], "b", ROWS[10:20])
    with pytest.raises(TaskError, match="got 2 shared, one is 'How many shapes\\?'"):
        refuse_shared_prompts("a", ROWS[:10], "b", ROWS[8:20])


def test_few_shot_examples_are_not_made_of_rows_with_pictures():
    with pytest.raises(TaskError, match="an example needs a question in text alone"):
        task(ROWS[:10], []).shots(2)


def test_a_problem_of_an_evaluation_is_named_by_its_pictures_too():
    def answered(shown):
        return Answered(0, QUESTION, QUESTION, "4", {}, (), pictures=tuple(p.sha256 for p in shown))

    keys = {answered(shown).key for shown in ((), PICTURES[:1], PICTURES[1:2], PICTURES[:2])}
    assert len(keys) == 4
    shown = answered(PICTURES[:2])
    assert Answered.from_json(shown.to_json()) == shown
    assert "pictures" not in answered(()).to_json()


def test_encoded_prompts_are_kept_by_question_and_picture():
    kept = EncodedPrompts()
    kept.add(ROWS[0], (1, 2))
    assert kept.find(ROWS[1]) is None
    assert kept.find(replace(ROWS[0], id=7)) == ((1, 2), None)
    tokens = PictureTokens(((0, 1), (3,)), ((0, 0, 2, 3), (0, 0, 2, 3), (0, 1, 2, 3)))
    for row, found in ((ROWS[2], tokens), (ROWS[3], replace(tokens, positions=None))):
        kept.add(row, (1, 1, 2, 1), found)
        assert kept.find(row) == ((1, 1, 2, 1), found)
