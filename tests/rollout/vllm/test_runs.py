"""Whole runs on the engine `vllm`: they learn, and stop where its weights are not the policy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sapo
from sapo.errors import ParityError
from sapo.rollout.params import SamplingParams
from sapo.rollout.vllm import core
from sapo.run.directory import RunDirectory
from sapo.workflows.evaluation_plan import plan_evaluations
from sapo.workflows.train import resume
from support.runs import REWARD, fingerprint, metrics, write_model, write_recipe
from support.vllm_cases import SHAPE, needs_vllm

pytestmark = needs_vllm


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def recipe(directory: Path, architecture: str = "qwen3", model: dict[str, Any] | None = None, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    few = {"rollout__engine": "vllm", "rollout__vllm": {"kv_cache_gib": 0.25}, "eval__every": 0}
    file = write_recipe(directory, **{**few, **changes})
    write_model(directory / "model", architecture, **{**SHAPE, "intermediate_size": 64, **(model or {})})
    return file


def train(directory: Path, architecture: str = "qwen3", should_stop=lambda: False, **changes) -> Path:
    return sapo.train(sapo.load_recipe(recipe(directory, architecture, **changes)), should_stop=should_stop).directory


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [m for m in metrics(run) if m["kind"] == kind]


def test_thirty_steps_learn_on_policy(tmp_path: Path) -> None:
    run = train(tmp_path, train__steps=30, train__learning_rate=3e-3, checkpoint__every=0)
    rewards = [m["reward/mean"] for m in of_kind(run, "step")]
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 1.0  # of at most 1.5: twelve tokens, each a seven
    (check,) = of_kind(run, "self_check")
    assert (check["old_logprobs"], check["equal"]) == ("engine", True)
    assert check["log_ratio/max_abs"] < 1e-5
    on_policy = [m["ratio/abs_dev"] for m in of_kind(run, "update") if m["on_policy"] and "ratio/abs_dev" in m]
    assert len(on_policy) > 15
    assert max(on_policy) < 1e-5
    parity = of_kind(run, "parity")
    # by hand: batches 0 to 3, then every tenth; steps count from 1
    assert [m["step"] for m in parity] == [1, 2, 3, 4, 11, 21]
    assert RunDirectory.read_config(run).provenance["vllm"].startswith("0.32.")
    assert max(m["log_ratio/max_abs"] for m in parity) < 1e-4


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3_moe", {"model__routing_replay": "R2"}),
        ("qwen3", {"model__lora": {"rank": 2}, "rollout__top_p": 0.9, "train__learning_rate": 1e-2}),
        (
            "qwen3",
            {
                "model__lora": {"rank": 2},
                "train__learning_rate": 1e-2,
                "rollout__vllm": {"kv_cache_gib": 0.25, "lora_sync": "adapter"},
            },
        ),
        ("qwen3", {"rollout__staleness": 3, "prompt": {"stop": ["7"]}}),
        ("llama", {"model": {"tie_embeddings": True}, "eval__every": 2, "eval__greedy": True}),
    ],
)
def test_other_recipes_keep_the_engine_at_the_policys_weights(tmp_path: Path, architecture: str, changes: dict) -> None:
    model = changes.get("model")
    rest = {k: v for k, v in changes.items() if k != "model"}
    run = train(tmp_path, architecture, model=model, rollout__parity_every=1, **rest)
    parity = of_kind(run, "parity")
    assert len(parity) >= 6
    assert max(m["log_ratio/max_abs"] for m in parity) < 1e-4


@pytest.mark.parametrize(("architecture", "model"), [("qwen3_moe", {}), ("qwen3", {"tie_embeddings": True})])
def test_with_therepack_taken_out_the_check_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, model: dict
) -> None:
    """The repack works for the first weights and fails from the second sync on: only changed weights show it."""
    real, calls = core.repack, []

    def repack_once(model: torch.nn.Module) -> None:
        calls.append(model)
        if len(calls) <= 2:  # of the evaluation before the first step, and of the first step
            real(model)

    monkeypatch.setattr(core, "repack", repack_once)
    with pytest.raises(ParityError, match=r"step 2: the engine does not sample with the policy's weights: .* by roll"):
        train(tmp_path, architecture, model=model, train__learning_rate=1e-2, train__warmup_steps=0)
    assert [m["step"] for m in of_kind(tmp_path / "run", "parity")] == [1]
    assert "by the trainer (|log r| " in (tmp_path / "run" / "failure.json").read_text()


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", train__steps=4, checkpoint__every=2)
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 40

    stopped = train(tmp_path / "stopped", should_stop=should_stop, train__steps=4, checkpoint__every=2)
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 4) == fingerprint(whole, 4)


def test_an_evaluation_can_be_drawn_by_vllm(tmp_path: Path) -> None:
    run = train(tmp_path, train__steps=1)
    task = plan_evaluations(run, [], [])[0].task
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    scores = [
        sapo.evaluate(run, task, engine=name, problems=6, samples=1, params=params).metrics()
        for name in ("vllm", "local")
    ]
    assert scores[0] == scores[1]
