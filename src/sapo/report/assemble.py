"""A report from run directories: read, group, draw, tell. What the page and the images show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.report.arms import Arm, group_runs
from sapo.report.costs import timing_figure
from sapo.report.curves import gate_figures, learning_figures
from sapo.report.figure import Figure
from sapo.report.paper import paper_figures
from sapo.report.runs import Run, find_runs, read_runs, to_come
from sapo.report.spread import spread_figures, spread_of
from sapo.report.story import RunLine, headline, run_line, warnings_of
from sapo.report.tokens import DEFAULT_TOKENS, TokenView, token_view


@dataclass(frozen=True)
class Report:
    """Everything that is shown. Made by `make_report`.

    >>> Report("q", (), (), (), (), (), TokenView((), 0, ()), True).to_json()["title"]
    'q'
    """

    title: str
    headlines: tuple[str, ...]
    story: tuple[Figure, ...]
    paper: tuple[Figure, ...]
    lines: tuple[RunLine, ...]
    warnings: tuple[dict[str, Any], ...]
    tokens: TokenView
    finished: bool
    """Whether nothing more is to come: every run has ended, and no run of a comparison is still to begin."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON value; the token view's chunks are not in it, only what they are."""
        return {
            "title": self.title,
            "headlines": list(self.headlines),
            "story": [f.to_json() for f in self.story],
            "paper": [f.to_json() for f in self.paper],
            "runs": [line.to_json() for line in self.lines],
            "warnings": list(self.warnings),
            "tokens": self.tokens.to_json(),
            "finished": self.finished,
        }


def make_report(paths: Sequence[Path], *, tokens: int | None = DEFAULT_TOKENS) -> Report:
    """Read runs, comparisons and directories of runs.

    Args:
        paths: of runs, of comparisons, or of directories with runs in them.
        tokens: response tokens that the token view may hold; None for all that were logged.

    Raises:
        ConfigError: nothing is there, or it is not what a run writes.
    """
    runs = read_runs(find_runs(paths))
    arms = group_runs(runs)
    spreads = [spread_of(arm) for arm in arms]
    by_run = {run.name: run_line(run, arm) for arm in arms for run in arm.runs}
    return Report(
        title=_title(arms, runs),
        headlines=tuple(headline(arm, [by_run[run.name] for run in arm.runs]) for arm in arms),
        story=(
            *learning_figures(arms),
            *gate_figures(arms),
            *spread_figures(arms, spreads),
            timing_figure(runs),
        ),
        paper=tuple(paper_figures(arms, spreads)),
        lines=tuple(by_run[run.name] for run in runs),
        warnings=tuple(warnings_of(runs)),
        tokens=token_view(runs, tokens),
        finished=all(run.ended for run in runs) and not to_come(paths),
    )


def _title(arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return f"{len(runs)} runs, {len(arms)} {'arm' if len(arms) == 1 else 'arms'}"
