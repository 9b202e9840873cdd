"""What looking costs: the share of a step that diagnostics and logs take. `python -m bench.overhead [--model moe]`.

What the loop measures of updates and batches, the rules of early warning, the records it keeps of rollouts, and what it
writes (metrics, TensorBoard, rollouts) are timed in place, over as many steps as make one round of what a recipe asks
for every tenth step: distributions, counterfactual gates, rollouts. What is left out is the entropy, which the policy
head computes in its own pass: it is measured by turning it off, update by update in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import sapo.run.journal
import sapo.run.loop
from bench.contest import Machine
from bench.contests import REAL_STEP, TINY, TINY_MOE
from bench.machine import describe_machine
from bench.report import quick_or
from bench.sides import ours
from bench.sides.clock import Stopwatch, timed
from bench.workloads import settings_of
from sapo.training.trainer import Trainer

FILE = Path(__file__).parent / "results" / "overhead.json"
GOAL = 0.02

WORKLOADS = {
    "tiny": TINY,
    "moe": TINY_MOE,
    "moe-16x8": replace(TINY_MOE, prompts=16),  # a step of the paper's comparisons: the fewest tokens to share the cost
    "135m": REAL_STEP,
}


class Meter:
    """Seconds spent in the functions it was put around; calls within calls count once.

    On a GPU what was launched before is waited for first, and what they launch is theirs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds = 0.0
        self.device = device
        self.names: list[str] = []
        self._depth = 0
        self._replaced: list[tuple[Any, str, Any]] = []

    def around(self, owner: Any, name: str) -> None:
        """Replace a function by one that does the same and is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        def metered(*args: Any, **options: Any) -> Any:
            watch = None if self._depth else Stopwatch(self.device)
            self._depth += 1
            try:
                return function(*args, **options)
            finally:
                self._depth -= 1
                if watch is not None:
                    self.seconds += watch.stop()

        setattr(owner, name, metered)
        self.names.append(name)
        self._replaced.append((owner, name, function))

    def remove(self) -> None:
        """Put the functions back."""
        while self._replaced:
            setattr(*self._replaced.pop())


def put_meter(run: Any) -> Meter:
    """Around all that a run does for its observer alone."""
    meter = Meter(run.policy.device)
    observers = ("sapo.diagnostics", "sapo.run.state", "sapo.run.records", "sapo.run.collapse")
    for module in (sapo.run.loop, sapo.run.journal):
        for name, value in list(vars(module).items()):
            observes = getattr(value, "__module__", "").startswith(observers)
            if observes and callable(value) and not isinstance(value, type):
                meter.around(module, name)
    for owner, names in (
        (run.diagnosis, ("before", "after")),
        (run.loggers, ("log",)),
        (run.directory, ("append_metrics", "write_rollouts")),
    ):
        for name in names:
            meter.around(owner, name)
    return meter


def measure(workload: Any, machine: Machine, steps: int) -> dict[str, Any]:
    """Share of a step, and of an update by the entropy."""
    torch.set_num_threads(machine.threads)
    device = torch.device(machine.device)
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        settings = settings_of(workload, Path(scratch)) | {
            "threads": machine.threads,
            "dtype": "float32",
            "scratch": scratch,
        }
        work, run = ours.step_of(settings, device)
        work(settings["limits"])
        meter = put_meter(run)
        shares, entropy = [], []
        spent = taken = 0.0
        try:
            for _ in range(steps):
                meter.seconds = 0.0
                seconds, _ = work(settings["limits"])
                shares.append(meter.seconds / seconds)
                spent, taken = spent + meter.seconds, taken + seconds
                entropy += _entropy_shares(run)
        finally:
            meter.remove()
            run.loggers.close()
            run.directory.close()
    return {
        "about": describe_machine(machine),
        "metered": meter.names,
        "steps": steps,
        "share_of_step": {"all": spent / taken, "min": min(shares), "max": max(shares)},
        "entropy_share_of_update": {"median": statistics.median(entropy), "min": min(entropy), "max": max(entropy)},
    }


def _entropy_shares(run: Any, pairs: int = 4) -> list[float]:
    """How much longer an update takes with the entropy than without, one after the other on the same batch."""
    groups = run.rollout().groups
    shares = run.packer.pack(groups[: max(1, len(groups) // run.config.train.minibatches)])
    trainers = {
        entropy: Trainer(run.policy, run.trainer.optimizer, replace(run.trainer.settings, entropy=entropy))
        for entropy in (True, False)
    }
    shares = []
    for number in range(pairs):
        took = {}
        for entropy in (True, False) if number % 2 else (False, True):
            update = partial(trainers[entropy].update, shares, ours.LEARNING_RATE)
            took[entropy], _ = timed(update, run.policy.device)
        shares.append(took[True] / took[False] - 1)
    return shares


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description="What diagnostics cost.")
    parser.add_argument("--model", choices=tuple(WORKLOADS), default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="a whole round of every tenth step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, help=f"default {FILE}")
    options = parser.parse_args(arguments)
    results = options.results or quick_or(FILE, quick=options.quick)
    workload = WORKLOADS[options.model]
    workload = workload.shrunk() if options.quick else workload
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = measure(workload, Machine(options.threads, device), options.steps)
    results.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(results.read_text()) if results.is_file() else {}
    results.write_text(json.dumps({**known, options.model: result}, indent=1) + "\n")
    share, entropy = result["share_of_step"], result["entropy_share_of_update"]
    mark = "met" if share["all"] < GOAL else "missed"
    Console().print(
        f"diagnostics and logs take {share['all']:.2%} of the steps' time "
        f"(single steps {share['min']:.2%} .. {share['max']:.2%}); goal below {GOAL:.0%}: {mark}. "
        f"The entropy adds {entropy['median']:.2%} to an update ({entropy['min']:.2%} .. {entropy['max']:.2%})."
    )


if __name__ == "__main__":
    main()
