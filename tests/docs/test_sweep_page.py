"""The sweep of docs/howto/sweeps.md: the command that W&B's agent makes of it is one that sapo takes, and runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo.config.recipes import load_recipe
from support.pages import DOCS, blocks

TRIAL = {"train.learning_rate": 4.2e-5, "objective.tau_neg": 1.05, "seed": 2}


def sweep() -> dict[str, Any]:
    """Return the sweep of the page."""
    text = (DOCS / "howto" / "sweeps.md").read_text()
    [found] = [block for block in blocks(text) if block.marks.get("file") == "sweep.yaml"]
    read: dict[str, Any] = yaml.safe_load(found.text)
    return read


def started_by_the_agent(command: list[str], shim: Path) -> list[str]:
    """Return the arguments with which `sapo` is started, macros filled in by W&B's own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    filled = {**utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in TRIAL.items()}})}
    words: list[str] = []
    for chunk in utils.create_sweep_command(command):
        macro = re.fullmatch(r"\$\{(\w+)\}", chunk)
        words += filled[macro[1]] if macro else [chunk]
    shim.mkdir()
    (shim / "sapo").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (shim / "sapo").chmod(0o755)
    env = {"PATH": f"{shim}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_agents_command_is_a_run_with_the_trials_settings_in_a_directory_of_its_own(tmp_path: Path) -> None:
    verb, recipe, *overrides = started_by_the_agent(sweep()["command"], tmp_path / "bin")
    assert (verb, recipe) == ("train", "quickstart")
    config = load_recipe(recipe, overrides)
    assert (config.train.learning_rate, config.objective.model_dump()["tau_neg"], config.seed) == (4.2e-5, 1.05, 2)
    assert str(config.run_dir) == "runs/sweep-abc123"
    assert config.log.wandb is not None
    evaluations = config.train.steps // config.eval.every
    assert sweep()["early_terminate"]["min_iter"] < evaluations, "hyperband counts reports of the metric"


def test_each_parameter_of_the_sweep_is_set_by_the_trial() -> None:
    assert set(sweep()["parameters"]) == set(TRIAL)
