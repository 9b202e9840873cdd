"""Runs on pictures and text with several ranks: the run of one process, by torchrun too, killed and resumed.

What has to be equal bit for bit is compared with an uninterrupted run on as many ranks; what has to be equal to
rounding, with one process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.processes import finish, kill_when, last_line, start
from support.runs import fingerprint, metrics
from support.vision_recipes import write_pictured_rows
from workflows.test_training_group import assert_equal_to_rounding

pytestmark = pytest.mark.scale

STEPS = 6
MIXTURE = {"architecture": "qwen3_vl_moe", "model__routing_replay": "R2"}


def recipe_in(directory: Path, **changes: Any) -> str:
    """Micro-batches so small that a rank has several, some with pictures and some without."""
    settings = {
        "model__vision__train": "tower",
        "train__steps": STEPS,
        "train__tokens_per_microbatch": 64,
        "checkpoint__every": 2,
        "checkpoint__keep": 10,
    }
    return str(write_pictured_rows(directory, **{**settings, **changes}))


@pytest.mark.parametrize(
    "changes",
    [{}, MIXTURE, {"model__vision__train": "none", "rollout__staleness": 1}],
    ids=["dense", "mixture of experts, R2", "frozen tower, stale"],
)
def test_two_ranks_reach_the_metrics_of_one_process(changes: dict[str, Any], tmp_path: Path) -> None:
    file = recipe_in(tmp_path, **changes)
    finish(start("train", file, "run_dir=one", cwd=tmp_path))
    finish(start("train", file, "run_dir=two", "train.ranks=2", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "two", tmp_path / "one", STEPS)
    assert any(line["grad_norm"] > 0 for line in metrics(tmp_path / "one") if line["kind"] == "update")


def test_ranks_that_share_each_micro_batch_reach_the_metrics_of_one_process(tmp_path: Path) -> None:
    file = recipe_in(tmp_path)
    finish(start("train", file, "run_dir=one", cwd=tmp_path))
    finish(start("train", file, "run_dir=two", "train.ranks=2", "train.context_parallel=2", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "two", tmp_path / "one", STEPS)


def test_torchrun_and_a_kill_change_no_bit_and_one_rank_goes_on(tmp_path: Path) -> None:
    """Files of rows and pictures are named by the directory, so that every run is in the same one."""
    file = recipe_in(tmp_path)
    run = tmp_path / "run"
    finish(start("train", file, "train.ranks=2", cwd=tmp_path))
    whole = fingerprint(run, STEPS)
    shutil.move(run, tmp_path / "whole")
    finish(start("train", file, cwd=tmp_path, torchrun=2))
    assert fingerprint(run, STEPS) == whole
    shutil.rmtree(run)
    killed = start("train", file, "train.ranks=2", cwd=tmp_path)
    assert kill_when(killed, lambda: last_line(run).get("step", 0) >= 3)
    shutil.copytree(run, tmp_path / "alone")
    finish(start("resume", "run", cwd=tmp_path))
    assert fingerprint(run, STEPS) == whole
    move_to(tmp_path / "alone", "alone")
    finish(start("resume", "alone", "train.ranks=1", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "alone", tmp_path / "whole", STEPS)


def move_to(run: Path, name: str) -> None:
    """Let the record of a run that was copied name its new place."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["run_dir"] = str(run.with_name(name))
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
