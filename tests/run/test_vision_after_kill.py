"""A run on pictures, killed at any moment as a process, goes on and ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes import finish, kill_when, start
from support.runs import fingerprint, metrics
from support.vision_recipes import write_pictured_rows

pytestmark = pytest.mark.scale

STEPS = 6


def write(directory: Path) -> Path:
    """A trained tower, batches that wait."""
    changes = {"model__vision__train": "tower", "train__steps": STEPS, "checkpoint__every": 1, "rollout__staleness": 1}
    return write_pictured_rows(directory, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write(tmp_path_factory.mktemp("killed") / "whole")
    finish(start("train", str(recipe), cwd=recipe.parent))
    run = recipe.parent / "run"
    assert any(m["grad_norm"] > 0 for m in metrics(run) if m["kind"] == "update")
    return run


@pytest.mark.parametrize("updates", [1, 4, 7])
def test_it_ends_to_the_bit_as_one_that_was_not_killed(whole: Path, tmp_path: Path, updates: int) -> None:
    recipe = write(tmp_path / "killed")
    run = recipe.parent / "run"

    def moment() -> bool:
        file = run / "metrics.jsonl"
        return file.exists() and file.read_text().count('"kind": "update"') >= updates

    assert kill_when(start("train", str(recipe), cwd=recipe.parent), moment)
    finish(start("resume", "run", cwd=recipe.parent))
    assert fingerprint(run, STEPS) == fingerprint(whole, STEPS)
    shown = {file.name for file in (whole / "pictures").iterdir()}
    assert shown == {file.name for file in (run / "pictures").iterdir()}
    assert len(shown) > 4
