"""Comparisons as a report shows them: the figures of results.json, as they stand there, and sentences on them.

While runs are under way there is no results.json yet, or one of an earlier stop. Then `sapo.workflows.comparing`, which
writes that file at the end, computes the figures of the runs that have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.errors import ConfigError
from sapo.report.runs import is_run
from sapo.utils.reading import interpreting, read_json
from sapo.utils.text import visible
from sapo.workflows.comparing.plan import format_rate

FEW_SEEDS = 5
"""With fewer seeds than this, intervals over seeds are too narrow to conclude from."""


@dataclass(frozen=True)
class ReportedComparison:
    """One comparison. Made by `find_comparisons`.

    >>> made = ReportedComparison("fig4", Path("comparisons/fig4"), {"runs": [], "cells": []}, "results.json", ())
    >>> made.tasks, made.state({"name": "sapo-lr1e-4-seed0", "state": "unfinished"})
    ([], 'to come')
    """

    name: str
    path: Path
    results: Mapping[str, Any]
    """Content of results.json."""
    source: str
    """Where the figures come from: results.json, or the runs that have ended so far."""
    begun: tuple[str, ...]
    """Names of the runs that have directories."""

    @property
    def tasks(self) -> list[str]:
        """Return the tasks that some run that has ended was evaluated on."""
        return list(dict.fromkeys(cell["task"] for cell in self.results["cells"]))

    def figure_of(self, task: str) -> str:
        """Return the name of a task's figure: pass@1, or mean reward where rewards are graded."""
        named: Mapping[str, str] = self.results.get("figures", {})  # not in files of earlier versions
        return named.get(task, "pass@1")

    def cells(self, task: str) -> list[Mapping[str, Any]]:
        """Return the cells of a task, an arm at a learning rate each, in the order of the plan."""
        return [cell for cell in self.results["cells"] if cell["task"] == task]

    def state(self, run: Mapping[str, Any]) -> str:
        """Return finished, failed, unfinished, or to come."""
        return "to come" if run["state"] == "unfinished" and run["name"] not in self.begun else str(run["state"])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value: results.json with the states that `state` gives and each run's warnings by cause."""
        runs = [
            {**run, "state": self.state(run), "warnings": _by_cause(run), "reason": visible(run.get("reason") or "")}
            for run in self.results["runs"]
        ]
        return {
            "name": self.name,
            "source": self.source,
            "words": words_of(self),
            "results": {**self.results, "runs": runs},
            "alarms": {task: alarms_by_cause(self, task) for task in self.tasks},
            "few_seeds": len(self.results["seeds"]) < FEW_SEEDS,
        }


def find_comparisons(paths: Sequence[Path]) -> tuple[list[ReportedComparison], list[str]]:
    """Read the comparisons among these paths; return them with a sentence for each that cannot be evaluated.

    Raises:
        ConfigError: results.json of one is not what `sapo compare` writes.
    """
    found, problems = [], []
    for path in paths:
        if (path / "comparison.yaml").is_file():
            try:
                found.append(read_comparison(path))
            except UncountableError as error:
                problems.append(str(error))
    return found, problems


class UncountableError(ValueError):
    """A comparison that has not ended and whose plan this version cannot read."""


def read_comparison(path: Path) -> ReportedComparison:
    """Read one comparison.

    Raises:
        ConfigError: its results.json is not what `sapo compare` writes.
        UncountableError: its plan is of another version and it has no results.json.
    """
    name = visible(path.resolve().name)
    begun = tuple(p.name for p in sorted((path / "runs").glob("*")) if is_run(p))
    written = _written(path / "results.json")
    if written is not None and all(run["state"] != "unfinished" for run in written["runs"]):
        return ReportedComparison(name, path, written, "results.json", begun)
    try:
        return ReportedComparison(name, path, count(path), "the runs that have ended so far", begun)
    except ConfigError as error:
        if written is not None:
            return ReportedComparison(name, path, written, "results.json, of an earlier stop", begun)
        raise UncountableError(
            f"The figures of the comparison {name} cannot be computed, so its runs are shown without a table: "
            f"{visible(str(error).splitlines()[0])}"
        ) from error


def count(path: Path) -> dict[str, Any]:
    """Compute what `sapo compare` would write of the runs that have ended.

    Raises:
        ConfigError: the plan or a run is of another version.
    """
    from sapo.workflows.comparing.config import load_comparison
    from sapo.workflows.comparing.outcomes import RunOutcome
    from sapo.workflows.comparing.results import ComparisonResults

    plan = load_comparison(path)
    return ComparisonResults.of(plan, [RunOutcome.of(run) for run in plan.runs(path)]).to_json()


def _written(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    what, way_out = (
        "what `sapo compare` writes",
        f"move it away, and `sapo compare {file.parent}` writes it anew",
    )
    results = read_json(file, what, way_out=way_out)
    kinds = {"cells": list, "runs": list, "seeds": list, "learning_rates": list, "arms": dict, "budget": dict}
    with interpreting(file, what, way_out=way_out):
        for part in (*kinds, "baseline", "tuned"):
            if not isinstance(results[part], kinds.get(part, object)):
                raise TypeError(f"{part}={results[part]!r:.60}")
        for run in results["runs"]:
            run["state"], dict(run["tasks"])
    return results


def _by_cause(run: Mapping[str, Any]) -> dict[str, int] | None:
    """Count the early warnings of a run by cause; None where results.json does not have them."""
    if run.get("warnings") is None:
        return None
    causes = [str(warning["cause"]) for warning in run["warnings"]]
    return {cause: causes.count(cause) for cause in dict.fromkeys(causes)}


def alarms_by_cause(comparison: ReportedComparison, task: str) -> list[dict[str, Any]]:
    """Count, for each cause of early warnings, the collapsed and the healthy runs that had one.

    The counts of all causes together are `results["warnings"][task]`.
    """
    ended = [
        run for run in comparison.results["runs"] if run["state"] != "unfinished" and run.get("warnings") is not None
    ]
    judged = [(run["tasks"][task]["collapsed"], set(_by_cause(run) or {})) for run in ended if task in run["tasks"]]
    causes = sorted({cause for _, own in judged for cause in own})
    return [
        {
            "cause": cause,
            "detected": sum(collapsed and cause in own for collapsed, own in judged),
            "collapsed": sum(bool(collapsed) for collapsed, _ in judged),
            "false_alarms": sum(not collapsed and cause in own for collapsed, own in judged),
            "healthy": sum(not collapsed for collapsed, _ in judged),
        }
        for cause in causes
    ]


def words_of(comparison: ReportedComparison) -> list[str]:
    """Write the comparison in sentences: its arms, rates and seeds, then the result on each task."""
    results = comparison.results
    states = [comparison.state(run) for run in results["runs"]]
    parts = [
        _number(len(results["arms"]), "arm"),
        _number(len(results["learning_rates"]), "learning rate"),
        _number(len(results["seeds"]), "seed"),
    ]
    counts = {"have ended": states.count("finished") + states.count("failed"), "of them failed": states.count("failed")}
    counts |= {"under way": states.count("unfinished"), "to come": states.count("to come")}
    if counts["have ended"] == len(states) and not counts["of them failed"]:
        made = f"{len(states)} runs, all ended"
    else:
        made = f"{len(states)} runs: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    budget = results["budget"]
    first = (
        f"{' x '.join(parts)} = {made}. Every run: {budget['steps']} steps of {budget['prompts_per_step']} prompts x "
        f"{budget['samples_per_prompt']}, {budget['minibatches']} mini-batches."
    )
    return [first, *(sentence for task in comparison.tasks for sentence in _words_of_task(comparison, task))]


def _words_of_task(comparison: ReportedComparison, task: str) -> list[str]:
    results = comparison.results
    tuned = [t for t in results["tuned"] if t["task"] == task]
    ordered = sorted(tuned, key=lambda t: -t["final"]["value"])
    rates = len(results["learning_rates"]) > 1
    each = "; ".join(
        f"{t['arm']} {_estimate(t['final'])}" + (f" at {format_rate(t['learning_rate'])}" if rates else "")
        for t in ordered
    )
    at = ", each arm at the learning rate of its highest mean" if rates else ""
    cells = comparison.cells(task)
    paired = [
        (
            f"Against {results['baseline']}{' at its own best rate' if rates else ''}, paired by seed and problem",
            ordered,
            False,
        )
    ]
    if rates:  # the table of cells has these differences too
        paired.append((f"Against {results['baseline']} at the same learning rate", cells, True))
    collapsed = [
        f"{c['arm']}{' at ' + format_rate(c['learning_rate']) if rates else ''} {c['collapsed']} of {len(c['seeds'])}"
        for c in cells
        if c["collapsed"]
    ]
    return [
        f"Final {comparison.figure_of(task)} on {task}{at}, with 95% intervals: {each}.",
        *(
            f"{start}: {_differences(rows, at_rate)}."
            for start, rows, at_rate in paired
            if any(r["difference"] for r in rows)
        ),
        f"Collapsed: {'; '.join(collapsed)}." if collapsed else "No run collapsed.",
    ]


def _differences(rows: Sequence[Mapping[str, Any]], at_rate: bool) -> str:
    """Name the differences whose interval excludes 0, and say how many others there are."""
    measured = [row for row in rows if row["difference"]]
    clear = [row for row in measured if row["difference"]["low"] > 0 or row["difference"]["high"] < 0]
    if not clear:
        return "no interval of a difference from it excludes 0"
    words = [
        f"{row['arm']} {'above' if row['difference']['low'] > 0 else 'below'} it by "
        f"{abs(row['difference']['value']):.3f} [{_ends(row['difference'])}]"
        + (f" at {format_rate(row['learning_rate'])}" if at_rate else "")
        for row in clear
    ]
    others = len(measured) - len(clear)
    if others:
        words.append(f"{_number(others, 'other interval')} include{'s' * (others == 1)} 0")
    return "; ".join(words)


def _ends(estimate: Mapping[str, float]) -> str:
    """Format the ends of an interval that excludes 0, by size."""
    low, high = sorted((abs(estimate["low"]), abs(estimate["high"])))
    return f"{low:.3f}, {high:.3f}"


def _estimate(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
