"""Engines by name, engines of the user's, and what is refused before a run begins."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import sapo
from sapo.config import RolloutConfig
from sapo.errors import ConfigError
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.registry import METHODS, NEEDS, check_engine, engine_class, make_engine
from sapo.workflows.evaluation_plan import plan_evaluations
from sapo.workflows.train import resume
from support.list_engine import TEXTS, ListEngine
from support.runs import REWARD, fingerprint, metrics, write_recipe

LIST = "support.list_engine:ListEngine"


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ListEngine, "received", [])


def run_recipe(directory: Path, should_stop=lambda: False, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    config = sapo.load_recipe(write_recipe(directory, rollout__engine=LIST, **changes))
    return sapo.train(config, should_stop=should_stop).directory


def test_the_local_engine_is_found_by_its_name_with_its_settings(policies) -> None:
    assert engine_class("local") is LocalEngine
    engine = make_engine(policies("qwen3"), RolloutConfig(max_rows=9, cuda_graphs=False))
    assert isinstance(engine, LocalEngine)
    assert (engine.max_rows, engine.cuda_graphs) == (9, False)


def test_the_registry_and_the_protocol_load_no_engine() -> None:
    code = (
        "import sys, sapo.rollout.engine, sapo.rollout.registry, sapo.rollout.params; "
        "print([m for m in sys.modules if m.startswith('sapo.rollout.local') or m == 'transformers'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_vllm_that_is_not_installed_is_named_with_the_ways_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    config = sapo.load_recipe(write_recipe(tmp_path), ["rollout.engine=vllm", "model.path=no/such/model"])
    with pytest.raises(
        ConfigError, match=r"needs the package vllm.*pip install 'sapo-rl\[vllm\]'.*engines\.md"
    ) as refused:
        sapo.train(config)
    assert "\n" not in str(refused.value)


def test_the_engine_vllm_cannot_record_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    config = sapo.load_recipe(write_recipe(tmp_path), ["rollout.engine=vllm", "model.routing_replay=R3"])
    with pytest.raises(
        ConfigError, match=r"needs an engine that records the experts of every token; got rollout\.engine=v"
    ):
        check_engine(config)


def test_only_the_registry_knows_where_the_local_engine_is() -> None:
    source = Path(sapo.__file__).parent
    named = [
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if not path.is_relative_to(source / "rollout" / "local")
        and any(
            isinstance(node, ast.Name | ast.alias) and "LocalEngine" in (getattr(node, "id", None) or node.name)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert named == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("locl", r"rollout.engine must be one of local, vllm or module:Class; got 'locl'; did you mean 'local'\?"),
        ("vllm:", "rollout.engine must be one of local, vllm or module:Class; got 'vllm:'"),
        ("no_such_module:Engine", "rollout.engine 'no_such_module:Engine': importing 'no_such_module' failed"),
        ("support.list_engine:ListEngin", r"has no class 'ListEngin'; did you mean 'ListEngine'\?"),
        ("support.runs:write_model", "it lacks from_settings, generate, .* capabilities; add what is missing"),
    ],
)
def test_what_is_no_engine_is_refused_before_anything_is_loaded(tmp_path: Path, name: str, message: str) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path), [f"rollout.engine='{name}'", "model.path=no/such/model"])
    with pytest.raises(ConfigError, match=message):
        sapo.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.routing_replay=R3",
            "model.routing_replay=R3 needs an engine that records the experts of every token; got "
            f"rollout.engine={LIST}; set it to R2",
        ),
        ("model.routing_replay=true", "model.routing_replay=true needs an engine that records"),
        ("prompt.stop=['=']", "prompt.stop needs an engine that ends completions at strings"),
        ("tasks.0.prompt={stop: ['=']}", "prompt.stop needs an engine that ends completions at strings"),
        ("train.old_logprobs=engine", "train.old_logprobs=engine needs an engine that gives the log-probabilities it"),
        ("objective.tis={mode: token}", "objective.tis needs an engine that gives the log-probabilities it draws by"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_line(tmp_path: Path, override: str, message: str) -> None:
    recipe = write_recipe(tmp_path)
    sapo.load_recipe(recipe, [override])
    config = sapo.load_recipe(recipe, [override, f"rollout.engine='{LIST}'", "model.path=no/such/model"])
    with pytest.raises(ConfigError, match=message) as refused:
        sapo.train(config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_engine_of_ones_own_trains_evaluates_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = run_recipe(tmp_path / "whole")
    steps = [m for m in metrics(whole) if m["kind"] == "step"]
    assert len(steps) == 6
    assert {m["old_logprobs"] for m in steps} == {"trainer"}, "its log-probabilities are not the policy's"
    rows = [line for f in (whole / "rollouts").iterdir() for line in f.read_text().splitlines()]
    assert all(any(f'"text": "{text}"' in row for text in TEXTS) for row in rows)
    # by hand: an evaluation before steps 1, 4 and after 6 at 2 updates a step, a rollout before each step
    assert ListEngine.received == [("weights", v) for v in (0, 0, 2, 4, 6, 6, 8, 10, 12)] + [("closed", 12)]
    assert len([m for m in metrics(whole) if m["kind"] == "eval"]) == 3
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 14

    stopped = run_recipe(tmp_path / "stopped", should_stop)
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole, 6)


def test_a_run_whose_engine_cannot_be_made_writes_nothing_and_a_resume_leaves_the_directory_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(policy, settings):
        raise RuntimeError("no server")

    with monkeypatch.context() as patched:
        patched.setattr(ListEngine, "from_settings", refuse)
        with pytest.raises(RuntimeError, match="no server"):
            run_recipe(tmp_path, train__steps=1)
        assert not (tmp_path / "run").exists()
    run = run_recipe(tmp_path, train__steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(ListEngine, "from_settings", refuse)
        with pytest.raises(RuntimeError, match="no server"):
            resume(run, ["train.steps=2"])
    assert resume(run, ["train.steps=2"]).summary["steps"] == 2


def test_a_stale_batch_is_as_old_as_the_weights_its_engine_held(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, rollout__staleness=3, eval__every=0)
    assert [m.get("rollout/age") for m in metrics(run) if m["kind"] == "step"] == [None, 2, 3, 3, 3, 3]


def test_an_evaluation_of_a_run_is_drawn_by_the_runs_engine_unless_told_otherwise(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, train__steps=1)
    assert [o.settings.engine for o in plan_evaluations(run, [], [])] == [LIST]
    assert [o.settings.engine for o in plan_evaluations(run, [], [], engine="local")] == ["local"]
    task = plan_evaluations(run, [], [])[0].task
    ListEngine.received.clear()
    sapo.evaluate(run, task, problems=2, samples=2, max_new_tokens=8, engine=LIST)
    assert ListEngine.received == [("weights", 0), ("closed", 0)]
    with pytest.raises(ConfigError, match=r"prompt\.stop needs an engine that ends"):
        sapo.evaluate(run, task, engine=LIST, prompt_format=sapo.config.PromptConfig(stop=["="]))


def test_the_engine_of_the_page_trains_as_it_stands_there(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    (tmp_path / "engine_of_the_page.py").write_text(page.split("```python\n")[1].split("```")[0])
    recipe = write_recipe(tmp_path, rollout__engine="engine_of_the_page:ListEngine", train__steps=2)
    run = sapo.train(sapo.load_recipe(recipe)).directory
    assert [m["step"] for m in metrics(run) if m["kind"] == "step"] == [1, 2]
    assert all(f'"{name}"' in page or f"`{name}" in page for name in (*METHODS, *NEEDS))


def test_an_engine_without_a_version_is_refused_when_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(policy, settings):
        engine = ListEngine(policy)
        del engine.version
        return engine

    monkeypatch.setattr(ListEngine, "from_settings", forgetful)
    with pytest.raises(ConfigError, match=r"must have `version`, .*; got None; set self\.version = 0"):
        run_recipe(tmp_path)
    assert not (tmp_path / "run").exists()
