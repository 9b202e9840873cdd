"""Make a report from run directories: read runs, group them, draw figures, write the headlines. The page and the images
show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapo.report.arms import Arm, arm_in_comparison, group_runs
from sapo.report.compared import ReportedComparison, find_comparisons
from sapo.report.compared_figures import comparison_figures
from sapo.report.costs import timing_figure
from sapo.report.curves import learning_figures
from sapo.report.figure import Figure, mark_repeats
from sapo.report.paper import paper_figures
from sapo.report.runs import ReportedRun, find_runs, read_runs, to_come
from sapo.report.spread import spread_figures, spread_of
from sapo.report.staleness import staleness_figures
from sapo.report.story import RunLine, headline, run_line, warnings_of
from sapo.report.tokens import DEFAULT_TOKENS, TokenView, token_view
from sapo.report.weights import gate_figures


@dataclass(frozen=True)
class RunReport:
    """Everything that a page and images show. Made by `make_report`.

    >>> RunReport("q", (), (), (), (), (), TokenView((), 0, ()), True).to_json()["title"]
    'q'
    """

    title: str
    headlines: tuple[str, ...]
    """A sentence for each arm."""
    story: tuple[Figure, ...]
    paper: tuple[Figure, ...]
    lines: tuple[RunLine, ...]
    warnings: tuple[dict[str, Any], ...]
    tokens: TokenView
    finished: bool
    """True when every run has ended and no run of a comparison is still to begin."""
    compared: tuple[tuple[ReportedComparison, tuple[Figure, ...]], ...] = ()
    """Comparisons among the paths, with their figures."""
    compared_colors: tuple[dict[str, int], ...] = ()
    """For each comparison, the colour of each of its arms that has begun."""
    problems: tuple[str, ...] = ()
    """Sentences on what could not be shown."""
    colors: tuple[int, ...] = ()
    """Colour of the arm of each headline, as an index into the palette."""

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Return all figures, in the order of the page."""
        return (*(f for _, own in self.compared for f in own), *self.story, *self.paper)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value. Of the token view it has the list of chunks, without their data."""
        return {
            "title": self.title,
            "headlines": list(self.headlines),
            "colors": list(self.colors),
            "problems": list(self.problems),
            "compared": [
                {**made.to_json(), "colors": colors, "figures": [f.to_json() for f in own]}
                for (made, own), colors in zip(self.compared, self.compared_colors, strict=True)
            ],
            "story": [f.to_json() for f in self.story],
            "paper": [f.to_json() for f in self.paper],
            "runs": [line.to_json() for line in self.lines],
            "warnings": list(self.warnings),
            "tokens": self.tokens.to_json(),
            "finished": self.finished,
        }


def make_report(paths: Sequence[Path], *, tokens: int | None = DEFAULT_TOKENS) -> RunReport:
    """Read runs, comparisons and directories of runs, and make their report.

    Args:
        paths: of runs, of comparisons, or of directories with runs in them.
        tokens: those that the token view may hold, of responses and of what was said to the model between them; None
            for all that were logged.

    Raises:
        ConfigError: nothing is there, or it is not what a run writes.
    """
    runs = read_runs(find_runs(paths))
    arms = group_runs(runs)
    spreads = [spread_of(arm) for arm in arms]
    by_run = {run.name: run_line(run, arm) for arm in arms for run in arm.runs}
    comparisons, problems = find_comparisons(paths)
    compared = tuple(_compared(comparisons, arms))
    story = (
        *learning_figures(arms),
        *staleness_figures(arms),
        *gate_figures(arms),
        *spread_figures(arms, spreads),
        timing_figure(arms),
    )
    above = [*story, *(figure for _, own in compared for figure in own)]
    return RunReport(
        title=_title(arms, runs, comparisons),
        headlines=tuple(headline(arm, [by_run[run.name] for run in arm.runs]) for arm in arms),
        story=story,
        paper=tuple(mark_repeats(paper_figures(arms, spreads), above)),
        lines=tuple(by_run[run.name] for run in runs),
        warnings=tuple(warnings_of(runs)),
        tokens=token_view(runs, tokens),
        finished=all(run.ended for run in runs) and not to_come(paths),
        compared=compared,
        compared_colors=tuple(
            {arm_in_comparison(arm): arm.color for arm in _arms_of(made, arms)} for made in comparisons
        ),
        problems=tuple(problems),
        colors=tuple(arm.color for arm in arms),
    )


def _compared(
    comparisons: Sequence[ReportedComparison], arms: Sequence[Arm]
) -> Iterator[tuple[ReportedComparison, tuple[Figure, ...]]]:
    for place, made in enumerate(comparisons, 1):
        mine = _arms_of(made, arms)
        colors = {arm_in_comparison(arm): arm.color for arm in mine}  # as in all other figures
        own = [
            replace(arm, color=colors[arm_in_comparison(arm)])
            for arm in group_runs([run for arm in mine for run in arm.runs])
        ]
        prefix = "compared" if len(comparisons) == 1 else f"compared{place}"
        yield made, tuple(comparison_figures(made, own, prefix))


def _arms_of(comparison: ReportedComparison, arms: Sequence[Arm]) -> list[Arm]:
    directory = (comparison.path / "runs").resolve()
    return [arm for arm in arms if arm.runs[0].path.resolve().parent == directory]


def _title(arms: Sequence[Arm], runs: Sequence[ReportedRun], comparisons: Sequence[ReportedComparison]) -> str:
    if len(runs) == 1:
        return runs[0].name
    named = f"{', '.join(made.name for made in comparisons)}: " if comparisons else ""
    names = {arm.name for arm in arms}
    return f"{named}{len(runs)} runs, {len(names)} {'arm' if len(names) == 1 else 'arms'}"
