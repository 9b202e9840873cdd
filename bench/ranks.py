"""An update on one rank and on two, beside TRL under accelerate: `python -m bench.ranks`.

All sides train on the same completions of the same model, in turn, as in bench/contest.py; log pi_old has come with the
completions, and each round is one step of the optimizer. Ours then brings the driver's weights up to date and writes a
checkpoint, timed by themselves. Start-up is from the start of the process to the end of a first small update.

Equality: the loss of every side is held against the first one's, as in every contest. Of ours, gradient norms and the
weights of the last checkpoint are compared as well.

accelerate 1.15 shards on accelerators only: on CPUs it leaves FSDP out without a word, and TRL's two ranks hold all
weights each (DDP). The table says which it was, from the parameters themselves.

On a machine with no device for each rank, two ranks share its cores: what the table shows then is the cost of sharding
and not the gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from bench.contest import Contest, Machine, SideSpec, run_contest
from bench.machine import describe_machine
from bench.report import RESULTS, quick_or
from bench.workloads import Workload, settings_of

WORK = Workload("smollm2", prompts=4, samples=8, prompt_tokens=(16, 32), new_tokens=(64, 64), minibatches=1)
TINY = Workload("qwen3", prompts=4, samples=4, prompt_tokens=(5, 9), new_tokens=(3, 12), minibatches=1)
ROUNDS = 5


def sides(sizes: Sequence[int] = (1, 2)) -> tuple[SideSpec, ...]:
    """Ours and TRL's on each number of ranks."""
    ours = [SideSpec(f"sapo, ranks {n}", "ranked", {"ranks": n, "dtype": "float32"}) for n in sizes]
    peers = [SideSpec(f"TRL, ranks {n}", "trl", {"ranks": n, "role": "update", "dtype": "float32"}) for n in sizes]
    return (*ours, *peers)


def measure(workload: Workload, machine: Machine, rounds: int, scratch: Path, say: Any = print) -> dict[str, Any]:
    """Run all sides, and compare the weights that ours ended at.

    Raises:
        SideError: one of ours failed.
        ValueError: two sides did not do the same work.
    """
    contest = Contest(
        "ranks",
        f"update, {workload.model}, {workload.prompts} x {workload.samples}, one mini-batch",
        "tokens",
        sides(),
        lambda directory: settings_of(workload, directory),
        rounds,
    )
    result = run_contest(contest, machine, scratch, say=say)
    ours = [side for name, side in result["sides"].items() if name.startswith("sapo")]
    weights = [load_file(Path(side["facts"][-1]["model"]) / "model.safetensors") for side in ours]
    for side, found in zip(ours, weights, strict=True):
        side["weights"] = max((found[name] - w).abs().max().item() for name, w in weights[0].items())
        side["loss_gap"] = _largest_gap(side, ours[0], "losses")
        side["norm_gap"] = _largest_gap(side, ours[0], "norms")
    return result


def _largest_gap(side: dict[str, Any], first: dict[str, Any], fact: str) -> float:
    pairs = [(a[fact][0], b[fact][0]) for a, b in zip(side["facts"], first["facts"], strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)


def table(result: dict[str, Any]) -> str:
    """Write the figures as a table in Markdown: medians over rounds with their range, ratios round by round."""
    rows = [
        "| side | tokens/s | time beside one rank | sync, s | checkpoint, s | start-up, s | equality with one rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in result["sides"].items():
        if "error" in side:
            rows.append(f"| {name} | {side['error']} | | | | | |")
            continue
        base = result["sides"][f"{name.split(',')[0]}, ranks 1"]
        ratios = [a / b for a, b in zip(side["seconds"], base.get("seconds", ()), strict=False)]
        speed = [side["work"] / seconds for seconds in side["seconds"]]
        cells = [
            name,
            _spread(speed),
            _spread(ratios) if ratios else "-",
            *(_spread([facts[key] for facts in side["facts"] if key in facts]) for key in ("sync", "checkpoint")),
            f"{side['startup']:.1f}",
            _equality(side),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _equality(side: dict[str, Any]) -> str:
    if "weights" not in side:
        return "loss within 0.5%; " + ("sharded (FSDP2)" if side["sharded"] else "all weights on each rank")
    return f"loss {side['loss_gap']:.1e}, norm {side['norm_gap']:.1e} (relative), weights {side['weights']:.1e}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the figures with machine and load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it works, not how fast")
    parser.add_argument("--results", type=Path, help=f"where figures go (default {RESULTS}; elsewhere when quick)")
    options = parser.parse_args(arguments)
    machine, before = Machine(options.threads, "cpu"), os.getloadavg()
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        result = measure(TINY if options.quick else WORK, machine, rounds, Path(scratch))
    result["about"] = describe_machine(machine) | {
        "quick": options.quick,
        "load_before": before[0],
        "load_after": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }
    results = options.results or quick_or(RESULTS, quick=options.quick)
    results.mkdir(parents=True, exist_ok=True)
    (results / "ranks.json").write_text(json.dumps(result, indent=1) + "\n")
    Console(width=200).print(table(result), markup=False, highlight=False)
    print(f"load of the machine {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
