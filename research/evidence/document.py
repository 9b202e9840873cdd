"""From research/evidence/results/*.json to the tables of research/evidence.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from research.evidence import alarm_rules
from sapo.workflows.comparing.plan import format_rate

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "evidence.md"

MARKS = re.compile(r"(<!-- table (?P<kind>\w+) (?P<names>[\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
"""`<!-- table KIND NAME ... -->`, what was written last, `<!-- end -->`."""

THEORY = {
    "theory/near_one_share": "A1, every token",
    "theory/mostly_near_one_share": "A1, 95% of tokens",
    "theory/low_variance_share": "A2",
    "theory/variance_mean": "mean Var",
    "theory/discrepancy_mean": "mean D",
    "theory/gate_error_mean": "mean gate error",
    "theory/slope_error": "slope error",
}
SPREAD = {
    "ratio/abs_dev": "mean \\|r - 1\\|",
    "ratio/p001": "r, .1%",
    "ratio/p999": "r, 99.9%",
    "gate/eur_pos": "EUR, A > 0",
    "gate/eur_neg": "EUR, A <= 0",
    "entropy": "entropy",
    "routing/changed_share": "experts changed",
}
"""Figures of metrics.jsonl and how the tables head them."""


def write_tables(results: Path, document: Path) -> None:
    """Write the document's tables anew; one without any figures keeps what stands there.

    Raises:
        KeyError: a mark of a kind that is none of TABLES.
    """

    def rewritten(mark: re.Match[str]) -> str:
        files = {name: results / f"{name}.json" for name in mark["names"].split()}
        found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        table = TABLES[mark["kind"]]
        return f"{mark[1]}\n{table(found)}\n\n{mark[5]}" if found else mark[0]

    document.write_text(MARKS.sub(rewritten, document.read_text()))


def outcomes(studies: dict[str, Any]) -> str:
    """Each arm of each study: final pass@1 with its interval, difference, collapses, every seed's final."""
    parts = []
    for study in studies.values():
        baseline, budget = study["results"]["baseline"], study["results"]["budget"]
        cells = study["results"]["cells"]
        tasks = list(dict.fromkeys(cell["task"] for cell in cells))
        several = len(tasks) > 1
        headings = ("arm", "lr", "final pass@1", "best", f"less {baseline}", "collapsed", "final of each seed")
        rows = [
            (
                *[cell["task"]] * several,
                cell["arm"],
                format_rate(cell["learning_rate"]),
                _interval(cell["final"]),
                f"{cell['best']['value']:.3f}",
                _signed(cell["difference"]),
                f"{cell['collapsed']} of {len(cell['seeds'])}",
                " ".join(_finals(study["results"], cell)),
            )
            for cell in sorted(cells, key=lambda cell: tasks.index(cell["task"]))
        ]
        starts = {cell["task"]: cell["start"]["value"] for cell in reversed(cells)}
        shown = [f"{starts[task]:.3f}{f' ({task})' * several}" for task in tasks]
        said = f"`{study['command']}`: {budget['steps']} steps; pass@1 {', '.join(shown)} at the start."
        parts.append(f"{said}\n\n{_table([*['task'] * several, *headings], rows)}")
    return "\n\n".join(parts)


def theory(studies: dict[str, Any]) -> str:
    """What the assumptions and the bound come to, off policy."""
    return _of_updates(studies, THEORY, violations=True)


def spread(studies: dict[str, Any]) -> str:
    """How far ratios are spread and what the gates make of them, off policy."""
    return _of_updates(studies, SPREAD)


def bias(measured: dict[str, Any]) -> str:
    """Dose and bias force of every sampler measured: the median of the draws and their range."""
    rows = []
    for of in (m for study in measured.values() for m in study["measurements"]):
        doses = [draw["dose"] for draw in of["draws"]]
        rows.append(
            (of["name"], _range(doses, ".4f"), *(_force(of["draws"], name) for name in ("sapo", "grpo", "gspo")))
        )
    return _table(("sampler", "mean \\|r - 1\\|", "SAPO", "GRPO", "GSPO"), rows)


def alarms(studies: dict[str, Any]) -> str:
    """How early warnings agreed with collapses, study by study and in all."""
    counts = [(name, of) for name, study in studies.items() for of in study["results"]["warnings"].values()]
    rows = [(name, *_agreement([of])) for name, of in counts]
    headings = (
        "study",
        "collapsed runs warned of",
        "of them no later than it showed",
        "steps ahead, median",
        "healthy runs warned of",
    )
    return _table(headings, [*rows, ("in all", *_agreement([of for _, of in counts]))])


def causes(studies: dict[str, Any]) -> str:
    """Which rule spoke in how many collapsed and healthy runs, over all studies."""
    found: dict[str, dict[str, int]] = {}
    for of in (of for study in studies.values() for of in study["results"]["warnings"].values()):
        for cause, counts in of["causes"].items():
            total = found.setdefault(cause, {"collapsed": 0, "healthy": 0, "first": 0})
            total["collapsed"] += counts["collapsed"]
            total["healthy"] += counts["healthy"]
            total["first"] += sum(collapse.get("cause") == cause for collapse in of["collapses"])
    rows = [
        (cause, *(str(of[key]) for key in ("collapsed", "first", "healthy"))) for cause, of in sorted(found.items())
    ]
    return _table(("cause", "collapsed runs", "of them the first to speak", "healthy runs"), rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "outcomes": outcomes,
    "theory": theory,
    "spread": spread,
    "bias": bias,
    "alarms": alarms,
    "causes": causes,
    "alarm_rules": alarm_rules.table,
}


def _of_updates(studies: dict[str, Any], figures: dict[str, str], *, violations: bool = False) -> str:
    rows, shown = [], [f for f in figures if any(f in of for s in studies.values() for of in s["theory"].values())]
    for study in studies.values():
        for cell, of in study["theory"].items():
            arm, rate = cell.rsplit(" ", 1)
            row = [
                arm,
                format_rate(float(rate)),
                *(_over_runs(of.get(name), ".4g" if "eur" in name else ".3g") for name in shown),
            ]
            if violations:
                row.append(f"{of['theory/bound_violations']['mean']:.0f}")
            rows.append(tuple(row))
    headings = ("arm", "lr", *(figures[name] for name in shown), *(["bound broken"] if violations else []))
    return _table(headings, rows)


def _over_runs(figure: dict[str, float] | None, how: str) -> str:
    if figure is None:
        return "not measured"
    return f"{figure['mean']:{how}} ({figure['low']:{how}} .. {figure['high']:{how}})"


def _force(draws: Sequence[dict[str, Any]], objective: str) -> str:
    forces = [force for draw in draws for force in draw["forces"] if force["objective"] == objective]
    found = [force["force"] for force in forces if "force" in force]
    return _range(found, ".2g") if found else "not resolved"


def _range(values: Sequence[float], how: str) -> str:
    return f"{statistics.median(values):{how}} ({min(values):{how}} .. {max(values):{how}})"


def _agreement(counts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    total = {
        key: sum(of[key] for of in counts) for key in ("collapsed", "detected", "in_time", "healthy", "false_alarms")
    }
    leads = [c["lead"] for of in counts for c in of["collapses"] if c.get("lead", -1) >= 0]
    return (
        f"{total['detected']} of {total['collapsed']}",
        str(total["in_time"]),
        f"{statistics.median(leads):g}" if leads else "",
        f"{total['false_alarms']} of {total['healthy']}",
    )


def _finals(results: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    runs = [r for r in results["runs"] if (r["arm"], r["learning_rate"]) == (cell["arm"], cell["learning_rate"])]
    finals = [r["tasks"][cell["task"]]["final"] for r in runs]
    return ["failed" if final is None else f"{final:.3f}".removeprefix("0") for final in finals]


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _signed(estimate: dict[str, float] | None) -> str:
    return "" if estimate is None else f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
