"""Refit which early warnings count as an alarm, on half of the recorded runs, and judge it on the other half.

The recorded results hold the warnings of every run (step and cause) and its pass@1, not the figures of its steps. So
the thresholds of the rules cannot be fitted again from them; which causes count, and how many warnings it takes, can.

    python -m research.evidence.alarm_rules      # draws research/evidence/alarms.png
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

MOST_WARNINGS = 4
"""Largest number of warnings that a rule may wait for."""

LIMITS = (0.05, 0.10, 0.20, 0.30)
"""Shares of false alarms among healthy runs that a rule may have on the half it is fitted on."""


@dataclass(frozen=True)
class RecordedRun:
    """A run of a recorded comparison with the warnings that it was given.

    >>> RecordedRun(seed=0, visible=25, warnings=((14, "reward_collapse"),)).collapsed
    True
    """

    seed: int
    visible: int | None
    """Steps after which its collapse showed in an evaluation; None for a healthy run."""
    warnings: tuple[tuple[int, str], ...]
    """Step and cause of each, those about the set-up left out."""

    @property
    def collapsed(self) -> bool:
        """Return whether it collapsed."""
        return self.visible is not None


@dataclass(frozen=True)
class AlarmRule:
    """An alarm is raised at the `count`-th warning of one of these causes.

    >>> AlarmRule(("ratio_tail",), 2).step(RecordedRun(0, None, ((3, "ratio_tail"), (9, "ratio_tail"))))
    9
    """

    causes: tuple[str, ...]
    count: int = 1

    def step(self, run: RecordedRun) -> int | None:
        """Return the step of the alarm; None where there is none."""
        steps = sorted(step for step, cause in run.warnings if cause in self.causes)
        return steps[self.count - 1] if len(steps) >= self.count else None

    def __str__(self) -> str:
        """Return the rule in words."""
        words = " or ".join(self.causes)
        return words if self.count == 1 else f"{self.count} warnings of {words}"


@dataclass(frozen=True)
class Judged:
    """What a rule comes to on some runs."""

    collapsed: int
    healthy: int
    leads: tuple[int, ...]
    """Steps from alarm to visible collapse, of each collapsed run with an alarm; below 0 when the alarm came after."""
    false_alarms: int

    @property
    def detection(self) -> float:
        """Return the share of collapsed runs with an alarm, late ones included."""
        return len(self.leads) / self.collapsed

    @property
    def false_share(self) -> float:
        """Return the share of healthy runs with an alarm."""
        return self.false_alarms / self.healthy

    @property
    def in_time(self) -> float:
        """Return the share of collapsed runs whose alarm came no later than the collapse showed."""
        return sum(lead >= 0 for lead in self.leads) / self.collapsed


def recorded_runs(studies: dict[str, Any]) -> list[RecordedRun]:
    """Return the runs of recorded comparisons, each task of a run as one."""
    found = []
    for study in studies.values():
        results = study["results"]
        for task, alarms in results["warnings"].items():
            visible = {c["run"]: c["visible"] for c in alarms["collapses"]}
            for run in results["runs"]:
                if task in run["tasks"]:
                    warnings = tuple((w["step"], w["cause"]) for w in run["warnings"])
                    found.append(RecordedRun(run["seed"], visible.get(run["name"]), warnings))
    return found


def judge(rule: AlarmRule, runs: Sequence[RecordedRun]) -> Judged:
    """Count what a rule detects and where it speaks for nothing."""
    collapsed = [run for run in runs if run.visible is not None]
    healthy = [run for run in runs if run.visible is None]
    leads = [
        run.visible - step for run in collapsed if (step := rule.step(run)) is not None and run.visible is not None
    ]
    return Judged(len(collapsed), len(healthy), tuple(leads), sum(rule.step(run) is not None for run in healthy))


def rules(runs: Sequence[RecordedRun]) -> Iterator[AlarmRule]:
    """Yield every rule over the causes that some run has, the simplest first."""
    causes = sorted({cause for run in runs for _, cause in run.warnings})
    for count in range(1, MOST_WARNINGS + 1):
        for size in range(1, len(causes) + 1):
            for chosen in combinations(causes, size):
                yield AlarmRule(chosen, count)


def fit(runs: Sequence[RecordedRun], limit: float) -> AlarmRule:
    """Return the rule that detects most collapses with no more than `limit` false alarms; of equals the one with fewer
    false alarms, then the simpler one."""
    judged = [(rule, judge(rule, runs)) for rule in rules(runs)]
    allowed = [(rule, found) for rule, found in judged if found.false_share <= limit]
    return max(allowed, key=lambda pair: (len(pair[1].leads), -pair[1].false_alarms))[0]


def halves(runs: Sequence[RecordedRun]) -> tuple[list[RecordedRun], list[RecordedRun]]:
    """Split runs by their seeds, even and odd: both halves have every study and arm."""
    return [run for run in runs if run.seed % 2 == 0], [run for run in runs if run.seed % 2]


def table(studies: dict[str, Any]) -> str:
    """Write the rules that were fitted on runs of even seeds and what they come to on those of odd seeds."""
    runs = recorded_runs(studies)
    fitted_on, judged_on = halves(runs)
    every = AlarmRule(tuple(sorted({cause for run in runs for _, cause in run.warnings})))
    heads = (
        *("false alarms allowed", "rule fitted on even seeds", "detected, odd seeds", "no later than it showed"),
        *("lead in steps, median", "false alarms, odd seeds"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    chosen: list[tuple[str, AlarmRule]] = [(f"{limit:.0%}", fit(fitted_on, limit)) for limit in LIMITS]
    for name, rule in [*chosen, ("as it is: any", every)]:
        found = judge(rule, judged_on)
        cells = (
            *(name, str(rule), f"{len(found.leads)} of {found.collapsed} ({found.detection:.0%})"),
            *(f"{found.in_time:.0%}", f"{statistics.median(found.leads):g}"),
            f"{found.false_alarms} of {found.healthy} ({found.false_share:.0%})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(studies: dict[str, Any]) -> Any:
    """Draw detection against false alarms on odd seeds: every rule, and those that were fitted on even seeds."""
    import matplotlib.pyplot as plt

    fitted_on, judged_on = halves(recorded_runs(studies))
    drawn, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained", sharey=True)
    every = [judge(rule, judged_on) for rule in rules(fitted_on)]
    curve = [fit(fitted_on, limit / 100) for limit in range(0, 41, 1)]
    kept = [judge(rule, judged_on) for rule in dict.fromkeys(curve)]
    for place, (title, read) in zip(
        axes,
        (("any alarm", lambda j: j.detection), ("alarm no later than the collapse showed", lambda j: j.in_time)),
        strict=True,
    ):
        place.plot([j.false_share for j in every], [read(j) for j in every], ".", color="0.75", label="every rule")
        place.plot(
            [j.false_share for j in kept], [read(j) for j in kept], "o-", color="#0b62b0", label="fitted on even seeds"
        )
        place.plot([0.05], [0.95], "x", color="#c9550a", label="aim")
        place.set_title(title, loc="left", fontsize=10)
        place.set_xlabel("healthy runs with an alarm")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("collapsed runs with an alarm")
    axes[0].legend(loc="lower right", fontsize=8)
    return drawn


def main() -> None:
    """Draw research/evidence/alarms.png."""
    import json
    import re

    import matplotlib

    from research.evidence.document import DOCUMENT, RESULTS

    matplotlib.use("Agg")
    found = re.search(r"<!-- table alarm_rules ([\w ]+) -->", DOCUMENT.read_text())
    assert found is not None, "evidence.md names the studies"
    studies = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in found[1].split()}
    draw(studies).savefig(RESULTS.parent / "alarms.png", dpi=120)


if __name__ == "__main__":
    main()
