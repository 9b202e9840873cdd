"""The recipe of one's own in README.md runs as it is written there."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

import sapo
from support.runs import metrics, write_model

README = Path(__file__).parents[2] / "README.md"

JUDGE = "def judge(completion):\n    return completion.count('7') / 8\n"


def recipe_text() -> str:
    """Return the lines of the recipe, from its name to the first command that uses it."""
    text = README.read_text()
    start = text.index("    # my_recipe.yaml")
    return dedent(text[start : text.index("    sapo train my_recipe.yaml", start)])


def test_the_recipe_of_the_readme_trains_on_rows_that_have_only_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_model(tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(JUDGE)
    (tmp_path / "poems.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(40)))
    written = yaml.safe_load(recipe_text())
    written["tasks"] = [task for task in written["tasks"] if task["name"] == "file"]  # the preset's rows are on the hub
    (tmp_path / "my_recipe.yaml").write_text(yaml.safe_dump(written))
    # Sizes of a test: a tiny model, one step of two updates.
    small = ["model.path=model", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "train.minibatches=2"]
    small += ["rollout.max_new_tokens=8", "train.steps=1", "eval.problems=2", "log.tensorboard=false", "threads=1"]
    run = sapo.train(sapo.load_recipe("my_recipe.yaml", small)).directory
    assert [m["step"] for m in metrics(run) if m["kind"] == "step"] == [1]


def test_the_recipe_of_the_readme_as_a_whole_is_valid(tmp_path: Path) -> None:
    (tmp_path / "my_recipe.yaml").write_text(recipe_text())
    config = sapo.load_recipe(tmp_path / "my_recipe.yaml")
    assert [task.name for task in config.tasks] == ["gsm8k", "file"]
