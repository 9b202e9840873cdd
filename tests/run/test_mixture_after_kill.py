"""Three tasks 2:1:1 have exactly that ratio in every batch, also when the process is killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.processes import finish, kill_when, last_line, start
from support.runs import fingerprint, metrics, write_mixture

STEPS = 12

pytestmark = pytest.mark.scale

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refilled": {
        "rollout__zero_variance": "refill",
        "rollout__overlong": "penalty",
        "rollout__overlong_buffer": 4,
        "curriculum": {"low": 0.3, "high": 0.7},
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_ratio_is_exact_in_every_batch_across_a_kill(tmp_path: Path, option: str) -> None:
    def recipe(directory: Path) -> str:
        directory.mkdir()
        changes = {"train__steps": STEPS, "checkpoint__every": 3, "eval__every": 6, **OPTIONS[option]}
        return str(write_mixture(directory, rollout__max_new_tokens=24, rollout__samples_per_prompt=8, **changes))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("train", recipe(whole), cwd=whole))
    run = killed / "run"
    arguments = ["train", recipe(killed)]
    kills = 0
    # After a step, in the sampling of the next; and between the updates of one.
    for step, kind in ((2, "step"), (5, "step"), (8, "update")):

        def moment(step: int = step, kind: str = kind) -> bool:
            last = last_line(run)
            return last.get("step", 0) >= step and last.get("kind") == kind

        kills += kill_when(start(*arguments, cwd=killed), moment)
        arguments = ["resume", str(run)]
    finish(start("resume", str(run), cwd=killed))
    assert kills >= 2, "the run ended before it could be killed"
    assert fingerprint(run, STEPS) == fingerprint(whole / "run", STEPS)
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    kept = "groups" if option == "plain" else "groups/kept"
    for step_line in steps:
        assert [step_line[f"task/{t}/{kept}"] for t in ("one", "two", "three")] == [4, 2, 2]
    if option == "refilled":
        assert sum(m["groups/dropped"] for m in steps) > 0, "nothing was refilled: nothing is shown"
