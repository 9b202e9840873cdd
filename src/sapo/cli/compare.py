"""`sapo compare`: objectives x learning rates x seeds from one cold start, side by side, and their table."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from sapo.cli.completion import (
    complete_arm,
    complete_baseline,
    complete_comparison,
    complete_objective,
    complete_override,
)
from sapo.cli.terminal import StopSignal, console, say, stop_signals

if TYPE_CHECKING:
    from sapo.workflows.comparing import ComparedRuns

Number = TypeVar("Number", int, float)


def compare(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A comparison recipe (paper_fig4), a recipe of one run, or a comparison's directory.",
            autocompletion=complete_comparison,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to change in all runs, as in train.steps=100.",
            autocompletion=complete_override,
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Arms of a recipe of one run, as in sapo,gspo,grpo.",
            show_default="these three",
            autocompletion=complete_objective,
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Some arms of a comparison recipe.", show_default="all", autocompletion=complete_arm),
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Learning rates, as in 1e-4,2e-4: every arm is run at each.", show_default="the recipe's"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, as in 3, or which, as in 0,1,2.", show_default="the recipe's, or 3")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The arm that the others are compared with.",
            show_default="the recipe's, or the first",
            autocompletion=complete_baseline,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run the small form, to see that everything works.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", help="Runs at a time.", show_default="a run for each core or GPU")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The directory to write to.", show_default="comparisons/RECIPE")
    ] = None,
) -> None:
    """Compare objectives over learning rates and seeds; the same command resumes a killed comparison."""
    from sapo.front.comparison_display import ComparisonDisplay
    from sapo.workflows.comparing import compare as compare_runs
    from sapo.workflows.comparing import load_comparison

    plan = load_comparison(
        recipe,
        overrides or [],
        objectives=_names(objectives, "--objectives", "sapo,grpo"),
        arms=_names(arms, "--arms", "sapo,grpo"),
        learning_rates=_numbers(learning_rates, float, "--learning-rates", "1e-4,2e-4"),
        seeds=_seeds(seeds),
        baseline=baseline,
        quick=quick,
    )
    begun = (Path(recipe) / "comparison.yaml").is_file()
    directory = out or (Path(recipe) if begun else None)
    with ComparisonDisplay(console, plan) as display, stop_signals() as stop:
        compared = compare_runs(plan, directory, jobs=jobs, listener=display, should_stop=stop)
    _report_end(compared, stop)


def _report_end(compared: ComparedRuns, stop: StopSignal) -> None:
    from sapo.front.comparison_display import show_results

    show_results(compared.results, console)
    say(f"wrote {compared.directory}/table.md (every run), results.json and runs/")
    if compared.unfinished:
        say(f"stopped with {len(compared.unfinished)} runs not ended; the active ones are saved")
        say(f"next: sapo compare {compared.directory}")
        raise typer.Exit(128 + (stop.received or signal.SIGINT))
    say(f"next: sapo report {compared.directory}")


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _names(text: str | None, option: str, example: str) -> list[str] | None:
    """Read names between commas, each once.

    Raises:
        ConfigError: there is none, or one stands there twice.
    """
    from sapo.errors import ConfigError

    words = _words(text)
    if words is not None and not words:
        raise ConfigError(f"{option} takes names between commas, as in {example}; got {text!r}")
    for word in words or []:
        if words is not None and words.count(word) > 1:
            raise ConfigError(f"{option} takes each name once; got {word!r} {words.count(word)} times; leave one out")
    return words


def _seeds(text: str | None) -> int | list[int] | None:
    """Read seeds: `3` is a number of seeds; `0,1,2`, and `5,`, are the seeds themselves."""
    numbers = _numbers(text, int, "--seeds", "3, or 0,1,2")
    return numbers[0] if numbers is not None and text is not None and "," not in text else numbers


def _numbers(text: str | None, kind: Callable[[str], Number], option: str, example: str) -> list[Number] | None:
    from sapo.errors import ConfigError

    words = _words(text)
    try:
        numbers = None if words is None else [kind(word) for word in words]
    except ValueError:
        raise ConfigError(f"{option} takes numbers between commas, as in {example}; got {text!r}") from None
    if numbers == []:
        raise ConfigError(f"{option} takes numbers between commas, as in {example}; got {text!r}")
    return numbers
