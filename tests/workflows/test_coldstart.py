"""A cold start is taught its task as the run puts it, and is cached by what shapes it and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import sapo.workflows.coldstart as module
from sapo.config.recipes import load_recipe
from sapo.errors import ConfigError, ModelError
from sapo.rollout.local.engine import LocalEngine
from sapo.workflows.coldstart import coldstart_path, ensure_coldstart

SHORT = [f"model.coldstart.{s}" for s in ("target=0", "max_updates=1", "examples=8", "batch_size=8", "eval_problems=8")]


def test_examples_and_problems_are_put_in_the_prompt_format_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))
    taught, asked = [], []
    pack, generate = module.pack, LocalEngine.generate

    def record_examples(groups, **options):
        taught.extend(groups)
        return pack(groups, **options)

    def record_requests(engine, requests, *rest):
        asked.extend((engine.policy.tokenizer.decode(r.prompt.token_ids), r.prompt) for r in requests)
        return generate(engine, requests, *rest)

    monkeypatch.setattr(module, "pack", record_examples)
    monkeypatch.setattr(LocalEngine, "generate", record_requests)
    own = "tasks.0.prompt={template: ';{prompt}', stop: ['%']}"
    config = load_recipe("quickstart", [*SHORT, "prompt.template=={prompt}", own])
    path, _ = ensure_coldstart(config)
    assert module.describe(path)["prompt"]["template"] == ";{prompt}"
    tokenizer = module.fresh_policy(config.model.coldstart).tokenizer
    assert len(taught) == 8
    for group in taught:
        assert tokenizer.decode(group.prompt.token_ids) == ";" + group.prompt.text
        assert group.completions[0].token_ids[-1] == tokenizer.eos_token_id
    assert len(asked) == 8 + module.RECORDED_PROBLEMS
    assert all(text == ";" + p.text and p.stop == ("%",) for text, p in asked)


def test_a_format_that_the_tiny_models_tokenizer_cannot_put_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="chat template"):
        ensure_coldstart(load_recipe("quickstart", [*SHORT, "prompt.style=chat"]))
    with pytest.raises(ModelError, match="cannot encode the prompt 'What is"):
        ensure_coldstart(load_recipe("quickstart", [*SHORT, "prompt.template='What is {prompt}'"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "shapes_it"),
    [
        ("prompt.template=={prompt}", True),
        ("tasks.0.prompt={stop: ['%']}", True),
        ("tasks.0.digits=3", True),
        ("model.coldstart.seed=1", True),
        ("rollout.max_new_tokens=63", True),
        ("tasks.0.prompt={}", False),
        ("tasks.0.label=sums", False),
        ("tasks.0.weight=2", False),
        ("tasks.0.curriculum={low: 0.2}", False),
        ("seed=1", False),
        ("objective.name=grpo", False),
    ],
)
def test_what_shapes_the_model_and_nothing_else_makes_another_entry(change: str, shapes_it: bool) -> None:
    before, after = load_recipe("quickstart"), load_recipe("quickstart", [change])
    assert before != after
    assert (coldstart_path(before) != coldstart_path(after)) == shapes_it


def test_a_cold_start_of_all_tasks_teaches_each_by_its_weight_and_asks_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path))
    taught = []
    pack = module.pack
    monkeypatch.setattr(module, "pack", lambda groups, **options: taught.extend(groups) or pack(groups, **options))
    config = load_recipe("vision_quickstart", [*SHORT, "tasks.1.weight=3", "tasks.1.prompt={template: ';{prompt}'}"])
    record = module.describe(ensure_coldstart(config)[0])
    assert sorted(record["pass@1 by task"]) == ["picture_sums1", "text_sums1"]
    assert record["pass@1"] == min(record["pass@1 by task"].values())
    # 1 : 3 of eight examples.
    assert sorted(len(g.prompt.pictures) for g in taught) == [0] * 6 + [1] * 2
    tokenizer = module.fresh_policy(config.model.coldstart).tokenizer
    texts = [tokenizer.decode(g.prompt.token_ids) for g in taught if not g.prompt.pictures]
    assert all(text.startswith(";") and text.endswith("=") for text in texts)


def test_the_weights_of_tasks_shape_a_cold_start_of_all_of_them() -> None:
    before = load_recipe("vision_quickstart")
    for change, shapes_it in (("tasks.1.weight=2", True), ("tasks.1.shown=picture", True), ("tasks.1.label=x", False)):
        after = load_recipe("vision_quickstart", [change])
        assert (coldstart_path(before) != coldstart_path(after)) == shapes_it


TURNS = '''
from sapo.environments.games import Calculator


class Sums(Calculator):
    """Calculator under another name."""
'''


@pytest.mark.parametrize(
    "tasks", ["[{name: turns_of_a_test:Sums}]", "[{name: arithmetic, tools: [calculator]}]", "[{name: calculator}]"]
)
def test_the_limits_of_episodes_shape_the_cold_start_of_any_environment(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turns_of_a_test.py").write_text(TURNS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "turns_of_a_test", raising=False)

    def path(*changes: str) -> Path:
        return coldstart_path(load_recipe("quickstart", [f"tasks={tasks}", *changes]))

    assert path() != path("rollout.turns.max=3")
    # A resume may change these, and must find the model that the run began with.
    assert path() == path(
        "rollout.turns.max_environment_errors=0.5", "rollout.turns.seconds_per_reply=60", "rollout.turns.play_in=driver"
    )
    # These came later, and change no worked example: cached models stay what they were.
    assert path() == path("rollout.turns.credit=episode", "rollout.turns.env=[X]")


def test_a_changed_module_of_ones_own_makes_another_cold_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "turns_of_a_test.py").write_text(TURNS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "turns_of_a_test", raising=False)
    config = load_recipe("quickstart", ["tasks=[{name: turns_of_a_test:Sums}]"])
    before = coldstart_path(config)
    (tmp_path / "turns_of_a_test.py").write_text(TURNS + "    examples = 3\n")
    assert coldstart_path(config) != before


def test_a_task_without_worked_examples_is_named() -> None:
    config = load_recipe("vision_quickstart", [*SHORT, "tasks=[{name: picture_sums}, {name: sums}]"])
    with pytest.raises(ConfigError, match=r"write worked examples .*got 'sums'"):
        ensure_coldstart(config)
