"""Run the studies and write their figures and tables: `python -m research.evidence [NAME ...]`.

A study that was run before is taken up where it was, so a second call only reads. Figures go to
research/evidence/results/NAME.json, tables into research/evidence.md between their marks; what is written by hand
around them stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from research.evidence.document import DOCUMENT, RESULTS, write_tables
from research.evidence.measures import theory_of_comparison
from research.evidence.studies import DRAWS, MISMATCHES, STUDIES, Mismatch, Study

BIAS = "bias_force"
"""Name of the measurements before any update, beside the names of the studies."""


def main(arguments: list[str] | None = None) -> None:
    """Run what is named, or all; then write."""
    names = [*(study.name for study in STUDIES), BIAS]
    parser = argparse.ArgumentParser(
        prog="python -m research.evidence", description="The runs behind research/evidence.md."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all when none is named: {', '.join(names)}")
    parser.add_argument("--runs", type=Path, default=Path("comparisons"), help="where runs go (default comparisons/)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: as many as the cores bear)")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables of what was run")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"no study is called {unknown[0]!r}; known: {', '.join(names)}")
    for study in () if options.tables else STUDIES:
        if study.name in (options.names or names):
            _keep(study.name, _run_study(study, options.runs / study.name, options.jobs))
    if not options.tables and BIAS in (options.names or names):
        _keep(BIAS, {"measurements": [_measure_mismatch(m) for m in MISMATCHES]})
    write_tables(RESULTS, DOCUMENT)
    print(f"wrote {RESULTS}/ and the tables of {DOCUMENT}")


def _run_study(study: Study, directory: Path, jobs: int | None) -> dict[str, Any]:
    at_a_time = [] if jobs is None else ["--jobs", str(jobs)]
    _sapo([*study.command(), "--out", str(directory), *at_a_time])
    results = json.loads((directory / "results.json").read_text())
    return {
        "command": " ".join(["sapo", *study.command()]),
        "provenance": _provenance(directory, results["runs"]),
        "results": results,
        "theory": theory_of_comparison(directory, results["runs"]),
    }


def _measure_mismatch(mismatch: Mismatch) -> dict[str, Any]:
    import torch

    from sapo.config.recipes import load_recipe
    from sapo.workflows.coldstart import ensure_coldstart

    torch.set_num_threads(1)  # as the runs have it: another count is another rounding, and another model in the cache
    model, _ = ensure_coldstart(load_recipe(mismatch.recipe, list(mismatch.settings)))
    draws = [json.loads(_sapo(mismatch.command(str(model), seed), quiet=True)) for seed in DRAWS]
    return {
        "name": mismatch.name,
        "command": "sapo " + " ".join(mismatch.command("COLDSTART", 0)),
        "coldstart": " ".join([mismatch.recipe, *mismatch.settings]),
        "draws": [{k: v for k, v in draw.items() if k != "model"} for draw in draws],
    }


def _sapo(arguments: list[str], *, quiet: bool = False) -> str:
    """The command line, in a process of its own, as anyone would give it; what it printed when `quiet`."""
    done = subprocess.run(
        [sys.executable, "-m", "sapo.cli", *arguments], stdout=subprocess.PIPE if quiet else None, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def _provenance(directory: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Versions, commit and machine, as the first run wrote them."""
    config = yaml.safe_load((directory / "runs" / runs[0]["name"] / "config.yaml").read_text())
    return {k: v for k, v in config["provenance"].items() if k not in ("platform", "mkl_cbwr")}


def _keep(name: str, figures: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
