"""Hostile reward functions: a run of one step with each, which must end, its other completions scored."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sapo.tasks.workers.pool import shared_pool
from support.runs import write_recipe
from trials.harness import Outcome, Tally, call

ACTS = {
    "raises": "raise ValueError('no')",
    "exits": "sys.exit(3)",
    "exits at once": "os._exit(3)",
    "is interrupted": "raise KeyboardInterrupt",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "aborts": "os.abort()",
    "kills its guard": "os.kill(os.getppid(), signal.SIGKILL)",
    "hangs": "time.sleep(1000)",
    "spins": "while True: pass",
    "recurses": "f = lambda: f(); return f()",
    "fills its memory": "return len([bytearray(2**28) for _ in range(64)])",
    "starts threads that stay": "[threading.Thread(target=time.sleep, args=(9,)).start() for i in range(8)]; return 1",
    "forks and returns twice": "os.fork(); return 0.5",
    "starts what leaves its session": "subprocess.Popen(['sleep', '{mark}'], start_new_session=True); return 0.5",
    "writes to what it finds": "[writes(fd, b'junk') for fd in map(int, os.listdir('/dev/fd')) if fd > 2]; return 0.5",
    "closes what it finds": "os.closerange(3, 1000); return 0.5",
    "patches json": "json.dumps = json.loads = json.JSONEncoder.encode = lambda *a, **k: 7; return 0.5",
    "patches pickle": "pickle.loads = pickle.dumps = lambda *a, **k: 7; return 0.5",
    "patches struct": "struct.pack = struct.unpack = lambda *a: 7; return 0.5",
    "closes its streams": "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2); return 0.5",
    "prints much": "print('x' * 10**5); return 0.5",
    "changes directory": "os.chdir('/'); return 0.5",
    "empties the path": "sys.path.clear(); return 0.5",
    "gives 1e200": "return 1e200",
    "gives -1e308": "return -1e308",
    "gives nan": "return float('nan')",
    "gives a huge integer": "return 10**400",
    "gives None": "return None",
    "gives a text": "return '1'",
    "gives a number that raises": "return Odd()",
    "gives a score of nonsense": "return Score('x', 'y', 7, [], {1: object()})",
    "gives a huge answer": "return Score(0.5, answer='a' * 10**7)",
    "gives many figures": "return Score(0.5, figures={str(i): 1.0 for i in range(10**5)})",
    "gives huge figures": "return Score(0.5, figures={'x': 1e300})",
}
"""What a function does to a part of the completions, as Python; what returns a number may count as a score."""

SOURCE = """
import json, os, pickle, signal, struct, subprocess, sys, threading, time
from sapo.data import Score

class Odd(float):
    def __float__(self): raise RuntimeError("no")

def writes(fd, data):
    try: os.write(fd, data)
    except OSError: pass

def hostile(completion):
    if completion.count("7") != 1: return completion.count("7") / 8
    {act}
"""

OPTIONS = {
    "train__steps": 1,
    "train__minibatches": 1,
    "eval__every": 0,
    "rollout__max_new_tokens": 12,
    "rollout__prompts_per_step": 4,
    "rollout__samples_per_prompt": 8,
}


def run(place: Path, *, share: float = 1.0, seed: int = 0, tally: Tally | None = None) -> Tally:
    """Train a step with a share of the functions; completions that a function does no harm to must be scored."""
    tally = tally or Tally()
    os.chdir(place)
    drawn, mark = random.Random(seed), f"1000.{os.getpid()}"
    for number, (name, act) in enumerate(ACTS.items()):
        if drawn.random() >= share:
            continue
        recipe = write_recipe(place, **OPTIONS, run_dir=f"run{number}")
        verifier = f"{{name: 'hostile_{number}:hostile', deadline: 0.5, memory_gb: 0.5}}"
        recipe.write_text(recipe.read_text().replace("rewards_of_a_test:share_of_sevens", verifier))
        (place / f"hostile_{number}.py").write_text(SOURCE.replace("{act}", act).replace("{mark}", mark))
        outcome = call("train", str(recipe), patience=120)
        shared_pool().close()
        left = f"a process is left: {mark}" if any(_commands(mark)) else None
        tally.add(f"a reward function that {name}", outcome, _harm(outcome, place / f"run{number}") or left)
    return tally


def _harm(outcome: Outcome, directory: Path) -> str | None:
    """Return what broke: a run that did not end, or a completion that was not scored and should have been."""
    if outcome.code != 0:
        return outcome.trace or f"exit {outcome.code}: {outcome.lines}"
    files = (directory / "rollouts").iterdir()
    rollouts = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    harmed = [r for r in rollouts if r["text"].count("7") != 1 and r["status"] not in ("scored", "truncated")]
    if not any(r["text"].count("7") == 1 for r in rollouts):
        return "the function was never hostile"
    return f"{len(harmed)} completions not scored, the first with {harmed[0]['detail']}" if harmed else None


def _commands(mark: str) -> Iterator[str]:
    """Yield the commands of processes that have the mark among their arguments."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text().split("\0"):
                yield entry.name
