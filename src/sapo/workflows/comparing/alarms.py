"""How early warnings agree with collapses: runs that were warned, how long before, and false alarms.

An alarm is an early warning of a cause that predicts a collapse. Other causes describe how a run was set up
(`OF_THE_SET_UP`): a sampler of rounded weights makes log pi_old unfaithful in every run, healthy or not. They are
counted apart.

A collapse is seen in an evaluation, so its step is known up to the steps between two of them: a lead of 12 steps with
an evaluation every 10 means that the alarm came 3 to 12 steps before the collapse.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapo.workflows.comparing.outcomes import RunOutcome


@dataclass(frozen=True)
class Collapse:
    """A run that collapsed, with its first alarm.

    >>> Collapse("grpo-lr4e-4-seed0", visible=30, cause="ratio_tail", step=18).lead
    12
    """

    run: str
    visible: int
    """Whole steps after which the collapse showed: in an evaluation, or in the failure of the run."""
    cause: str | None
    """Cause of the first alarm; None when there was none."""
    step: int | None
    """Step of the first alarm; None when there was none."""

    @property
    def lead(self) -> int | None:
        """Return the steps from the first alarm until the collapse showed; below 0 when the alarm came after."""
        return None if self.step is None else self.visible - self.step

    def to_json(self) -> dict[str, Any]:
        """Return the value in results.json; without the alarm where there was none."""
        alarm = {} if self.step is None else {"cause": self.cause, "step": self.step, "lead": self.lead}
        return {"run": self.run, "visible": self.visible, **alarm}


@dataclass(frozen=True)
class Alarms:
    """Early warnings against collapses on one task, over the runs that have ended.

    >>> runs = (Collapse("a", 30, "ratio_tail", 18), Collapse("b", 20, None, None))
    >>> alarms = Alarms(runs, healthy=2, false_alarms=1, causes={"ratio_tail": (1, 1)}, set_up={}, runs=4)
    >>> alarms.detected, alarms.in_time
    (1, 1)
    """

    collapses: tuple[Collapse, ...]
    """Every collapsed run, in the order of the runs."""
    healthy: int
    """Runs that did not collapse."""
    false_alarms: int
    """Healthy runs with an alarm."""
    causes: dict[str, tuple[int, int]]
    """Cause of an alarm -> collapsed runs and healthy runs that had it."""
    set_up: dict[str, int]
    """Cause that describes the set-up -> runs that had it."""
    runs: int
    """Number of runs that have ended."""

    @classmethod
    def of(cls, outcomes: Sequence[RunOutcome], task: str) -> Alarms:
        """Count the runs that have ended and were evaluated on a task."""
        ended = [o for o in outcomes if o.ended and task in o.curves]
        collapsed = [o for o in ended if o.collapsed(task)]
        healthy = [o for o in ended if not o.collapsed(task)]
        names = sorted({w["cause"] for o in ended for w in o.warnings})
        return cls(
            collapses=tuple(_collapse(o, task) for o in collapsed),
            healthy=len(healthy),
            false_alarms=sum(bool(o.warnings) for o in healthy),
            causes={name: (_with(collapsed, name), _with(healthy, name)) for name in names},
            set_up={
                name: sum(name in o.set_up for o in ended) for name in sorted({n for o in ended for n in o.set_up})
            },
            runs=len(ended),
        )

    @property
    def leads(self) -> list[int]:
        """Return the leads of the collapsed runs that had an alarm."""
        return [c.lead for c in self.collapses if c.lead is not None]

    @property
    def detected(self) -> int:
        """Count the collapsed runs that had an alarm, late ones included."""
        return len(self.leads)

    @property
    def in_time(self) -> int:
        """Count the collapsed runs whose first alarm came no later than the collapse showed."""
        return sum(lead >= 0 for lead in self.leads)

    @property
    def sentence(self) -> str:
        """Write the counts in a sentence."""
        leads = [lead for lead in self.leads if lead >= 0]
        ahead = f", {statistics.median(leads):g} steps before in the median" if leads else ""
        before = f" ({self.in_time} no later than it showed{ahead})" if self.detected else ""
        return (
            f"Early warnings: {self.detected} of {len(self.collapses)} collapsed runs were warned{before}, and "
            f"{self.false_alarms} of {self.healthy} healthy ones."
        )

    @property
    def set_up_sentence(self) -> str | None:
        """Write a sentence on the warnings about the set-up, which predict no collapse; None where there were none."""
        if not self.set_up:
            return None
        return "Warnings about the set-up, which predict no collapse: " + ", ".join(
            f"{cause} in {count} of {self.runs} runs" for cause, count in self.set_up.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the value in results.json."""
        return {
            "collapsed": len(self.collapses),
            "detected": self.detected,
            "in_time": self.in_time,
            "healthy": self.healthy,
            "false_alarms": self.false_alarms,
            "causes": {name: {"collapsed": bad, "healthy": well} for name, (bad, well) in self.causes.items()},
            "collapses": [c.to_json() for c in self.collapses],
            "set_up": self.set_up,
        }


def _collapse(outcome: RunOutcome, task: str) -> Collapse:
    first = min(outcome.warnings, key=lambda w: w["step"], default=None)  # the first of equals
    seen = outcome.collapse_visible(task)
    return Collapse(outcome.name, seen, *((None, None) if first is None else (first["cause"], first["step"])))


def _with(outcomes: Sequence[RunOutcome], cause: str) -> int:
    return sum(any(w["cause"] == cause for w in o.warnings) for o in outcomes)
