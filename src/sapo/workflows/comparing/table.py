"""The table of a comparison: for a file (markdown) and, from the same rows, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sapo.evaluation.estimates import Estimate
from sapo.workflows.comparing.outcomes import RunOutcome, figure_name
from sapo.workflows.comparing.plan import format_rate
from sapo.workflows.comparing.results import Cell, ComparisonResults

HEADINGS = ("arm", "lr", "final {figure}", "best", "less {baseline}", "collapsed", "each seed", "tokens", "seconds")


def as_markdown(results: ComparisonResults) -> str:
    """Write the whole of a comparison as markdown: cells, best learning rates, every run.

    Every value of a run is in it, beside the figures made of it.
    """
    plan = results.plan
    lines = [f"# {plan.name}", "", budget_sentence(results), "", *legend(results), ""]
    for task in results.tasks:
        lines += [f"## {task}", "", *_markdown(headings(results, task), cell_rows(results, task)), ""]
        if len(plan.learning_rates) > 1:
            lines += ["Each arm at the learning rate of its best mean, chosen on the problems it is judged by:", ""]
            lines += [*_markdown(tuned_headings(results, task), tuned_rows(results, task)), ""]
        for sentence in alarm_sentences(results, task):
            lines += [sentence, ""]
        lines += ["Every run:", "", *_markdown(RUN_HEADINGS, run_rows(results.outcomes, task)), ""]
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join(lines).rstrip() + "\n"


def headings(results: ComparisonResults, task: str) -> tuple[str, ...]:
    """Return the headings of a task's table of cells."""
    figure = results.figure_of(task)
    return tuple(heading.format(baseline=results.plan.baseline, figure=figure) for heading in HEADINGS)


def tuned_headings(results: ComparisonResults, task: str) -> tuple[str, ...]:
    """Return the headings of a task's table of best learning rates."""
    return ("arm", "lr", f"final {results.figure_of(task)}", f"less {results.plan.baseline}")


def budget_sentence(results: ComparisonResults) -> str:
    """Write a sentence on what every run was given."""
    plan, base = results.plan, results.plan.base
    return (
        f"{base.train.steps} steps of {base.rollout.prompts_per_step} prompts x {base.rollout.samples_per_prompt}, "
        f"{base.train.minibatches} mini-batches; {len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}; held-out: "
        f"{base.eval.problems} problems x {base.eval.samples}"
    )


def legend(results: ComparisonResults) -> list[str]:
    """Return sentences on how to read the figures."""
    over = "problems" if len(results.plan.seeds) == 1 else "seeds and problems"
    graded = [task for task in results.tasks if results.figure_of(task) == figure_name(graded=True)]
    of_rewards = [
        f"Rewards on {', '.join(graded)} are not only 0 and 1, so the figure is their mean. There, collapsed is a run "
        "that has lost more than half of what it had gained over its start, or ended below it, by more than its "
        "problems explain; one that failed counts as 0, or as its lowest evaluation where that is below 0."
    ]
    return [
        f"Means with 95% bootstrap intervals over {over}; differences are paired by seed and problem. best is a "
        "maximum over a run's evaluations. collapsed: last pass@1 below half of the run's best, or below its start by "
        "more than its problems explain; or the run failed, and its last pass@1 counts as 0 (marked x).",
        *(of_rewards if graded else []),
    ]


def cell_rows(results: ComparisonResults, task: str) -> list[tuple[str, ...]]:
    """Return one row for each arm at each learning rate."""
    return [
        (
            cell.arm,
            format_rate(cell.learning_rate),
            str(cell.final),
            str(cell.best),
            signed(cell.difference),
            f"{cell.collapsed} of {len(cell.seeds)}",
            _each_seed(results, cell),
            f"{cell.tokens['generated']:,.0f}" if "generated" in cell.tokens else "",
            f"{cell.seconds['total']:.0f}" if "total" in cell.seconds else "",
        )
        for cell in results.cells
        if cell.task == task
    ]


def tuned_rows(results: ComparisonResults, task: str) -> list[tuple[str, ...]]:
    """Return one row for each arm."""
    return [
        (t.arm, format_rate(t.learning_rate), str(t.final), signed(t.difference))
        for t in results.tuned
        if t.task == task
    ]


RUN_HEADINGS = ("run", "state", "start", "best (step)", "final", "collapsed", "tokens", "seconds")


def run_rows(outcomes: Sequence[RunOutcome], task: str) -> list[tuple[str, ...]]:
    """Return one row for each run; figures it does not have are empty."""
    rows: list[tuple[str, ...]] = []
    for run in outcomes:
        curve = run.curves.get(task)
        rows.append(
            (
                run.name,
                run.state if run.state == "finished" else f"{run.state} after step {run.steps}",
                "" if curve is None else f"{curve.start.figure:.3f}",
                "" if curve is None else f"{curve.best.figure:.3f} ({curve.best.step})",
                f"{curve.final.figure:.3f}" if curve is not None and run.state == "finished" else "",
                ("yes" if run.collapsed(task) else "no") if curve is not None and run.ended else "",
                f"{run.tokens['generated']:,}" if "generated" in run.tokens else "",
                f"{run.seconds['total']:.0f}" if "total" in run.seconds else "",
            )
        )
    return rows


def alarm_sentences(results: ComparisonResults, task: str) -> list[str]:
    """Return sentences on how early warnings agree with collapses, and on warnings about the set-up."""
    alarms = results.alarms(task)
    return [alarms.sentence, *([] if alarms.set_up_sentence is None else [alarms.set_up_sentence])]


def notes(results: ComparisonResults) -> list[str]:
    """Return sentences on why runs failed, and on runs that have not ended."""
    failed = [f"{o.name} failed: {o.reason}" for o in results.outcomes if o.state == "failed"]
    unfinished = [o.name for o in results.outcomes if not o.ended]
    left = [f"not ended, and in no figure: {', '.join(unfinished)}"] if unfinished else []
    return failed + left


def signed(estimate: Estimate | None) -> str:
    """Format a difference with its interval.

    >>> signed(Estimate(0.05, -0.01, 0.11))
    '+0.050 [-0.010, +0.110]'
    """
    return "" if estimate is None else f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _each_seed(results: ComparisonResults, cell: Cell) -> str:
    """Return the last figure of each seed that has ended, in their order."""
    runs = [o for o in results.outcomes if (o.arm, o.learning_rate) == (cell.arm, cell.learning_rate) and o.ended]
    finals = [
        "x" if o.state == "failed" else f"{o.curves[cell.task].final.figure:.3f}".removeprefix("0")
        for o in runs
        if cell.task in o.curves
    ]
    return " ".join(finals)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
