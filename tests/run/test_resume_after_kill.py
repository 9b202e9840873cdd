"""A real process, killed with SIGKILL at chosen and at random moments, ends as the run that never was.

Metrics (but for the clock), weights, optimizer state and completions are compared bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.processes import PATIENCE, finish, kill_when, last_line, start
from support.runs import fingerprint, write_recipe

STEPS = 24

pytestmark = pytest.mark.scale


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("whole")
    finish(start("train", str(recipe_in(directory)), cwd=directory))
    return fingerprint(directory / "run", STEPS)


def recipe_in(directory: Path) -> Path:
    return write_recipe(
        directory,
        train__steps=STEPS,
        rollout__prompts_per_step=8,
        rollout__samples_per_prompt=8,
        rollout__max_new_tokens=40,
        eval__every=5,
        checkpoint__every=3,
    )


def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, uninterrupted: dict) -> None:
    run = tmp_path / "run"
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))

    def random_delay() -> Callable[[], bool]:
        delay = generator.uniform(0.0, 1.0)
        since: list[float] = []

        def moment() -> bool:
            if not since and (run / "metrics.jsonl").exists():
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > delay

        return moment

    def line(step: int, **fields: object) -> Callable[[], bool]:
        def moment() -> bool:
            last = last_line(run)
            return last.get("step", 0) >= step and all(last.get(k) == v for k, v in fields.items())

        return moment

    moments = {
        "before the first checkpoint": line(1, kind="step"),
        "between updates": line(5, kind="update", update=0),
        "while a checkpoint is being written": lambda: any((run / "checkpoints").glob(".writing-*")),
        "in generation": line(10, kind="step"),
        "at a random moment": random_delay(),
        "at another": random_delay(),
    }
    arguments = ["train", str(recipe_in(tmp_path))]
    killed = []
    for name, moment in moments.items():
        if kill_when(start(*arguments, cwd=tmp_path), moment):
            killed.append(name)
        arguments = ["resume", str(run)]
    finish(start("resume", str(run), cwd=tmp_path))
    assert len(killed) >= 4, f"the run ended before it could be killed: {killed}"
    assert fingerprint(run, STEPS) == uninterrupted


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tmp_path: Path, uninterrupted: dict) -> None:
    run = tmp_path / "run"
    process = start("train", str(recipe_in(tmp_path)), cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while last_line(run).get("step", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert "stopping at the next safe point" in output
    assert f"next: sapo resume {run}" in output
    assert "Traceback" not in output
    output = finish(start("resume", str(run), cwd=tmp_path))
    assert "resuming from" in output
    assert fingerprint(run, STEPS) == uninterrupted
