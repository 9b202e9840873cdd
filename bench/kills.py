"""Kill processes of runs at seeded moments, and see how each run ends: `python -m bench.kills [KIND ...]`.

A run of the quick start on two ranks is made without interruption, to be compared with. Then it is started again and
again, and one of its processes gets a signal at a moment drawn by a seed: some time after the process was seen, while
it is imported, joins, samples, updates or writes a checkpoint.

    rank      SIGKILL: the driver starts all ranks again by itself and the run ends
    driver    SIGKILL: the other rank has to end; `sapo resume` then ends the run
    engine    SIGKILL of the process that draws beside the updates of a run of one rank: it is started again
    stopped   SIGSTOP of a rank, which lives and does nothing: noticed by its missing signs of life, then as a death

For each: seconds until all processes of the killed attempt were gone or the driver had gone on, seconds of the whole
beside the uninterrupted run, and whether metrics, completions, weights and optimizer are equal bit for bit. Every kill
is written to a file at once; the same command goes on with those that are missing, and `--document` puts the table of
all in the file into docs/reliability.md. Exit code 1 where a run ends otherwise, where a process is left behind, or
where one hangs for more than a minute beyond what its kind allows.
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.processes import ENGINE, RANK, processes_of
from bench.report import RESULTS
from sapo.utils.files import write_whole

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
PATIENCE = 1800.0
DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by python -m bench.kills: begin -->", "<!-- written by python -m bench.kills: end -->"


@dataclass(frozen=True)
class Kind:
    """What is done to which process of a run.

    >>> KINDS["driver"].module is None
    True
    """

    module: str | None
    """What the victim runs; None for the driver itself."""
    number: signal.Signals = signal.SIGKILL
    said: str = "SIGKILL"
    """What the driver prints when it has noticed."""
    settings: tuple[str, ...] = ()
    """Of the run, beside SETTINGS. The uninterrupted run of the same settings is what it is compared with."""
    allowed: float = 0.0
    """Seconds in which it need not be noticed yet."""


KINDS = {
    "rank": Kind(RANK),
    "driver": Kind(None),
    "engine": Kind(ENGINE, settings=("train.ranks=1", "rollout.run_in=process", "rollout.staleness=2")),
    "stopped": Kind(RANK, signal.SIGSTOP, "gave no sign of life", ("train.rank_timeout=20",), allowed=100.0),
}
"""By name. A further one needs an entry here alone."""


@dataclass(frozen=True)
class Kill:
    """One kill, and how the run ended."""

    kind: str
    number: int
    moment: str
    noticed: float
    """Seconds until the driver said so, or until the other ranks had ended."""
    lost: float
    """Seconds beyond those of the uninterrupted run."""
    equal: bool
    left: int
    """Processes left behind."""
    made: bool
    """Whether there was a process to kill: a late moment may come after the end of the run."""

    @property
    def well(self) -> bool:
        """Return whether the run ended as it should."""
        return self.equal and not self.left and self.noticed < HANG + KINDS[self.kind].allowed


class Runs:
    """Runs in one directory, compared with the uninterrupted run of their settings."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self._whole: dict[tuple[str, ...], tuple[dict[str, str], float]] = {}

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start the command line; what it prints goes to a file."""
        environment = {**os.environ, "SAPO_CACHE": str(self.directory / "cache"), "OMP_NUM_THREADS": "1"}
        with log.open("ab") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "sapo", *arguments],
                cwd=self.directory,
                env=environment,
                stdout=stream,
                stderr=stream,
            )

    def uninterrupted(self, kind: Kind) -> tuple[dict[str, str], float]:
        """Return fingerprint and seconds of the run of a kind's settings without a kill, made once."""
        if kind.settings not in self._whole:
            if not self._whole:
                self._make("first", kind)  # makes the cold start, which takes time too
            self._whole[kind.settings] = self._make(f"whole-{len(self._whole)}", kind)
        return self._whole[kind.settings]

    def _make(self, name: str, kind: Kind) -> tuple[dict[str, str], float]:
        began, log = time.monotonic(), self.directory / f"{name}.log"
        process = self.start("train", "quickstart", f"run_dir={name}", *SETTINGS, *kind.settings, log=log)
        if process.wait(PATIENCE):
            raise SystemExit(f"the run without a kill failed: {log.read_text()[-2000:]}")
        return fingerprint(self.directory / name), time.monotonic() - began

    def kill(self, name: str, number: int) -> Kill:
        """Start a run, do to one of its processes what its kind says, and see it to its end."""
        kind = KINDS[name]
        expected, whole = self.uninterrupted(kind)
        delay = random.Random(f"{self.seed} {name} {number}").uniform(0.0, 0.8) * whole
        run, log = self.directory / f"{name}-{number}", self.directory / f"{name}-{number}.log"
        began = time.monotonic()
        train = ("train", "quickstart", f"run_dir={run.name}", *SETTINGS, *kind.settings)
        driver = self.start(*train, log=log)
        victims = _wait_for(driver, kind, delay)
        ranks = processes_of(driver.pid)
        moment, killed, made = f"{delay:.2f} s, {_last_step(run)}", time.monotonic(), driver.poll() is None
        for victim in [psutil.Process(driver.pid)] if kind.module is None and made else victims[:1]:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(kind.number)
        if kind.module is None:
            psutil.wait_procs(ranks, timeout=HANG)
        else:
            _wait_until_said(driver, log, kind)
        noticed = time.monotonic() - killed
        driver.wait(PATIENCE)
        _, left = psutil.wait_procs([*ranks, *victims], timeout=HANG)
        if driver.returncode:
            # An engine that dies before anything was written ends the command, which is then given again.
            self.start(*(("resume", run.name) if run.exists() else train), log=log).wait(PATIENCE)
        lost = time.monotonic() - began - whole
        try:
            equal = fingerprint(run) == expected
        except OSError:
            equal = False
        return Kill(name, number, moment, noticed, lost, equal, len(left), made)


def _wait_for(driver: subprocess.Popen[bytes], kind: Kind, delay: float) -> list[psutil.Process]:
    """Wait until so many seconds after the victim (the ranks, for the driver) was seen; return those seen."""
    seen: float | None = None
    victims: list[psutil.Process] = []
    while driver.poll() is None and (seen is None or time.monotonic() - seen < delay):
        victims = victims or processes_of(driver.pid, kind.module or RANK)
        if victims and seen is None:
            seen = time.monotonic()
        time.sleep(0.002)
    return victims


def _wait_until_said(driver: subprocess.Popen[bytes], log: Path, kind: Kind) -> None:
    deadline = time.monotonic() + HANG + kind.allowed
    while kind.said.encode() not in b" ".join(log.read_bytes().split()) and driver.poll() is None:
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def fingerprint(run: Path) -> dict[str, str]:
    """Hash all of a finished run that has to be equal: metrics without the clock, completions, weights, optimizer."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.dumps([{k: v for k, v in line.items() if k != "timing"} for line in lines])
    files = [*(run / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"), *(run / "rollouts").iterdir()]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {**found, "metrics": hashlib.sha256(metrics.encode()).hexdigest()}


def _last_step(run: Path) -> str:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return f"in step {json.loads(lines[-1])['step'] + 1}" if lines else "before the first line"
    except (OSError, json.JSONDecodeError):
        return "before the first line"


def table(kills: Sequence[Kill]) -> str:
    """Write the kills as a table in Markdown. Moments after the end of a run are left out."""
    rows = [
        "| killed | kills | noticed after, s | lost, s | equal to the bit | left behind |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(k.kind for k in kills):
        of = [k for k in kills if k.kind == kind and k.made]
        if not of:
            continue
        noticed, lost = [k.noticed for k in of], [k.lost for k in of]
        rows.append(
            f"| {kind} | {len(of)} | {statistics.median(noticed):.1f} ({min(noticed):.1f} to {max(noticed):.1f}) "
            f"| {statistics.median(lost):.1f} ({min(lost):.1f} to {max(lost):.1f}) "
            f"| {sum(k.equal for k in of)} of {len(of)} | {sum(k.left for k in of)} |"
        )
    return "\n".join(rows)


def read_kills(file: Path, seed: int) -> list[Kill]:
    """Read the kills made before with this seed; none without the file."""
    if not file.exists():
        return []
    found: dict[str, Any] = json.loads(file.read_text())
    if found["seed"] != seed:
        raise SystemExit(f"{file} holds kills of seed {found['seed']}, not {seed}; name another file with --json")
    return [Kill(**kill) for kill in found["kills"]]


def write_kills(file: Path, seed: int, kills: Sequence[Kill]) -> None:
    """Write the kills made so far, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"seed": seed, "kills": [asdict(k) for k in kills]}, indent=1) + "\n")


def write_document(kills: Sequence[Kill], document: Path = DOCUMENT) -> None:
    """Put the table between the marks of docs/reliability.md; what is written by hand around them stays."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{document} lacks the marks {BEGIN} and {END}"
    write_whole(document, f"{before}{BEGIN}\n{table(kills)}\n{END}{after}")


def main(arguments: list[str] | None = None) -> int:
    """Make the kills that are missing, print the table, and tell by the exit code whether every run ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all when none is named")
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "kills.json", help="where kills are kept")
    parser.add_argument("--document", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args(arguments)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"no kind is called {unknown[0]!r}; known: {', '.join(KINDS)}")
    kills = read_kills(options.json, options.seed)
    made = {(k.kind, k.number) for k in kills}
    asked = [(kind, n) for n in range(options.kills) for kind in options.kinds or KINDS]
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(Path(scratch), options.seed)
        for kind, number in asked:
            if (kind, number) not in made:
                kills.append(runs.kill(kind, number))
                write_kills(options.json, options.seed, kills)
                print(kills[-1], flush=True)
    print(table(kills))
    if options.document:
        write_document(kills)
    return int(not all(k.well for k in kills))


if __name__ == "__main__":
    sys.exit(main())
