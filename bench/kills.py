"""Kill processes of runs at seeded moments, and see how each run ends: `python -m bench.kills`.

A run of the quick start on two ranks is made without interruption, twice, to see that it is the same run. Then it is
started again and again, and one of its processes gets SIGKILL at a moment drawn by a seed: some time after the process
was seen, while it is imported, joins, samples, updates or writes a checkpoint.

    rank     the driver starts all ranks again by itself and the run ends
    driver   the other rank has to end; `sapo resume` then ends the run

For each kill: seconds until all processes of the killed attempt were gone or the driver had gone on, seconds of the
whole beside the uninterrupted run, and whether metrics, completions, weights and optimizer are equal bit for bit.
Exit code 1 where a run ends otherwise, where a process is left behind, or where one hangs for a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SETTINGS = (
    "train.ranks=2",
    "threads=1",
    "device=cpu",
    "train.steps=12",
    "train.max_restarts=3",
    "rollout.prompts_per_step=8",
    "eval.every=0",
    "eval.problems=16",
    "eval.samples=2",
    "eval.k=[1]",
    "checkpoint.every=3",
    "checkpoint.keep=2",
    "log.rollouts_every=1",
    "log.tensorboard=false",
)
STEPS = 12
HANG = 60.0
"""Seconds after a kill in which the rest of the killed attempt must have ended, or gone on."""
PATIENCE = 600.0


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run ended."""

    victim: str
    moment: str
    noticed: float
    """Seconds until the driver said so, or until the other ranks had ended."""
    lost: float
    """Seconds beyond those of the uninterrupted run."""
    equal: bool
    left: int
    """Processes left behind."""


def start(*arguments: str, cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the command line; what it prints goes to a file."""
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "sapo", *arguments], cwd=cwd, stdout=stream, stderr=stream)


def ranks_of(driver: int) -> list[psutil.Process]:
    """Return the other ranks that a driver has started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "sapo.workflows.training_group" in child.cmdline():
                    found.append(child)
    return found


def fingerprint(run: Path) -> dict[str, str]:
    """Hash all of a finished run that has to be equal: metrics without the clock, completions, weights, optimizer."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.dumps([{k: v for k, v in line.items() if k != "timing"} for line in lines])
    files = [*(run / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"), *(run / "rollouts").iterdir()]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {**found, "metrics": hashlib.sha256(metrics.encode()).hexdigest()}


def uninterrupted(directory: Path, name: str) -> tuple[dict[str, str], float]:
    """Make the run without a kill; return its fingerprint and seconds."""
    began = time.monotonic()
    process = start("train", "quickstart", f"run_dir={name}", *SETTINGS, cwd=directory, log=directory / f"{name}.log")
    if process.wait(PATIENCE):
        raise SystemExit(f"the run without a kill failed: {(directory / f'{name}.log').read_text()[-2000:]}")
    return fingerprint(directory / name), time.monotonic() - began


def kill(victim: str, number: int, delay: float, directory: Path, expected: dict[str, str], whole: float) -> Kill:
    """Start a run, kill one of its processes, and see it to its end."""
    name = f"{victim}-{number}"
    run, log = directory / name, directory / f"{name}.log"
    began = time.monotonic()
    driver = start("train", "quickstart", f"run_dir={name}", *SETTINGS, cwd=directory, log=log)
    ranks: list[psutil.Process] = []
    seen = None
    while driver.poll() is None and (seen is None or time.monotonic() - seen < delay):
        ranks = ranks or ranks_of(driver.pid)
        if ranks and seen is None:
            seen = time.monotonic()
        time.sleep(0.002)
    moment = f"{delay:.2f} s, {_last_step(run)}"
    killed = time.monotonic()
    if victim == "rank":
        with suppress(psutil.NoSuchProcess):
            ranks[0].kill()
        while b"SIGKILL" not in b" ".join(log.read_bytes().split()) and driver.poll() is None:
            if time.monotonic() - killed > HANG:
                break
            time.sleep(0.01)
    else:
        driver.send_signal(signal.SIGKILL)
        psutil.wait_procs(ranks, timeout=HANG)
    noticed = time.monotonic() - killed
    driver.wait(PATIENCE)
    _, left = psutil.wait_procs(ranks, timeout=HANG)
    if driver.returncode:
        start("resume", name, cwd=directory, log=log).wait(PATIENCE)
    lost = time.monotonic() - began - whole
    try:
        equal = fingerprint(run) == expected
    except OSError:
        equal = False
    return Kill(victim, moment, noticed, lost, equal, len(left))


def _last_step(run: Path) -> str:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return f"in step {json.loads(lines[-1])['step'] + 1}" if lines else "before the first line"
    except (OSError, json.JSONDecodeError):
        return "before the first line"


def table(kills: list[Kill]) -> str:
    """Write the kills as a table in Markdown."""
    rows = [
        "| killed | kills | noticed after, s | lost, s | equal to the bit | left behind |",
        "|---|---|---|---|---|---|",
    ]
    for victim in dict.fromkeys(k.victim for k in kills):
        of = [k for k in kills if k.victim == victim]
        noticed, lost = [k.noticed for k in of], [k.lost for k in of]
        rows.append(
            f"| {victim} | {len(of)} | {statistics.median(noticed):.1f} ({min(noticed):.1f} to {max(noticed):.1f}) "
            f"| {statistics.median(lost):.1f} ({min(lost):.1f} to {max(lost):.1f}) "
            f"| {sum(k.equal for k in of)} of {len(of)} | {sum(k.left for k in of)} |"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Make all kills, print the table, and tell by the exit code whether every run ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every kill to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        os.environ["SAPO_CACHE"] = str(directory / "cache")
        os.environ["OMP_NUM_THREADS"] = "1"
        uninterrupted(directory, "first")  # makes the cold start
        expected, whole = uninterrupted(directory, "second")
        again, _ = uninterrupted(directory, "third")
        print(f"uninterrupted: {whole:.1f} s, the same to the bit when made again: {expected == again}", flush=True)
        generator, kills = random.Random(options.seed), []
        for number in range(options.kills):
            for victim in ("rank", "driver"):
                delay = generator.uniform(0.0, 0.8 * whole)
                kills.append(kill(victim, number, delay, directory, expected, whole))
                print(kills[-1], flush=True)
    print(table(kills))
    if options.json:
        found: dict[str, Any] = {"seed": options.seed, "whole": whole, "kills": [vars(k) for k in kills]}
        options.json.write_text(json.dumps(found, indent=1))
    return int(not all(k.equal and not k.left and k.noticed < HANG for k in kills))


if __name__ == "__main__":
    sys.exit(main())
