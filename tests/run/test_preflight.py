"""What is checked before a run begins."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest

from sapo.config.recipes import load_recipe
from sapo.data import Prompt, Score
from sapo.errors import ConfigError
from sapo.model.loading import load_policy
from sapo.rollout.prompting import PromptFormat
from sapo.run.preflight import TaskSet, check_prompts
from support.runs import write_recipe


class Tests:
    """What a row brings along; an object whose life can be watched."""


class Rows:
    """A task of rows that are made when they are asked for, as those with private tests are."""

    name = "rows"
    num_train = 50

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Tests] = weakref.WeakSet()
        self.asked: list[int] = []
        self.most = 0

    def train_prompt(self, index: int) -> Prompt:
        tests = Tests()
        self.alive.add(tests)
        self.asked.append(index)
        self.most = max(self.most, len(self.alive))
        return Prompt(id=index, task=self.name, text="1+" * (24 if index == 49 else 1), metadata={"tests": tests})

    def held_out(self, count: int) -> list[Prompt]:
        return []

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(0.0)


def check(tmp_path: Path, max_new_tokens: int) -> Rows:
    config = load_recipe(write_recipe(tmp_path, rollout__max_new_tokens=max_new_tokens))
    rows = Rows()
    check_prompts(config, load_policy(tmp_path / "model"), TaskSet([rows], [rows], {"rows": PromptFormat()}))
    return rows


def test_every_training_row_is_checked_and_none_is_kept(tmp_path: Path) -> None:
    rows = check(tmp_path, max_new_tokens=1)
    assert rows.asked == list(range(50))
    assert rows.most <= 2, "the row that is checked, and the next"


def test_a_last_row_that_leaves_no_room_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave room for the prompt; got 20 with a prompt of 48 tokens"):
        check(tmp_path, max_new_tokens=20)
