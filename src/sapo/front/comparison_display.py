"""The display of a comparison under way: one live table on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sapo.workflows.coldstart import ColdStartProgress
from sapo.workflows.comparing.outcomes import RunOutcome, figure_name
from sapo.workflows.comparing.plan import ComparisonPlan, format_rate
from sapo.workflows.comparing.processes import Event, RunSlots
from sapo.workflows.comparing.results import ComparisonResults
from sapo.workflows.comparing.table import (
    alarm_sentences,
    budget_sentence,
    cell_rows,
    headings,
    legend,
    notes,
    tuned_headings,
    tuned_rows,
)

STYLES = {"finished": "green", "failed": "bold red", "at work": "", "waiting": "dim", "saved": "yellow"}


@dataclass
class _Seen:
    """What the display knows of a run under way."""

    state: str
    step: int = 0
    figure: float | None = None
    start: float | None = None

    def text(self, steps: int) -> Text:
        """Return a cell of the live table."""
        figure = "" if self.figure is None else f"{self.figure:.3f}".removeprefix("0")
        if self.state == "at work":
            figure = f"{figure} {self.step}/{steps}".strip()
        elif self.state != "finished":
            figure = f"{figure} {self.state}".strip()
        return Text(figure, style=STYLES[self.state])


class ComparisonDisplay:
    """Listens to a comparison and shows it.

    Args:
        console: where to print; a live table is drawn only if it is a terminal.
    """

    def __init__(self, console: Console, plan: ComparisonPlan) -> None:
        self.console = console
        self.plan = plan
        self.steps = plan.base.train.steps
        self._seen: dict[tuple[str, float, int], _Seen] = {}
        self._keys: dict[str, tuple[str, float, int]] = {}
        self._live: Live | None = None
        self._began = time.monotonic()
        self._told_coldstart = False
        self._task: str | None = None
        self._graded = False
        """Whether rewards other than 0 and 1 were seen on it."""

    def __enter__(self) -> ComparisonDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a line of plain text above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def coldstart(self, progress: ColdStartProgress) -> None:
        """Report an evaluation while a starting model is made."""
        if not self._told_coldstart:
            self.note("cold start: making the model that all runs start from; later runs on as many threads reuse it")
            self._told_coldstart = True
        if progress.update % 100 == 0:
            self.note(f"cold start: update {progress.update}, pass@1 {progress.pass_at_1:.3f}")

    def runs(self, outcomes: Sequence[RunOutcome], slots: RunSlots) -> None:
        """Begin to show the runs."""
        for outcome in outcomes:
            key = (outcome.arm, outcome.learning_rate, outcome.seed)
            self._keys[outcome.name] = key
            seen = _Seen(outcome.state if outcome.ended else "saved" if outcome.steps else "waiting", outcome.steps)
            for curve in list(outcome.curves.values())[:1]:
                seen.start, seen.figure = curve.start.figure, curve.final.figure
                self._graded |= curve.graded
            self._seen[key] = seen
        done = sum(o.ended for o in outcomes)
        where = f"{slots.count} at a time" + (f" on {len(slots.gpus)} GPUs" if slots.gpus else "")
        before = f", {done} of them already there" if done else ""
        self.note(f"{len(outcomes)} runs of {self.steps} steps, {where}{before}")
        if self.console.is_terminal and done < len(outcomes):
            self._live = Live(self._table(), console=self.console, auto_refresh=False)
            self._live.start()

    def event(self, event: Event) -> None:
        """Show an event of a run."""
        seen = self._seen[self._keys[event.run]]
        if event.kind in ("began", "started"):
            seen.state = "at work"
        elif event.kind in ("step", "resumed"):
            seen.step = event.fields["step"]
        elif event.kind == "eval" and event.fields["task"] == self._main_task(event):
            seen.figure = event.fields["value"]
            seen.start = seen.figure if seen.start is None else seen.start
            self._graded |= not event.fields["binary"]
        elif event.kind in ("finished", "failed"):
            seen.state = event.kind
        elif event.kind in ("stopped", "refused"):
            seen.state = "saved"
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._say(event, seen)

    @property
    def _figure(self) -> str:
        return figure_name(self._graded)

    def _main_task(self, event: Event) -> str:
        """Return the task whose figure is shown: the first that is evaluated."""
        if self._task is None:
            self._task = event.fields["task"]
        return self._task

    def _say(self, event: Event, seen: _Seen) -> None:
        ended = sum(s.state in ("finished", "failed") for s in self._seen.values())
        count = f"({ended} of {len(self._seen)}, {time.monotonic() - self._began:.0f} s)"
        if event.kind == "resumed":
            self.note(f"{event.run}: resumed from step {seen.step}")
        elif event.kind == "finished" and seen.start is not None:
            self.note(f"{event.run}: {self._figure} {seen.start:.3f} -> {seen.figure:.3f} {count}")
        elif event.kind == "failed":
            self.note(f"{event.run}: failed: {event.fields['reason']} {count}")
        elif event.kind == "stopped":
            self.note(f"{event.run}: saved at step {seen.step}")

    def _table(self) -> Table:
        """Make the live table: a row for each arm at each learning rate, a column for each seed."""
        ended = sum(s.state in ("finished", "failed") for s in self._seen.values())
        title = (
            f"{ended} of {len(self._seen)} runs, {time.monotonic() - self._began:.0f} s; held-out {self._figure}, step"
        )
        table = Table(title=title, title_justify="left")
        for column in ("arm", "lr", *(f"seed {seed}" for seed in self.plan.seeds)):
            table.add_column(column)
        for arm in self.plan.arms:
            for rate in self.plan.learning_rates:
                cells = [self._seen[arm, rate, seed].text(self.steps) for seed in self.plan.seeds]
                table.add_row(Text(arm), format_rate(rate), *cells)
        return table


def show_results(results: ComparisonResults, console: Console) -> None:
    """Print the table of a comparison, with every seed, and how to read it."""
    # No column is cut: a table with intervals is wider than most terminals.
    wide = Console(width=max(console.width, 150), file=console.file, emoji=False)
    lines = [budget_sentence(results), *legend(results)]
    for task in results.tasks:
        table = Table(title=task, title_justify="left")
        for number, heading in enumerate(headings(results, task)):
            table.add_column(heading, justify="left" if number in (0, 6) else "right", no_wrap=True)
        for row in cell_rows(results, task):
            table.add_row(*map(Text, row))
        wide.print(table)
        if len(results.plan.learning_rates) > 1:
            best = Table(title="each arm at its best learning rate", title_justify="left")
            for heading in tuned_headings(results, task):
                best.add_column(heading, no_wrap=True)
            for row in tuned_rows(results, task):
                best.add_row(*map(Text, row))
            wide.print(best)
        lines += alarm_sentences(results, task)
    for line in [*lines, *notes(results)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
