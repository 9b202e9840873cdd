"""Whole runs of hybrids: states and routing replay together, stopped or killed, end as runs that went through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.workflows.train import resume
from support.processes import finish, kill_when, start
from support.runs import REWARD, fingerprint, metrics, write_model, write_recipe

STEPS = 4
EXPERTS = {"experts": 6, "experts_per_token": 2, "layers": 3}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def write_hybrid(directory: Path, **changes: Any) -> Path:
    """Two recurrent layers and one that attends, each with a mixture of experts."""
    directory.mkdir(exist_ok=True)
    settings = {
        "model__routing_replay": True,
        "train__steps": STEPS,
        "train__activation_checkpointing": True,
        "checkpoint__every": 1,
        "eval__every": 2,
        "rollout__max_rows": 6,  # fewer than a step's 16: rows come and go
    }
    recipe = write_recipe(directory, **{**settings, **changes})
    write_model(directory / "model", "qwen3_5_moe", **EXPERTS)
    return recipe


def test_a_run_stopped_and_resumed_ends_as_one_that_went_through(tmp_path: Path) -> None:
    whole = sapo.train(sapo.load_recipe(write_hybrid(tmp_path / "whole"))).directory
    updates = [m for m in metrics(whole) if m["kind"] == "update"]
    assert all(m["grad_norm"] > 0 for m in updates)
    (check,) = [m for m in metrics(whole) if m["kind"] == "self_check"]
    assert check["routing_replay"] == "R3"
    cut = tmp_path / "cut"

    def stopping() -> bool:
        file = cut / "run" / "metrics.jsonl"
        return file.exists() and file.read_text().count('"kind": "step"') >= 2

    sapo.train(sapo.load_recipe(write_hybrid(cut)), should_stop=stopping)
    assert sum(m["kind"] == "step" for m in metrics(cut / "run")) < STEPS
    resume(cut / "run")
    assert fingerprint(cut / "run", STEPS) == fingerprint(whole, STEPS)


@pytest.fixture(scope="module")
def whole_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a process that nobody killed."""
    recipe = write_hybrid(tmp_path_factory.mktemp("whole"))
    finish(start("train", str(recipe), cwd=recipe.parent))
    return recipe.parent / "run"


@pytest.mark.scale
@pytest.mark.parametrize("updates", [1, 4, 6])
def test_a_killed_process_is_resumed_to_the_bit(tmp_path: Path, whole_process: Path, updates: int) -> None:
    killed = write_hybrid(tmp_path / "killed")
    run = killed.parent / "run"

    def moment() -> bool:
        file = run / "metrics.jsonl"
        return file.exists() and file.read_text().count('"kind": "update"') >= updates

    assert kill_when(start("train", str(killed), cwd=killed.parent), moment)
    finish(start("resume", "run", cwd=killed.parent))
    assert fingerprint(run, STEPS) == fingerprint(whole_process, STEPS)
