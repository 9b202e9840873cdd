"""Runs that are killed inside episodes: a program that imports once, and forks a process for every run and resume.

`python -m support.killed_in_episodes DIRECTORY SEED MOMENTS [FIRST]` prints a line of JSON for each kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GAME = '''
"""Three turns, and a note of each in a file, by which the run is killed."""

import os

from game_of_a_test import Next


class Noted(Next):
    async def play(self, prompt, ask):
        async def noted(observation="", **options):
            turn = await ask(observation, **options)
            with open("turns", "ab", buffering=0) as notes:
                notes.write(b".")
            return turn

        noted.seed = ask.seed
        return await super().play(prompt, noted)
'''
STEPS = 3


def recipe(directory: Path, name: str, play_in: str) -> Any:
    import sapo

    written = {
        "run_dir": str(directory / name),
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(directory / "model")},
        "tasks": [{"name": "noted_game:Noted"}],
        "rollout": {
            "prompts_per_step": 3,
            "samples_per_prompt": 2,
            "max_new_tokens": 20,
            "turns": {"play_in": play_in, "seconds_per_reply": 300},
        },
        "train": {"steps": STEPS, "minibatches": 1, "learning_rate": 1e-3},
        "eval": {"every": 0, "problems": 2, "samples": 1, "k": [1]},
        "checkpoint": {"every": 1, "keep": 9},
        "log": {"rollouts_every": 1, "tensorboard": False},
    }
    (directory / "recipe.yaml").write_text(json.dumps(written))
    return sapo.load_recipe(directory / "recipe.yaml")


def forked(call: Callable[[], Any]) -> int:
    """Run a call in a child process and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    os.dup2(2, 1)  # the results alone go to standard output
    try:
        call()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def turns(directory: Path) -> int:
    """Return how many turns were heard of so far."""
    try:
        return (directory / "turns").stat().st_size
    except FileNotFoundError:
        return 0


def fingerprint(run: Path) -> str:
    """Hash all of a finished run that has to be equal: metrics without the clock, completions, weights, optimizer."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = json.dumps([{k: v for k, v in line.items() if k != "timing"} for line in lines])
    files = sorted((run / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"))
    hashed = [hashlib.sha256(f.read_bytes()).hexdigest() for f in [*files, *sorted((run / "rollouts").iterdir())]]
    return hashlib.sha256(json.dumps([kept, *hashed]).encode()).hexdigest()


def kill(directory: Path, number: int, play_in: str, at: int, whole: str) -> dict[str, Any]:
    """Kill a run when so many turns were heard of, resume it, and compare it with the whole one."""
    import psutil

    import sapo

    name = f"killed-{number}"
    (directory / "turns").unlink(missing_ok=True)
    child = forked(lambda: sapo.train(recipe(directory, name, play_in)))
    while turns(directory) < at and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)
    players = psutil.Process(child).children(recursive=True)
    os.kill(child, signal.SIGKILL)
    code = ended(child)
    began = time.monotonic()
    _, left = psutil.wait_procs(players, timeout=60)
    gone = time.monotonic() - began
    (directory / "turns").unlink(missing_ok=True)
    run = directory / name
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    done = sum('"kind": "step"' in line for line in lines)
    checkpoints = list((run / "checkpoints").glob("step-*"))
    again = (lambda: sapo.resume(run)) if checkpoints else (lambda: sapo.train(recipe(directory, name, play_in)))
    if not checkpoints:
        run.rename(directory / f"{name}-begun")
    resumed = ended(forked(again))
    return {
        "moment": f"turn {at}, step {done + 1}",
        "play_in": play_in,
        "killed": code == -signal.SIGKILL,
        "processes": len(players),
        "left": len(left),
        "gone_after": round(gone, 3),
        "equal": resumed == 0 and fingerprint(run) == whole,
    }


def main(place: str, seed: str, moments: str, first: str = "0") -> None:
    import torch

    from support.game import GAME as NEXT
    from support.runs import write_model

    torch.set_num_threads(1)
    directory = Path(place)
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    (directory / "game_of_a_test.py").write_text(NEXT)
    (directory / "noted_game.py").write_text(GAME)
    assert ended(forked(lambda: write_model(directory / "model"))) == 0

    import sapo

    assert ended(forked(lambda: sapo.train(recipe(directory, "whole", "driver")))) == 0
    whole, most = fingerprint(directory / "whole"), turns(directory)
    generator = random.Random(seed)
    for number in range(int(moments)):
        play_in, at = ("process", "driver")[number % 2], generator.randrange(1, most)
        if number >= int(first):
            print(json.dumps(kill(directory, number, play_in, at, whole)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
