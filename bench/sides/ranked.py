"""sapo's side as a training group: an update over any number of ranks, then sync and checkpoint, timed one by one.

The group is that of `train.ranks`, started as a run starts it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from bench.sides.clock import timed, use_machine
from bench.sides.ours import _groups
from bench.sides.serve import LEARNING_RATE, Commands, completions_of, limits_of
from sapo.config.recipes import parse_recipe
from sapo.model.loading import load_policy
from sapo.run.machine import resolve_machine
from sapo.run.trainers import make_packer, make_trainer, trainer_settings
from sapo.training.checkpoint import save_checkpoint
from sapo.training.logprobs import GroupLogprobs
from sapo.training.ranks import Trainers
from sapo.workflows.training_group import start_trainers


def main(commands: Commands) -> None:
    """Serve rounds until the parent hangs up."""
    settings = commands.settings
    device = use_machine(settings)
    commands.imported()
    directory = Path(settings["scratch"])
    config = resolve_machine(parse_recipe(_recipe(settings, directory)))
    policy = load_policy(settings["model"], settings["dtype"], device)
    trainers: Trainers | None = start_trainers(config, directory, policy, None)
    if trainers is None:
        trainers = make_trainer(config, trainer_settings(config), policy)
    packer = replace(make_packer(config, policy), normalizer="sequence_mean")
    logprobs = GroupLogprobs(trainers, packer)

    def work(limits: list[list[int]]) -> tuple[float, dict[str, Any]]:
        groups = _groups(settings["prompts"], completions_of(limits))
        groups = logprobs.attach_old(groups, trainers.updates)
        seconds, result = timed(lambda: trainers.update(packer.pack(groups), LEARNING_RATE), device)
        sync, _ = timed(lambda: trainers.send_weights(policy), device)
        checkpoint, written = timed(
            lambda: save_checkpoint(
                directory / "checkpoints",
                trainers.updates,
                0,
                policy=policy,
                save_optimizer=trainers.save_optimizer,
                state={},
                batches={},
            )
        )
        facts = {"tokens": sum(map(sum, limits)), "losses": [result.loss], "norms": [result.grad_norm]}
        return seconds, facts | {"sync": sync, "checkpoint": checkpoint, "model": str(written.path)}

    work(limits_of(settings, "warm"))
    commands.ready(startup=seconds_since_start(), backends="")
    for do in commands:
        seconds, facts = work(limits_of(settings, do))
        commands.reply(seconds, facts["tokens"], **facts)
    trainers.close()


def seconds_since_start() -> float:
    """Seconds since this process was started: imports, loading and a first small update."""
    return time.time() - psutil.Process().create_time()


def _recipe(settings: dict[str, Any], directory: Path) -> dict[str, Any]:
    return {
        "run_dir": str(directory / "run"),
        "threads": settings["threads"],
        "device": settings["device"],
        "model": {"path": settings["model"], "dtype": settings["dtype"]},
        "tasks": [{"name": "arithmetic"}],
        "rollout": {
            "prompts_per_step": len(settings["texts"]),
            "samples_per_prompt": settings["samples"],
            "max_new_tokens": max(map(max, settings["limits"])),
        },
        "train": {"steps": 1, "minibatches": 1, "ranks": settings["ranks"]},
    }
