"""Routing replay in whole runs: which one is in force and who says so, what is logged, and resumes to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sapo
from sapo.config.recipes import parse_recipe
from sapo.config.summary import replay_sentence
from sapo.errors import ConfigError, ModelError
from sapo.rollout.local.engine import LocalEngine
from sapo.run.loop import TrainingRun
from sapo.training.checkpoint import list_checkpoints
from sapo.workflows.train import dry_run, resume
from support.processes import finish, kill_when, last_line, start
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_model, write_recipe

EXPERTS = {"experts": 6, "experts_per_token": 2}
KINDS: dict[str, dict[str, Any]] = {
    "R3": {"model__routing_replay": True},
    "R2": {"model__routing_replay": "R2"},
    "R2, cut": {"model__routing_replay": True, "rollout__top_k": 5},
    "R3, log pi_old of the trainer": {"model__routing_replay": "R3", "train__old_logprobs": "trainer"},
}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def write_moe(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    recipe = write_recipe(
        directory, **{"objective__name": "grpo", "log__rollouts_every": 1, "train__learning_rate": 3e-3, **changes}
    )
    write_model(directory / "model", "qwen3_moe", **EXPERTS)
    return recipe


def run_moe(directory: Path, should_stop=lambda: False, **changes: Any) -> Path:
    return sapo.train(sapo.load_recipe(write_moe(directory, **changes)), should_stop=should_stop).directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_moe, tmp_path_factory)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [m for m in metrics(run) if m["kind"] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_in_force_is_the_one_that_goes_with_log_pi_old_and_is_said(
    whole: Callable[..., Path], kind: str
) -> None:
    run = whole(**KINDS[kind])
    (check,) = lines(run, "self_check")
    assert check["routing_replay"] == kind[:2]
    assert check["old_logprobs"] == ("engine" if kind == "R3" else "trainer")
    provenance = yaml.safe_load((run / "config.yaml").read_text())["provenance"]
    assert provenance["routing_replay"] == kind[:2]
    assert provenance["versions"]["torch"] == torch.__version__, "beside what was there already"
    assert json.loads((run / "summary.json").read_text())["routing_replay"] == kind[:2]
    updates = [u for u in lines(run, "update") if not u["skipped"]]
    first = [u["routing/changed_share"] for u in updates if u["update"] == 0]
    later = [u["routing/changed_share"] for u in updates if u["update"] > 0]
    assert max(first) < 0.002, "at the weights that sampled the routers choose the same, up to rounding"
    assert max(later) > 0.0
    for step in lines(run, "step"):
        own = [u["routing/changed_share"] for u in updates if u["step"] == step["step"]]
        assert step["update/routing/changed_share"] == pytest.approx(sum(own) / len(own))


def test_without_replay_nothing_of_it_is_logged(whole: Callable[..., Path]) -> None:
    run = whole()
    assert not any("routing" in key for m in metrics(run) for key in m)
    assert "routing_replay" not in json.loads((run / "summary.json").read_text())
    assert "routing_replay" not in yaml.safe_load((run / "config.yaml").read_text())["provenance"]


def test_replay_without_updates_off_policy_is_the_run_without_it(tmp_path: Path) -> None:
    # Ratios are 1 either way; the trainer routes as the engine did, so no bit of the run can tell.
    settings = {"train__minibatches": 1, "train__old_logprobs": "trainer"}
    runs = [
        run_moe(tmp_path / name, **settings, model__routing_replay=replay)
        for name, replay in (("with", "R2"), ("without", False))
    ]
    rows = [(run / "rollouts" / "step-000006.jsonl").read_bytes() for run in runs]
    assert rows[0] == rows[1]
    assert lines(runs[0], "eval") == lines(runs[1], "eval")


def test_replay_changes_the_updates_off_policy(whole: Callable[..., Path]) -> None:
    runs = [whole(**KINDS["R3"]), whole()]
    assert (runs[0] / "rollouts" / "step-000006.jsonl").read_bytes() != (
        runs[1] / "rollouts" / "step-000006.jsonl"
    ).read_bytes()


def test_evaluation_routes_freely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    generate = LocalEngine.generate

    def spy(self, requests, params, should_stop=lambda: False, experts=None):
        recorded.append(experts is not None)
        return generate(self, requests, params, should_stop, experts)

    monkeypatch.setattr(LocalEngine, "generate", spy)
    run = run_moe(tmp_path, model__routing_replay=True)
    assert recorded.count(True) == 6, "the rollouts of six steps"
    assert recorded.count(False) == len(lines(run, "eval")) == 3


@pytest.mark.parametrize("asked", [25, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_replay_resumes_to_the_bit(
    tmp_path: Path, whole: Callable[..., Path], kind: str, asked: int
) -> None:
    count = iter(range(10**6))
    stopped = run_moe(tmp_path / "stopped", lambda: next(count) >= asked, **KINDS[kind])
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole(**KINDS[kind]), 6)


@pytest.mark.parametrize("kind", ["R3", "R2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"train__activation_checkpointing": True}, {"model__lora": {"rank": 4}}, {"rollout__zero_variance": "refill"}],
    ids=["plain", "checkpointing", "lora", "refill"],
)
def test_a_stop_between_updates_keeps_the_record(
    tmp_path: Path, whole: Callable[..., Path], kind: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**KINDS[kind], **options}
    expected = fingerprint(whole(**settings), 6)
    stop = False
    original = TrainingRun.update

    def update(self: TrainingRun, groups: tuple) -> None:
        nonlocal stop
        original(self, groups)
        stop = (self.state.step, self.state.update) == (3, 1)

    monkeypatch.setattr(TrainingRun, "update", update)
    stopped = run_moe(tmp_path / "stopped", lambda: stop, **settings)
    newest = list_checkpoints(stopped / "checkpoints")[0]
    assert newest.label == "step 3, update 1"
    groups = newest.state()["groups"]
    assert all(g["prompt_experts"] is not None for g in groups if len(set(g["advantages"])) > 1)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    resume(stopped)
    assert fingerprint(stopped, 6) == expected


@pytest.mark.scale
@pytest.mark.parametrize("kind", ["R3", "R2"])
def test_a_killed_run_with_replay_resumes_to_the_bit(tmp_path: Path, kind: str) -> None:
    settings = {
        **KINDS[kind],
        "train__steps": 12,
        "train__minibatches": 4,
        "rollout__prompts_per_step": 8,
        "rollout__samples_per_prompt": 8,
        "rollout__max_new_tokens": 40,
        "eval__every": 0,
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    finish(start("train", str(write_moe(tmp_path / "whole", **settings)), cwd=tmp_path / "whole"))
    run = tmp_path / "killed" / "run"
    arguments = ["train", str(write_moe(tmp_path / "killed", **settings))]
    killed = 0
    for step, update in ((1, 0), (4, 2), (7, 1)):

        def moment(step=step, update=update) -> bool:
            last = last_line(run)
            return last.get("kind") == "update" and (last["step"], last["update"]) >= (step, update)

        killed += kill_when(start(*arguments, cwd=tmp_path / "killed"), moment)
        arguments = ["resume", str(run)]
    finish(start("resume", str(run), cwd=tmp_path / "killed"))
    assert killed >= 2, "the run ended before it could be killed"
    assert fingerprint(run, 12) == fingerprint(tmp_path / "whole" / "run", 12)


def test_a_reference_and_an_adapter_go_with_replay(tmp_path: Path) -> None:
    kl = {"coefficient": 0.01}
    run = run_moe(tmp_path, model__routing_replay=True, objective__kl=kl, model__lora={"rank": 4})
    updates = [u for u in lines(run, "update") if not u["skipped"]]
    assert all("kl" in u and "routing/changed_share" in u for u in updates)
    assert updates[0]["kl"] == pytest.approx(0.0, abs=1e-6), "an adapter that is zero is the reference"


@pytest.mark.parametrize("start_run", [sapo.train, dry_run])
def test_a_dense_model_is_refused_before_anything_is_written(tmp_path: Path, start_run: Any) -> None:
    file = write_recipe(tmp_path, model__routing_replay=True)
    with pytest.raises(ModelError, match=r"needs a mixture of experts of the families .*; got Qwen3ForCausalLM;"):
        start_run(sapo.load_recipe(file))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__routing_replay": "R4"}, "routing_replay must be false, true, R2 or R3; got 'R4'"),
        ({"model__routing_replay": 2}, "routing_replay must be false, true, R2 or R3; got 2"),
        (
            {"model__routing_replay": "R2", "train__old_logprobs": "engine"},
            "records in the trainer's forward that computes log pi_old; got train.old_logprobs=engine",
        ),
        (
            {"model": {"coldstart": {"architecture": "llama"}, "routing_replay": "R3"}},
            "routing_replay is for mixtures of experts; got a cold start of architecture llama",
        ),
    ],
)
def test_a_replay_that_cannot_be_is_refused_in_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sapo.load_recipe(write_recipe(tmp_path, **changes))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "train", "said"),
    [
        ({}, {}, None),
        ({"routing_replay": True}, {"old_logprobs": "engine"}, "Routing replay R3: the engine records"),
        ({"routing_replay": True}, {"old_logprobs": "trainer"}, "Routing replay R2: the trainer records"),
        ({"routing_replay": "R2"}, {}, "Routing replay R2: the trainer records"),
        ({"routing_replay": "R3"}, {}, "Routing replay R3: the engine records"),
        ({"routing_replay": True}, {}, "Routing replay R3 (the engine records the experts as it samples) if the self"),
    ],
)
def test_the_sentence_at_the_start_says_which_replay_is_in_force(model: dict, train: dict, said: str | None) -> None:
    config = parse_recipe(
        {"model": {"path": "m", **model}, "tasks": [{"name": "arithmetic"}], "train": {"steps": 1, **train}}
    )
    sentence = replay_sentence(config)
    assert sentence is None if said is None else str(sentence).startswith(said)


def test_the_command_says_it(tmp_path: Path) -> None:
    recipe = write_moe(tmp_path, model__routing_replay=True, train__steps=1, eval__every=0)
    output = finish(start("train", str(recipe), cwd=tmp_path))
    assert "Routing replay R3 (the engine records the experts as it samples) if the self-check" in output
    assert "routing replay: the engine records, so this is R3" in output
    output = finish(start("train", str(recipe), "--dry-run", "run_dir=other", cwd=tmp_path))
    assert "Routing replay R3 (the engine records" in output
    dense = write_recipe(tmp_path, model__routing_replay=True, run_dir=str(tmp_path / "dense"))
    output = finish(start("train", str(dense), cwd=tmp_path), code=2)
    assert "routing replay needs a mixture of experts" in output
    assert "Traceback" not in output
