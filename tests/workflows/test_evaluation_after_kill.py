"""A real evaluation, killed with SIGKILL at chosen and at random moments, ends as the one that never was.

Completions, figures and page are compared byte for byte; the clock stands apart.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.processes import finish, kill_when, start
from support.runs import write_model

pytestmark = pytest.mark.scale

COMMAND = ["--task", "arithmetic", "digits=3", "--problems", "150", "--samples", "16", "--k", "1,4", "--greedy"]


def evaluate(directory: Path, *more: str) -> list[str]:
    return ["eval", str(directory / "model"), *COMMAND, "--max-new-tokens", "40", "--out", "e", *more]


def outcome(directory: Path) -> dict[str, bytes | dict]:
    results = json.loads((directory / "e" / "results.json").read_text())
    del results["timing"]
    results["model"]["path"] = "model"
    files = {name: (directory / "e" / name).read_bytes() for name in ("completions.jsonl",)}
    page = (directory / "e" / "index.html").read_text().replace(str(directory), "")
    return {**files, "results": results, "page": page.encode()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("whole")
    write_model(directory / "model")
    finish(start(*evaluate(directory), cwd=directory))
    return outcome(directory)


def test_a_killed_evaluation_goes_on_to_the_bit(tmp_path: Path, uninterrupted: dict) -> None:
    write_model(tmp_path / "model")
    progress = tmp_path / "e" / "progress.jsonl"
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))

    def chunks() -> int:
        return progress.read_bytes().count(b'\n{"chunk"') if progress.exists() else 0

    def grown() -> Callable[[], bool]:
        before = chunks()
        return lambda: chunks() > before

    def soon() -> Callable[[], bool]:
        delay, since = generator.uniform(0.0, 0.5), []

        def moment() -> bool:
            if not since and progress.exists():
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > delay

        return moment

    killed = 0
    for moment in ((tmp_path / "e" / "config.json").exists, grown, grown, soon, soon):
        chosen = moment() if moment in (grown, soon) else moment
        killed += kill_when(start(*evaluate(tmp_path), cwd=tmp_path), chosen)
    assert killed >= 3, "the evaluation ended before it could be killed"
    output = finish(start(*evaluate(tmp_path), cwd=tmp_path))
    assert "of 150 problems already; resuming" in output or "finished already" in output
    assert outcome(tmp_path) == uninterrupted


def test_a_killed_evaluation_is_not_mixed_with_another_model_s(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    progress = tmp_path / "e" / "progress.jsonl"
    assert kill_when(start(*evaluate(tmp_path), cwd=tmp_path), progress.exists)
    before = progress.read_bytes()
    write_model(tmp_path / "model", seed=1)
    output = finish(start(*evaluate(tmp_path), cwd=tmp_path), code=2)
    extent, refusal = output.strip().splitlines()
    assert extent == "add3: 150 generated problems; --problems sets how many"
    assert "holds another evaluation, with model.weights=" in refusal
    assert progress.read_bytes() == before
