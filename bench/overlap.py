"""What drawing beside the updates saves: wall clock of whole runs. `python -m bench.overlap [--quick]`.

A run whose completions have a long tail: a model drawn by chance ends a completion with about the same probability at
every token, so that lengths are geometric and the longest of a batch decides how long drawing takes. It is made in
lockstep and with the engine in a thread or a process (`rollout.run_in`), at several ages of the batches. Driver and
engine have one thread each, so two cores are needed. Seconds are from the first line of a run to its last, starts of
processes left out. Runs of one age must be equal, metrics and weights, bit for bit; exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sapo
from bench.contest import Machine
from bench.machine import describe_machine
from bench.report import quick_or
from sapo.config.recipes import parse_recipe
from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model

FILE = Path(__file__).parent / "results" / "overlap.json"
ALPHABET = "0123456789+-*%=;#"
PLACES = ("driver", "thread", "process")


class Clock:
    """A listener that notes when lines are written, and the lengths of what was drawn."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.steps: list[dict[str, Any]] = []

    def started(self, config: sapo.RunConfig) -> None:
        """See `Listener`."""

    def record(self, record: dict[str, Any]) -> None:
        """See `Listener`."""
        self.times.append(time.perf_counter())
        if record["kind"] == "step":
            self.steps.append(record)

    def warning(self, text: str) -> None:
        """See `Listener`."""

    def checkpoint(self, checkpoint: object) -> None:
        """See `Listener`."""

    def resumed(self, checkpoint: object) -> None:
        """See `Listener`."""


def write_inputs(directory: Path, *, width: int, layers: int, max_length: int) -> None:
    """Write the model and the prompts of all runs."""
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_model(
        "qwen3",
        len(tokenizer),
        seed=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        layers=layers,
        intermediate_size=2 * width,
        max_length=max_length,
    )
    prepare_policy(model, tokenizer).save(directory / "model")
    rows = [{"prompt": f"{i}+{i + 1}=", "answer": "7"} for i in range(64)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(directory: Path, name: str, where: str, staleness: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """Make one run; return its seconds and a hash of what has to be equal."""
    config = parse_recipe(
        {
            "run_dir": str(directory / name),
            "threads": 1,
            "device": "cpu",
            "model": {"path": str(directory / "model")},
            "tasks": [
                {
                    "name": "file",
                    "path": str(directory / "prompts.jsonl"),
                    "verifier": "bench.rewards:of_text",
                    "score_truncated": True,
                }
            ],
            "rollout": {
                "prompts_per_step": sizes.prompts,
                "samples_per_prompt": sizes.samples,
                "max_new_tokens": sizes.tokens,
                "run_in": where,
                "staleness": staleness,
            },
            "train": {"steps": sizes.steps, "minibatches": 2, "learning_rate": 1e-4},
            "eval": {"every": 0, "problems": 1, "samples": 1},
            "checkpoint": {"every": 0},
            "log": {"tensorboard": False},
        }
    )
    clock = Clock()
    finished = sapo.train(config, listener=clock)
    lines = [json.loads(line) for line in (finished.directory / "metrics.jsonl").read_text().splitlines()]
    kept = json.dumps([{k: v for k, v in line.items() if k != "timing"} for line in lines]).encode()
    (weights,) = (finished.directory / "checkpoints").glob("*/model.safetensors")
    seconds = finished.summary["seconds"]
    return {
        "run_in": where,
        "staleness": staleness,
        "seconds": clock.times[-1] - clock.times[0],
        **{name: seconds.get(name, 0.0) for name in ("generate", "wait", "update", "drawing/generate")},
        "length": {k: clock.steps[-1].get(k) for k in ("length/mean", "length/max")},
        "hash": hashlib.sha256(kept + weights.read_bytes()).hexdigest(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the figures and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="in small, to see that it works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--ages", type=int, nargs="+", default=[0, 1, 2, 4])
    sizes = parser.parse_args(arguments)
    if sizes.quick:
        sizes.rounds, sizes.steps, sizes.prompts, sizes.samples, sizes.tokens, sizes.ages = 1, 2, 2, 2, 16, [1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="overlap-") as scratch:
        width, layers = (32, 2) if sizes.quick else (128, 4)
        write_inputs(Path(scratch), width=width, layers=layers, max_length=sizes.tokens + 32)
        found = [
            run(Path(scratch), f"{where}-{age}-{turn}", where, age, sizes)
            for turn in range(sizes.rounds)
            for age in sizes.ages
            for where in PLACES
        ]
    equal = all(len({f["hash"] for f in found if f["staleness"] == age}) == 1 for age in sizes.ages)
    place = quick_or(FILE, quick=sizes.quick)
    place.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(Machine(threads=1, device="cpu"))
    written = {"machine": machine, "sizes": vars(sizes), "equal": equal, "runs": found}
    place.write_text(json.dumps(written, indent=1) + "\n")
    Console().print(table(found, sizes.ages))
    Console().print(f"equal bit for bit: {equal}; {place}")
    return 0 if equal else 1


def table(found: list[dict[str, Any]], ages: list[int]) -> Table:
    """Return median seconds, place by place and age by age, and how many times as fast as lockstep of that age."""
    shown = Table("staleness", "run_in", "seconds", "lockstep / this", "waited", "updating", "drawing")
    for age in ages:
        runs = {w: [f for f in found if (f["staleness"], f["run_in"]) == (age, w)] for w in PLACES}
        median = {w: statistics.median(f["seconds"] for f in of) for w, of in runs.items()}
        for where, of in runs.items():
            figures = [statistics.median(f[name] for f in of) for name in ("wait", "update")]
            drawing = statistics.median(f["generate"] + f["drawing/generate"] for f in of)
            row = [f"{median[where]:.2f}", f"{median['driver'] / median[where]:.2f}"]
            shown.add_row(str(age), where, *row, *(f"{value:.2f}" for value in (*figures, drawing)))
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
