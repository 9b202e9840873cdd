"""`sapo eval`: a model on a task's held-out problems, or on a suite of benchmarks.

`sapo eval-compare`: two evaluations of the same problems, problem by problem.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapo.cli.completion import complete_model, complete_suite, complete_task
from sapo.cli.terminal import console, say, stop_signals

if TYPE_CHECKING:
    from sapo.workflows.evaluate import EvaluatedModel, PlannedEvaluation


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a checkpoint, a model directory, a .gguf file or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the task, as in digits=4, of its prompts, as in prompt.style=chat or prompt.shots=4, "
            "and of the episodes of environments, as in turns.max=3.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task's name, a label of the run's tasks, or a .jsonl or .parquet file; repeatable.",
            show_default="the run's own tasks",
            autocompletion=complete_task,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Several benchmarks in one table: a .yaml file, or the name of a shipped suite, paper_fig6. Its "
            "settings are BENCHMARK.KEY=VALUE, and path=DIRECTORY has the rows of each.",
            autocompletion=complete_suite,
        ),
    ] = None,
    problems: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**6,
            help="Held-out problems.",
            show_default="all rows, 256 of a task that generates them, or the run's",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="Completions of each problem (n).", show_default="4, or the run's"),
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="The k of pass@k to estimate, as in 1,4.", show_default="1, or the run's")
    ] = None,
    greedy: Annotated[
        bool | None,
        typer.Option(
            "--greedy/--no-greedy", help="Draw one more completion at temperature 0.", show_default="no, or the run's"
        ),
    ] = None,
    constant: Annotated[
        bool | None,
        typer.Option(
            "--constant/--no-constant", help="Measure the best constant answer.", show_default="yes, or the run's"
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Smallest reward that counts as right.", show_default="1")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=10**7, help="Longest completion.", show_default="64, or the run's")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy.", show_default="1, or the run's")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", show_default="1, or the run's")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the draws and of the choice of problems.", show_default="12345, or the run's"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="The engine: local, or module:Class.", show_default="local, or the run's"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16.", show_default="float32, or the run's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The directory to write to.", show_default="evals/MODEL-TASK")
    ] = None,
) -> None:
    """Evaluate a model on a task's held-out problems, or on the benchmarks of a suite; the same command resumes a
    killed evaluation."""
    from sapo.cli.suite import evaluate_suite
    from sapo.errors import ConfigError
    from sapo.model.sources import check_source
    from sapo.workflows.evaluate import EvaluatedModel
    from sapo.workflows.evaluation_plan import plan_evaluations

    given = {
        "problems": problems,
        "samples": samples,
        "ks": None if k is None else _parse_ks(k),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "greedy": greedy,
        "constant": constant,
        "engine": engine,
    }
    check_source(model)  # before the rows of a task are downloaded
    if suite is not None:
        if task:
            raise ConfigError(f"--suite has benchmarks of its own; got --task {task[0]} beside it; give one of the two")
        given |= {"threshold": threshold}
        evaluate_suite(model, suite, overrides or [], given, seed=seed, dtype=dtype, device=device, out=out)
        return
    smallest = 1.0 if threshold is None else threshold
    asked = plan_evaluations(model, task or [], overrides or [], seed=seed, threshold=smallest, **given)
    subject = EvaluatedModel.load(model, dtype, device)
    for planned in asked:
        _evaluate_task(planned, model, subject, out, alone=len(asked) == 1)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's directory, or its results.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The evaluation to compare it with.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the comparison as JSON.")] = None,
) -> None:
    """Compare two evaluations of the same problems, problem by problem, with paired tests."""
    from sapo.cli.tables import comparison_table
    from sapo.errors import ConfigError
    from sapo.evaluation.comparison import compare as compare_results
    from sapo.evaluation.results import read_results
    from sapo.utils.files import check_output

    if out is not None and os.path.lexists(out):
        raise ConfigError(f"{out} exists already; name another file with --out")
    if out is not None:
        check_output(out, "--out")
    result = compare_results(read_results(first), read_results(second), (str(first), str(second)))
    console.print(comparison_table(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
        say(f"wrote {out}")


def _evaluate_task(
    planned: PlannedEvaluation,
    model: Path,
    subject: EvaluatedModel,
    out: Path | None,
    *,
    alone: bool,
) -> None:
    """Run one of the planned evaluations and print its figures."""
    from sapo.cli.tables import Progress, evaluation_table
    from sapo.tasks import notices_of
    from sapo.workflows.evaluation_plan import output_directory

    prompts = planned.ask(subject.policy)
    directory, note = output_directory(model, subject, planned, prompts, out, alone=alone)
    if note:
        say(f"note: {note}")
    for line in notices_of([planned.task]):
        say(f"note: {line}")
    say(planned.extent(prompts))
    with Progress(console) as progress, stop_signals() as stop:
        results = planned.run(
            subject, prompts, out=directory, should_stop=stop, on_progress=progress, report=progress.note
        )
    console.print(evaluation_table(results.evaluation))
    say(f"wrote {directory}/results.json, completions.jsonl and the completions to read in {directory}/index.html")


def _parse_ks(text: str) -> tuple[int, ...]:
    from sapo.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--k takes whole numbers between commas, as in 1,4; got {text!r}") from None
