"""The free schedule with an engine in a process of its own: engines and drivers are killed, and no prompt is lost."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.errors import EngineError
from sapo.workflows.train import resume
from support.engine_processes import Killer, after_step, assert_gone, engines, enter, noting_engines
from support.processes import kill_when, start
from support.runs import metrics, write_recipe

pytestmark = pytest.mark.scale

STEPS = 12
SEED = 20261130


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def recipe_in(directory: Path, **changes: Any) -> Path:
    settings = {
        "train__steps": STEPS,
        "rollout__max_new_tokens": 24,
        "rollout__run_in": "process",
        "rollout__schedule": "free",
        "rollout__max_staleness": 3,
        "rollout__max_rows": 8,
        "eval__every": 4,
        "checkpoint__every": 3,
        "checkpoint__keep": 10,
        "log__rollouts_every": 1,
    }
    return write_recipe(directory, **{**settings, **changes})


def assert_whole(run: Path) -> None:
    """Every prompt of the first STEPS batches was trained on once, in a group that was young enough."""
    drawn = [json.loads(line) for file in (run / "rollouts").glob("*.jsonl") for line in file.read_text().splitlines()]
    groups = Counter(c["prompt_id"] for c in drawn if c["sample"] == 0)
    assert groups == {batch << 32 | place: 1 for batch in range(STEPS) for place in range(4)}
    assert all(sum(tokens for tokens, _ in c["versions"]) == len(c["token_ids"]) for c in drawn)
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    assert all(s["rollout/staleness_max"] <= 3 for s in steps)


def test_a_run_survives_the_deaths_of_its_engine_and_goes_on_after_the_last(tmp_path: Path) -> None:
    killer = Killer({3: 0.0, 9: 0.0, 15: 0.0})
    with pytest.raises(EngineError, match=r"engine 0 \(process \d+\) was ended by SIGKILL"):
        sapo.train(sapo.load_recipe(recipe_in(tmp_path, train__max_restarts=2)), listener=killer)
    assert len([text for text in killer.warnings if "it is started again" in text]) == 2
    assert not engines(os.getpid())
    assert "was ended by SIGKILL" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]
    resume(tmp_path / "run", ["rollout.run_in=thread"])
    assert_whole(tmp_path / "run")


def test_a_driver_killed_again_and_again_loses_no_prompt(tmp_path: Path) -> None:
    """Killed at two seeded moments, some steps apart; the last resume goes to the end."""
    generator, run = random.Random(SEED), tmp_path / "run"
    arguments = ("train", str(recipe_in(tmp_path)))
    for step in (4, 8):
        driver, seen = start(*arguments, cwd=tmp_path), []
        moment = noting_engines(driver.pid, seen, after_step(run, step, generator.uniform(0.0, 0.1)))
        assert kill_when(driver, moment), "the run ended before it could be killed"
        assert seen
        assert_gone(seen)
        arguments = ("resume", str(run))
    resume(run)
    assert_whole(run)
