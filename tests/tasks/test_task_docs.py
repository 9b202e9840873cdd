"""The recipes of docs/tasks.md are recipes: each is parsed, and each of its tasks is made and asks a question."""

import json
import re
from pathlib import Path

import pytest
import yaml

from sapo.config import RunConfig
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import PRESETS, TASKS, VERIFIERS, make_task
from sapo.tasks.generated.reasoning_audit import SOUND

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)

# One row that has the columns of every example of the page.
ROW = {"problem": "p", "topic": "t", "subject": "s"}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Files and repositories of the names on the page, and their verifiers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text("def judge(completion, answer):\n    return completion == answer\n")
    for name in ("sums.jsonl", "quiz.jsonl"):
        lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": 2 * i}) for i in range(60)]
        (tmp_path / name).write_text("\n".join(lines))
    datasets = pytest.importorskip("datasets")

    def load(path, **arguments):
        row = {**ROW, "question": arguments["split"]}
        rows = [{**row, "question": f"{row} {i}?", "answer": f"#### {i}"} for i in range(60)]
        return datasets.Dataset.from_list(rows)

    def load_problems(path, **arguments):
        return datasets.Dataset.from_list([{**ROW, "problem": f"{i}?", "answer": "1"} for i in range(60)])

    monkeypatch.setattr("sapo.tasks.rows.hub._hub_answers", lambda library: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **a: (load_problems if "MATH" in path else load)(path, **a)
    )
    if "regex" not in VERIFIERS:
        for module in ("files", "datasets"):
            monkeypatch.setattr(f"sapo.tasks.{module}.load_verifier", lambda spec: VERIFIERS["exact"])


@pytest.mark.parametrize("text", RECIPES, ids=[f"recipe {i}" for i in range(len(RECIPES))])
def test_every_recipe_of_the_page_makes_tasks_that_ask(rows, text):
    config = RunConfig.model_validate({"model": {"path": "m"}, "train": {"steps": 1}, **yaml.safe_load(text)})
    assert config.tasks
    for task_config in config.tasks:
        task = make_task(task_config.name, seed=0, **task_config.options)
        form = PromptFormat.of(task_config.prompt or config.prompt, task)
        prompt = task.held_out(1)[0]
        assert prompt.task == task.name == (task_config.label or task.name)
        assert prompt.text in form.text(prompt)
        if task_config.options.get("held_out_fraction") != 1:
            assert task.train_prompt(0).identity != prompt.identity


def test_the_page_has_as_many_recipes_as_sections_with_one():
    assert len(RECIPES) == 9


def test_the_page_lists_every_preset_with_its_repository_licence_and_verifier():
    table = {line.split("|")[1]: line for line in PAGE.splitlines() if line.startswith("| ")}
    for name, preset in PRESETS.items():
        line = next(line for names, line in table.items() if re.search(rf"\b{name}\b", names))
        assert preset.dataset.rpartition("/")[2] in line
        assert f"| {preset.licence} | {preset.verifier} |" in line


def test_the_page_lists_the_datasets_that_are_sound():
    listed = re.search(r"Known to be sound, .*?: (.*?)\.", PAGE, re.DOTALL)[1]
    assert tuple(re.split(r",\s+", listed)) == SOUND


def test_every_kind_of_task_is_on_the_page():
    for name in TASKS.keys() - {"jsonl", "parquet"}:
        assert re.search(rf"\b{name}\b", PAGE), name
