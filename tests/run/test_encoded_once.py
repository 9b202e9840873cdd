"""How often a run gives its prompts to the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import sapo
from sapo.model.loading import load_policy
from sapo.rollout.prompting import encode_by_task
from sapo.run.preflight import load_tasks
from sapo.workflows.train import resume
from support.runs import fingerprint, write_recipe

ROWS = {"train__steps": 14, "train__minibatches": 1, "eval__every": 2, "eval__problems": 8, "checkpoint__every": 7}
"""14 steps of 4 prompts: more than two epochs of the 24 rows, with eight evaluations of the held-out ones."""


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each text was encoded."""
    counted: Counter[str] = Counter()
    call = PreTrainedTokenizerBase.__call__

    def count(self, text, *args, **options):
        counted[text] += 1
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", count)
    return counted


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))


def rows_of(directory: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in (directory / "prompts.jsonl").read_text().splitlines()}


def test_a_run_of_several_epochs_and_evaluations_encodes_each_row_once(tmp_path: Path, texts: Counter[str]) -> None:
    sapo.train(sapo.load_recipe(write_recipe(tmp_path, **ROWS)))
    assert texts == dict.fromkeys(rows_of(tmp_path), 1)


def test_a_resumed_run_encodes_each_row_once_and_none_that_it_does_not_ask(tmp_path: Path, texts: Counter[str]) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, **ROWS))
    whole = sapo.train(config.model_copy(update={"run_dir": str(tmp_path / "whole")})).directory

    def stopped_at_step_7() -> bool:
        return (tmp_path / "run" / "checkpoints" / "step-000007").exists()

    assert sapo.train(config, should_stop=stopped_at_step_7).stopped
    texts.clear()
    run = resume(tmp_path / "run", ["train.steps=14"]).directory
    assert set(texts.values()) == {1}
    assert set(texts) <= rows_of(tmp_path)
    assert fingerprint(run, 14) == fingerprint(whole, 14)


def test_the_prompts_of_an_endless_task_are_not_kept(tmp_path: Path) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, tasks=[{"name": "arithmetic", "digits": 2}]))
    tasks, policy = load_tasks(config), load_policy(tmp_path / "model")
    (task,) = tasks.train
    form = tasks.formats[task.name]
    once = encode_by_task(policy, tasks.formats, tasks.train, [task.train_prompt(i) for i in range(5)])
    assert [p.token_ids for p in once] == [policy.encode(p.text) for p in once]
    assert len(form._encoded) == 0
    form.encode(policy, task.held_out(3))
    assert len(form._encoded) == 3
