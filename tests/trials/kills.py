"""Runs, evaluations, comparisons and cold starts that get SIGKILL at seeded moments, and are then gone on with.

The command that goes on is the one a user gives: `resume` for a run with a checkpoint, the same command for all else.
What it ends with is held against the uninterrupted command's, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from support.kernels import fresh_cache
from support.runs import write_mixture, write_model, write_recipe
from support.vision_recipes import write_pictured_rows
from support.zygote import Forked
from trials.harness import Tally

STEPS = 4
MOMENTS = 24
"""Kills of each kind."""
RETRIES = 6
"""Further moments, each half as late, where no kill of a kind has fallen before its end."""
PATIENCE = 900.0
SHORT = {
    "train__steps": STEPS,
    "checkpoint__every": 1,
    "checkpoint__keep": 2,
    "eval__every": 2,
    "log__rollouts_every": 1,
    "device": "cpu",
}
MADE = {
    "run_dir": "run",
    "threads": 1,
    "device": "cpu",
    "model": {"coldstart": {"hidden_size": 32, "heads": 2, "target": 0.0, "max_updates": 60, "eval_problems": 16}},
    "tasks": [{"name": "arithmetic", "digits": 1}],
    "train": {"steps": 1},
}


def _mixture_of_experts(directory: Path) -> None:
    write_recipe(directory, **SHORT, model__routing_replay="R3")
    shutil.rmtree(directory / "model")
    write_model(directory / "model", "qwen3_moe", experts=4, experts_per_token=2)


def _recipe(**changes: Any) -> Callable[[Path], object]:
    return lambda directory: write_recipe(directory, **SHORT, **changes)


def _made(directory: Path) -> None:
    (directory / "recipe.yaml").write_text(yaml.safe_dump(MADE))


def _trained(directory: Path) -> None:
    write_recipe(directory, **SHORT)


def run_of(directory: Path) -> str:
    """Hash what a run leaves: metrics without the clock, completions, weights and optimizer."""
    run = directory / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "timing"} for line in lines]
    files = sorted((run / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"))
    assert any("optimizer" in file.name for file in files)
    return _hash(kept, *files, *sorted((run / "rollouts").iterdir()))


def evaluation_of(directory: Path) -> str:
    """Hash what an evaluation leaves, the clock left out."""
    results = json.loads((directory / "e" / "results.json").read_text())
    del results["timing"]
    results["model"]["path"] = "model"
    return _hash(results, directory / "e" / "completions.jsonl")


def comparison_of(directory: Path) -> str:
    """Hash the results of a comparison and the weights of its runs."""
    place = directory / "comparison"
    files = sorted(place.glob(f"runs/*/checkpoints/step-{STEPS:06d}/*.safetensors"))
    assert len(files) >= 4
    lines = [
        {k: v for k, v in json.loads(line).items() if k != "timing"}
        for file in sorted(place.glob("runs/*/metrics.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return _hash(lines, *files)


def coldstart_of(directory: Path) -> str:
    """Hash the weights of a cold start."""
    files = sorted((directory / "cache").rglob("model.safetensors"))
    assert len(files) == 1
    return _hash(None, *files)


def _hash(value: Any, *files: Path) -> str:
    hashed = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(json.dumps([value, [f.name for f in files], hashed], sort_keys=True).encode()).hexdigest()


TRAIN, RESUME = ("train", "recipe.yaml"), ("resume", "run")
EVALUATE = (
    *("eval", "model", "--task", "arithmetic", "digits=2", "--problems", "24", "--samples", "4", "--k", "1,4"),
    *("--greedy", "--max-new-tokens", "24", "--out", "e"),
)
COMPARE = (
    *("compare", "recipe.yaml", "--objectives", "sapo,grpo", "--seeds", "1", "--jobs", "1"),
    *("--out", "comparison"),
)


@dataclass(frozen=True)
class Kind:
    """A command that is killed.

    >>> KINDS["evaluation"].again == KINDS["evaluation"].command
    True
    """

    make: Callable[[Path], object]
    command: tuple[str, ...] = TRAIN
    again: tuple[str, ...] = RESUME
    outcome: Callable[[Path], str] = run_of


KINDS = {
    "dense": Kind(_recipe()),
    "mixture of experts with replay": Kind(_mixture_of_experts),
    "LoRA": Kind(_recipe(model__lora={"rank": 2})),
    "refill": Kind(lambda d: write_mixture(d, **SHORT, rollout__zero_variance="refill", rollout__prompts_per_step=4)),
    "staleness": Kind(_recipe(rollout__staleness=2, rollout__run_in="thread")),
    "pictures": Kind(lambda d: write_pictured_rows(d, **SHORT, model__vision__train="tower", rollout__staleness=1)),
    "evaluation": Kind(_trained, EVALUATE, EVALUATE, evaluation_of),
    "comparison": Kind(_trained, COMPARE, COMPARE, comparison_of),
    "cold start": Kind(_made, ("coldstart", "recipe.yaml"), ("coldstart", "recipe.yaml"), coldstart_of),
}


def run(place: Path, *, share: float = 1.0, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Kill commands at a share of the moments of each kind."""
    tally = tally or Tally()
    for name, kind in KINDS.items():
        whole = place / f"{name} whole"
        seconds = _uninterrupted(whole, kind)
        expected = kind.outcome(whole)
        drawn = random.Random(f"{seed} {name}")
        wanted, killed = max(1, round(MOMENTS * share)), 0
        for number in itertools.count():
            if number >= wanted + (0 if killed else RETRIES):
                break
            moment = drawn.uniform(0.02, 0.98) * seconds / 2 ** max(0, number - wanted + 1)
            directory = place / f"{name} {number}"
            fault = _kill(directory, kind, moment, expected)
            if fault == "ended":  # the moment came after its end
                shutil.rmtree(directory)
                continue
            tally.tried += 1
            killed += 1
            if fault is None:
                tally.accepted += 1
                shutil.rmtree(directory)
            else:
                tally.broken.append(f"{name} {number}, killed after {moment:.2f} of {seconds:.2f} s: {fault}")
        if not killed:
            tally.broken.append(f"{name}: no moment fell before its end, so that nothing was tried")
        shutil.rmtree(whole)
    return tally


def _start(directory: Path, *command: str) -> Forked:
    environment = {**os.environ, "SAPO_CACHE": fresh_cache(directory / "cache"), "OMP_NUM_THREADS": "1"}
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        return Forked("sapo", command, directory, environment, session=True, errors=log)
    finally:
        os.close(log)


def _uninterrupted(directory: Path, kind: Kind) -> float:
    directory.mkdir()
    kind.make(directory)
    began = time.monotonic()
    process = _start(directory, *kind.command)
    output, _ = process.communicate(PATIENCE)
    assert process.returncode == 0, output + (directory / "log").read_text()
    return time.monotonic() - began


def _failed(command: tuple[str, ...], process: Forked, output: str, directory: Path) -> str:
    log = (directory / "log").read_text()
    return f"{command[0]} gave exit code {process.returncode}: {output[-300:]}{log[-600:]}"


def _kill(directory: Path, kind: Kind, moment: float, expected: str) -> str | None:
    """Kill a command, go on with it, and return what is wrong with how it ended; "ended" where nothing was killed."""
    directory.mkdir()
    kind.make(directory)
    process = _start(directory, *kind.command)
    time.sleep(moment)
    if process.poll() is not None:
        output, _ = process.communicate(PATIENCE)
        return "ended" if process.returncode == 0 else _failed(kind.command, process, output, directory)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    _, left = psutil.wait_procs(children, timeout=60)
    again = kind.again
    if again == RESUME and not (directory / "run" / "config.yaml").exists():
        again = kind.command
    process = _start(directory, *again)
    output, _ = process.communicate(PATIENCE)
    if process.returncode != 0:
        return _failed(again, process, output, directory)
    if left:
        return f"{len(left)} processes left: {[p.name() for p in left if p.is_running()]}"
    try:
        return None if kind.outcome(directory) == expected else "unequal"
    except (OSError, AssertionError) as error:
        return f"lost: {error!r}"
