"""What the lines of metrics.jsonl say of the theory, arm by arm: figures of updates off policy, over all runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MEANS = (
    "ratio/abs_dev",
    "ratio/p001",
    "ratio/p01",
    "ratio/p99",
    "ratio/p999",
    "gate/eur_pos",
    "gate/eur_neg",
    "gate/below_half",
    "theory/variance_mean",
    "theory/low_variance_share",
    "theory/near_one_share",
    "theory/mostly_near_one_share",
    "theory/discrepancy_mean",
    "theory/gate_error_mean",
    "theory/log_gate_error_mean",
    "theory/slope_error",
    "routing/changed_share",
    "entropy",
    "entropy_neg",
    "grad_norm",
)
"""Of which the mean over a run's updates is taken."""

LARGEST = ("theory/variance_max", "theory/discrepancy_max", "theory/gate_error_max")
"""Of which the largest of all updates is."""

SUMS = ("theory/bound_violations", "tokens/gradient")
"""Of which the sum is."""


def read_updates(run: Path) -> list[dict[str, Any]]:
    """A run's updates off policy that moved the weights, in order."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [u for u in lines if u["kind"] == "update" and not u["on_policy"] and not u["skipped"]]


def figures_of_run(updates: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means, maxima and sums of one run; a figure that no update has is left out.

    >>> figures_of_run([{"grad_norm": 1.0}, {"grad_norm": 2.0}])
    {'grad_norm': 1.5, 'updates': 2}
    """
    figures: dict[str, float] = {}
    for names, of in ((MEANS, statistics.fmean), (LARGEST, max), (SUMS, sum)):
        for name in names:
            if found := [u[name] for u in updates if name in u]:
                figures[name] = of(found)
    return figures | {"updates": len(updates)}


def over_runs(runs: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Each figure's mean over runs with the lowest and the highest run.

    >>> over_runs([{"a": 1.0}, {"a": 3.0}])
    {'a': {'mean': 2.0, 'low': 1.0, 'high': 3.0}}
    """
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run)
    found = {name: [run[name] for run in runs if name in run] for name in names}
    return {n: {"mean": statistics.fmean(v), "low": min(v), "high": max(v)} for n, v in found.items()}


def theory_of_comparison(directory: Path, runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By arm and learning rate.

    Args:
        directory: of the comparison.
        runs: as its results.json lists them.
    """
    cells: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        figures = figures_of_run(read_updates(directory / "runs" / run["name"]))
        cells.setdefault(f"{run['arm']} {run['learning_rate']:g}", []).append(figures)
    return {cell: over_runs(of_cell) for cell, of_cell in cells.items()}
