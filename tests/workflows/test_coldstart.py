"""A cold start is taught its task as the run puts it, and is cached by what shapes it and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import sapo.workflows.coldstart as module
from sapo.config.recipes import load_recipe
from sapo.errors import ModelError
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
