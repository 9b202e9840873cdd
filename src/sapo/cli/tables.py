"""Evaluations and comparisons as tables on a terminal.

What came from a model or a file is printed as plain text, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from sapo.conformance.report import Report
from sapo.data import Status
from sapo.diagnostics.titles import metric_title
from sapo.evaluation.comparison import Comparison, Discordance
from sapo.evaluation.estimates import Estimate
from sapo.evaluation.figures import Evaluation, Slice
from sapo.utils.text import visible

LINES = 10
"""Largest number of lines of progress where there is no terminal to draw a bar on."""

MOST_SLICES = 40
"""Largest number of rows of a table by subject; results.json has all."""


def seconds_table(seconds: Mapping[str, float]) -> Table:
    """Make the table of where a run's time went: each phase, and under it the parts that were timed.

    Args:
        seconds: of phases ("update") and parts ("update/head"), with the "total" of the phases.
    """
    table = Table("where the time went", "seconds", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    total = seconds["total"]
    for name in _by_weight(seconds):
        depth = name.count("/")
        share = f"{seconds[name] / total:.1%}" if total else ""
        table.add_row("  " * depth + name.rsplit("/", 1)[-1], f"{seconds[name]:.2f}", share)
    return table


def _by_weight(seconds: Mapping[str, float], parent: str = "") -> list[str]:
    """Return names in the order of a tree, the heaviest branch first."""
    depth = parent.count("/") + 1 if parent else 0
    children = [n for n in seconds if n != "total" and n.count("/") == depth and n.startswith(parent and parent + "/")]
    ordered = sorted(children, key=lambda n: -seconds[n])
    return [name for child in ordered for name in (child, *_by_weight(seconds, child))]


class Progress:
    """Shows how many problems are done: a bar on a terminal, now and then a line elsewhere.

    Args:
        console: where to print.
        what: is counted.
    """

    def __init__(self, console: Console, what: str = "problems") -> None:
        self.console = console
        self.what = what
        self._bar: Bar | None = None
        self._task: Any = None
        self._told = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how many problems are done."""
        if self.console.is_terminal:
            self._show(done, total)
        elif done < total and done * LINES // total > self._told:
            self._told = done * LINES // total
            self.console.print(f"{done} of {total} {self.what}", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Print a note."""
        self.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def _show(self, done: int, total: int) -> None:
        if self._bar is None:
            columns = (TextColumn(self.what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)


def evaluation_table(result: Evaluation) -> RenderableType:
    """Make the table of an evaluation's figures, with those of its subjects below."""
    n = result.samples
    table = Table(title=escape(f"{result.task}: {result.problems} held-out problems x {n} samples"))
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    estimates = [
        (f"mean@{n}", result.mean),
        *((f"pass@{k}", estimate) for k, estimate in result.pass_at.items()),
        (f"majority@{n}", result.majority if n > 1 else None),
        ("greedy", result.greedy),
        *((escape(name), figure.mean) for name, figure in result.figures.items()),
    ]
    if not result.binary:  # shares of right completions say little of other rewards than 0 and 1
        estimates = [(escape(name), figure.mean) for name, figure in result.figures.items()]
    table.add_row(metric_title("eval", "reward/mean").title, measured(result.reward_mean), "")
    for name, estimate in estimates:
        if estimate is not None:
            table.add_row(name, *_columns(estimate))
    if result.constant is not None and result.binary:
        answer = visible(result.constant.answer.splitlines()[0][:24])
        table.add_row(
            metric_title("eval", "constant").title, f"{result.constant.share:.3f}", escape(f"always {answer}")
        )
    table.add_section()
    total = result.problems * n
    for status, count in result.statuses.items():
        table.add_row(status.replace("_", " "), str(count), f"{count / total:.1%}")
    table.add_section()
    table.add_row(metric_title("eval", "length/mean").title, f"{result.length_mean:.1f}", "tokens")
    table.add_row("tokens", f"{result.tokens + result.greedy_tokens:,}", "")
    if result.tokens_per_second is not None:
        table.add_row("tokens/s", f"{result.tokens_per_second:,.0f}", "")
    table.add_row("time", f"{result.seconds:.1f}", "s")
    slices = result.slices.items() if result.binary else ()
    return Group(table, *(_slice_table(name, rows, n) for name, rows in slices))


def suite_table(suite: str, evaluations: Mapping[str, Evaluation]) -> Table:
    """Make the table of a suite: a row for each benchmark."""
    table = Table(title=escape(suite))
    table.add_column("benchmark", no_wrap=True)
    reward = metric_title("eval", "reward/mean").title
    of_answers = ("best constant", "no answer", "cut", "tokens", "time")
    for heading in ("problems", "n", reward, "mean@n", "95% interval", *of_answers):
        table.add_column(heading, justify="right")
    for label, result in evaluations.items():
        drawn = result.problems * result.samples
        constant = "" if result.constant is None or not result.binary else f"{result.constant.share:.3f}"
        table.add_row(
            escape(label),
            f"{result.problems:,}",
            str(result.samples),
            measured(result.reward_mean),
            *(_columns(result.mean) if result.binary else ("", "")),
            constant,
            f"{result.statuses.get(Status.UNPARSEABLE.value, 0) / drawn:.1%}",
            f"{result.finish_reasons['length'] / drawn:.1%}",
            f"{result.length_mean:,.0f}",
            f"{result.seconds:,.0f} s",
        )
    return table


def _slice_table(name: str, rows: list[Slice], samples: int) -> Table:
    caption = None if len(rows) <= MOST_SLICES else f"the first {MOST_SLICES} of {len(rows)}; results.json has all"
    table = Table(title=f"by {name}", caption=caption)
    table.add_column(name)
    table.add_column("problems", justify="right")
    ks = [k for k in rows[0].pass_at if k > 1]
    for heading in (f"mean@{samples}", "95% interval", *(f"pass@{k}" for k in ks)):
        table.add_column(heading, justify="right")
    for row in rows[:MOST_SLICES]:
        passes = ("" if (estimate := row.pass_at[k]) is None else f"{estimate.value:.3f}" for k in ks)
        table.add_row(escape(visible(row.value)), str(row.problems), *_columns(row.mean), *passes)
    return table


def comparison_table(result: Comparison) -> RenderableType:
    """Make the table of two models and their difference with its tests."""
    table = Table(title=f"{result.problems} problems, the same for both")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    for letter, samples, mean in zip("AB", result.samples, result.means, strict=True):
        figure = metric_title("eval", "reward/mean").title if result.graded else f"mean@{samples}"
        table.add_row(f"{figure} of {letter}", *_columns(mean))
    table.add_section()
    difference = result.difference
    table.add_row("B less A", f"{difference.value:+.3f}", f"{difference.low:+.3f} .. {difference.high:+.3f}")
    table.add_row("p, permutation of signs", _p_value(result.p_value), "")
    equal = result.problems - result.better - result.worse
    table.add_row("problems better, worse, equal", f"{result.better}, {result.worse}, {equal}", "")
    for name, pairs in (("greedy", result.greedy), ("the one sample", result.single)):
        if pairs is not None:
            table.add_row(f"p, McNemar on {name}", _p_value(pairs.p_value), _discordance(pairs))
    return Group(*(Text(f"{letter}: {name}") for letter, name in zip("AB", result.names, strict=True)), table)


def measured(value: float | None) -> str:
    """Return a figure as it is shown; None is one that no completion was judged for."""
    return "not judged" if value is None else f"{value:.3f}"


def _columns(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return measured(None), ""
    return f"{estimate.value:.3f}", f"{estimate.low:.3f} .. {estimate.high:.3f}"


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _discordance(pairs: Discordance) -> str:
    return f"only A {pairs.only_a}, only B {pairs.only_b}"


def conformance_table(report: Report) -> Table:
    """Make the table of the laws that each loss of a family keeps."""
    styles = {"held": "[green]held[/]", "broken": "[red]broken[/]", "does not apply": "-"}
    table = Table(title=f"{report.family} {report.version}".rstrip())
    table.add_column("law", no_wrap=True)
    for name in report.names():
        table.add_column(name.rpartition(":")[2])
    for place, law in enumerate(report.laws):
        table.add_row(law, *(styles[verdicts[place].status] for verdicts in report.verdicts))
    return table
