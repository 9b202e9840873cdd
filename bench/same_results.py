"""Prove that two trees train to the same bits: `python -m bench.same_results BASE [HEAD]`.

Each side is a commit or a directory; HEAD is the present working tree by default. Both sides run the same short recipes
through the command line, each from its own recipe files and with its own cache, so that cold starts, compiled kernels
and converted weights are made by the side that uses them. The sides share the interpreter and its packages.

Compared are every line of metrics.jsonl, every completion in rollouts/, and every tensor of the final checkpoint.
Clocks are not compared, nor the wording of warnings and of a verifier's reasons, nor what else a checkpoint holds. The
exit code is 1 where anything differs, where a run fails, and where a recipe did not move the weights.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]

STATE_FILES = frozenset({"batches.safetensors"})
"""Files of a checkpoint that hold the state of the run and neither weights nor optimizer."""

WORDING = {"metrics": "text", "rollouts": "detail"}
"""Fields that are sentences for a person, which may be reworded."""

LAUNCH = """
import sys
from pathlib import Path
import sapo
from sapo.cli import main
tree = Path(sys.argv.pop(1))
assert Path(sapo.__file__).is_relative_to(tree), f"sapo was imported from {sapo.__file__}, not from {tree}"
main()
"""

COMMON = (
    "threads=1",
    "device=cpu",
    "eval.every=0",
    "eval.problems=16",
    "eval.samples=2",
    "eval.k=[1]",
    "log.rollouts_every=1",
)

# One digit is learned in seconds, and by no means fully: groups with a spread of rewards are what an update needs.
COLD = (
    "tasks.0.digits=1",
    "model.coldstart.target=0",
    "model.coldstart.examples=100",
    "model.coldstart.learning_rate=3.0e-3",
    "model.coldstart.max_updates=50",
    "model.coldstart.eval_every=50",
    "model.coldstart.eval_problems=8",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "checkpoint.every=2",
)


@dataclass(frozen=True)
class Case:
    """A recipe shortened by overrides whose keys are the same on both sides."""

    recipe: str
    steps: int
    overrides: tuple[str, ...] = COLD
    label: str = ""
    resumed_to: int | None = None
    """Last step of a resume from the checkpoint after `steps`; None for a run without one."""

    @property
    def name(self) -> str:
        """The recipe, and what tells two cases of it apart."""
        return f"{self.recipe} {self.label}".strip()

    @property
    def directory(self) -> str:
        """The run directory's name."""
        return self.name.replace(" ", "-")

    def commands(self) -> Iterator[list[str]]:
        """Arguments of `sapo`, one process each."""
        run = f"runs/{self.directory}"
        yield ["train", self.recipe, f"run_dir={run}", *COMMON, *self.overrides, f"train.steps={self.steps}"]
        if self.resumed_to is not None:
            yield ["resume", run, f"train.steps={self.resumed_to}"]


CASES = (
    Case("quickstart", 3),
    Case("moe_quickstart", 3, (*COLD, "model.routing_replay=R3"), label="R3"),
    Case("moe_quickstart", 3, (*COLD, "model.routing_replay=R2"), label="R2"),
    Case("mixture", 3),
    Case("stale", 3, label="resumed", resumed_to=5),  # the checkpoint holds two batches that wait for their step
    Case("mismatch_tis", 3),
    Case("smollm2_sums_lora", 2, ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "eval.problems=8")),
)


@dataclass(frozen=True)
class Side:
    """A source tree and the directory that its runs and its cache are written to."""

    tree: Path
    scratch: Path

    def run(self, case: Case) -> None:
        """Run a case.

        Raises:
            RuntimeError: a command failed; the message ends with what it printed last.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SAPO_", "PYTHON"))}
        environment |= {"PYTHONPATH": str(self.tree / "src"), "SAPO_CACHE": str(self.scratch / "cache")}
        for arguments in case.commands():
            done = subprocess.run(
                [sys.executable, "-c", LAUNCH, str(self.tree), *arguments],
                cwd=self.scratch,
                env={**environment, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode:
                last = "\n".join(done.stdout.strip().splitlines()[-8:])
                raise RuntimeError(f"sapo {' '.join(arguments[:2])} of {self.tree} failed ({done.returncode}):\n{last}")


@dataclass
class Tally:
    """How many of the items of two sides are equal, and where the first two differ."""

    equal: int = 0
    total: int = 0
    first: str | None = None

    def count(self, where: str, difference: str | None) -> None:
        """Count an item; `difference` is None for an equal one."""
        self.total += 1
        self.equal += difference is None
        if difference is not None and self.first is None:
            self.first = f"{where}: {difference}"

    def __str__(self) -> str:
        return f"{self.equal}/{self.total}"


def source_tree(name: str, directory: Path) -> Path:
    """Return a directory as it is, or the tree of a commit after writing it to `directory`."""
    if Path(name).is_dir():
        return Path(name).resolve()
    # An archive and no worktree: a run that is killed leaves nothing registered in the repository.
    done = subprocess.run(["git", "archive", name], cwd=REPOSITORY, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"a side is a commit or a directory; got {name!r}; git says {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory.resolve()


def without_clocks(value: Any) -> Any:
    """Drop what a clock measured from a JSON value."""
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k != "timing" and not k.endswith("seconds")}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def records(files: Iterable[Path], wording: str) -> list[tuple[str, dict[str, Any]]]:
    """Read JSON lines, each with its place, without clocks and without the field of wording."""
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            record = without_clocks(json.loads(line))
            record.pop(wording, None)
            found.append((f"{file.name} line {number}", record))
    return found


def compare_records(base: list[tuple[str, dict[str, Any]]], head: list[tuple[str, dict[str, Any]]]) -> Tally:
    """Compare records in order."""
    tally = Tally()
    for ours, theirs in zip_longest(base, head):
        place = (ours or theirs)[0]
        tally.count(place, first_difference(ours[1] if ours else ..., theirs[1] if theirs else ...))
    return tally


def first_difference(left: Any, right: Any, where: str = "") -> str | None:
    """Return where two JSON values first differ and how, None where they are equal.

    Numbers are equal when they are written alike, so that 1 is not 1.0. An ellipsis stands for what is not there.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        keys = dict.fromkeys([*left, *right])
        parts = ((left.get(k, ...), right.get(k, ...), f"{where}.{k}" if where else k) for k in keys)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        parts = ((a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True)))
    else:
        shown = [textwrap.shorten(repr(v), 120) for v in (left, right)]
        return None if repr(left) == repr(right) else f"{where or 'record'}: {shown[0]} and {shown[1]}"
    return next(filter(None, (first_difference(*part) for part in parts)), None)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Load weights and optimizer state of the newest checkpoint of a run, by file and name."""
    newest = max((run / "checkpoints").glob("step-*"), default=run)
    files = sorted(f for f in newest.rglob("*.safetensors") if f.name not in STATE_FILES)
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def compare_tensors(base: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> Tally:
    """Compare tensors bit for bit."""
    tally = Tally()
    for name in dict.fromkeys([*base, *head]):
        tally.count(name, _tensor_difference(base.get(name), head.get(name)))
    return tally


def _tensor_difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> str | None:
    if ours is None or theirs is None:
        return f"only in {'HEAD' if ours is None else 'BASE'}"
    kinds = [f"{t.dtype} {list(t.shape)}" for t in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return " and ".join(kinds)
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs))
    return None if torch.equal(left, right) else f"{kinds[0]}, {int((left != right).sum())} bytes differ"


def compare_case(case: Case, base: Side, head: Side) -> tuple[str, list[str]]:
    """Return a row of the table and what is wrong, first differences first."""
    runs = [side.scratch / "runs" / case.directory for side in (base, head)]
    metrics = [records([run / "metrics.jsonl"], WORDING["metrics"]) for run in runs]
    rollouts = [records(sorted((run / "rollouts").glob("*.jsonl")), WORDING["rollouts"]) for run in runs]
    tallies = {
        "metrics": compare_records(*metrics),
        "completions": compare_records(*rollouts),
        "tensors": compare_tensors(*map(tensors, runs)),
    }
    wrong = [f"{case.name}: {tally.first}" for tally in tallies.values() if tally.first]
    wrong += [f"{case.name}: no {name} to compare" for name, tally in tallies.items() if not tally.total]
    if not any(record.get("skipped") is False for _, record in metrics[0]):
        wrong.append(f"{case.name}: no update of BASE moved the weights, so that the comparison shows little")
    steps = str(case.steps) if case.resumed_to is None else f"{case.steps} + {case.resumed_to - case.steps}"
    return f"| {case.name} | {steps} | " + " | ".join(map(str, tallies.values())) + " |", wrong


def check(case: Case, base: Side, head: Side, pool: ThreadPoolExecutor) -> tuple[str, list[str]]:
    """Run a case on both sides at the same time and compare."""
    try:
        list(pool.map(lambda side: side.run(case), (base, head)))
    except RuntimeError as error:
        return f"| {case.name} | {case.steps} | failed | | |", [f"{case.name}: {error}"]
    return compare_case(case, base, head)


def main(arguments: list[str] | None = None) -> int:
    """Run every case on both sides and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.same_results", description="Same bits on both sides?")
    parser.add_argument("base", metavar="BASE", help="a commit or a directory")
    parser.add_argument("head", metavar="HEAD", nargs="?", default=str(REPOSITORY), help="default: the working tree")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="recipes to run; default: all")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if not options.only or case.recipe in options.only]
    if not chosen:
        parser.error(f"--only names recipes of {', '.join(sorted({c.recipe for c in CASES}))}; got {options.only}")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="same-results-") as scratch, ThreadPoolExecutor(2) as pool:
        names = {"base": options.base, "head": options.head}
        sides = [Side(source_tree(n, Path(scratch, side, "tree")), Path(scratch, side)) for side, n in names.items()]
        print("| recipe | steps | metrics lines equal | completions equal | tensors equal |")
        print("|---|---|---|---|---|", flush=True)
        for case in chosen:
            row, found = check(case, sides[0], sides[1], pool)
            print(row, flush=True)
            wrong += found
    print("\n".join(["", *wrong] if wrong else ["", "equal"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
