"""How a recipe names tools and environments of others."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sapo.environments.adapters.openenv import OpenEnvEnvironment
from sapo.environments.adapters.skyrl import SkyRlEnvironment
from sapo.environments.adapters.trl import TrlEnvironment
from sapo.environments.wrapping import SamePrompt, source_of
from sapo.errors import TaskError
from sapo.tasks import make_task
from sapo.tasks.base import FiniteTask
from support.adapter_cases import PROMPT, Client, Counter, Gym


@pytest.fixture
def module(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Reach 7.", "answer": "7", "start": 3}\n' * 2)
    made = types.ModuleType("my_environments")
    vars(made).update(Counter=Counter, Gym=Gym, Client=Client, NoReset=type("NoReset", (), {}))
    monkeypatch.setitem(sys.modules, "my_environments", made)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_recipe_names_tools(module: Any, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "Reach 8.", "answer": "8"}\n')
    task = make_task("file", seed=0, path="rows.jsonl", held_out_path="held.jsonl", tools=["calculator"])
    assert isinstance(task, FiniteTask)
    assert (task.num_train, task.toolbox.names, task.name) == (2, ("calculator",), "rows")
    assert source_of(task).num_train == 2
    assert not isinstance(make_task("same_prompt", seed=0, text="?", tools=["calculator"]), FiniteTask)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ("trl:my_environments:Counter", TrlEnvironment),
        ("skyrl:my_environments:Gym", SkyRlEnvironment),
        ({"name": "openenv:my_environments:Client", "url": "http://127.0.0.1:1"}, OpenEnvEnvironment),
    ],
)
def test_a_recipe_names_environments(module: Any, environment: Any, kind: type) -> None:
    task = make_task("same_prompt", seed=0, text="Reach 7.", environment=environment)
    assert isinstance(task, kind)
    assert task.train_prompt(0).metadata["seed"] != task.held_out(1)[0].metadata["seed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "trll:my_environments:Counter"}, "must be one of trl:"),
        ({"environment": "trl:my_environments:Counted"}, "no class 'Counted'; did you mean 'Counter'"),
        ({"environment": "trl:my_environments:NoReset"}, "must have a method reset"),
        ({"environment": "skyrl:no_such_name"}, "needs skyrl-gym|has the environments"),
        ({"environment": "openenv:http://127.0.0.1:8000"}, "must name the client's class"),
        ({"environment": "openenv:my_environments:Client"}, "needs the address of its server"),
        ({"environment": {"name": "skyrl:my_environments:Gym", "url": "x"}}, "does not take the options url"),
        ({"environment": 3}, "environment must be a name"),
        ({"tools": []}, "must have tools"),
        ({"tools": ["calculatr"]}, "did you mean 'calculator'"),
        ({"tools": ["calculator"], "calls": "xml"}, "calls must be one of"),
    ],
)
def test_a_wrong_recipe_is_refused(module: Any, options: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make_task("same_prompt", seed=0, text="?", **options)


def test_a_source_without_a_verifier_says_so() -> None:
    with pytest.raises(TypeError, match="the environment must give the reward"):
        SamePrompt("?").verify("7", PROMPT)
