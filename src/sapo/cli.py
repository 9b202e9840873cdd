"""The command line: parse, say what will happen, call the library, say what was written and what to run next.

Exit codes: 0 done; 2 the user's mistake, in one line; 1 the run's failure, or ours (with its traceback); 130 and 143
stopped by Ctrl-C or a termination signal, with everything saved.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from sapo.commands.doctor import doctor
from sapo.commands.export import export
from sapo.commands.generate import generate
from sapo.completion import complete_model, complete_override, complete_recipe, complete_run, complete_task

app = typer.Typer(
    name="sapo",
    help="Soft Adaptive Policy Optimization: reinforcement-learning post-training of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that differ from the recipe's.",
        autocompletion=complete_override,
    ),
]


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a shipped recipe: quickstart.", autocompletion=complete_recipe
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load and check everything, say what would happen and in what memory, stop."),
    ] = False,
) -> None:
    """Train a policy by a recipe."""
    from sapo.config import load_recipe
    from sapo.progress import Display
    from sapo.session import dry_run as rehearse
    from sapo.session import train as run_training

    config = load_recipe(recipe, overrides)
    if dry_run:
        from sapo.commands.dry_run import show_dry_run

        show_dry_run(rehearse(config), console)
        return
    with Display(console) as display, _stop_signals() as stop:
        run = run_training(config, listener=display, should_stop=stop, on_coldstart=display.coldstart)
    _report_end(run, stop)


@app.command()
def resume(
    run_directory: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The run directory, as in runs/quickstart.", autocompletion=complete_run),
    ],
    overrides: Overrides = None,
) -> None:
    """Take a run up again from its newest whole checkpoint."""
    from sapo.progress import Display
    from sapo.session import resume as resume_training

    with Display(console) as display, _stop_signals() as stop:
        run = resume_training(run_directory, overrides, listener=display, should_stop=stop)
    _report_end(run, stop)


@app.command()
def coldstart(
    recipe: Annotated[
        str, typer.Argument(help="A recipe with a model.coldstart section.", autocompletion=complete_recipe)
    ],
    overrides: Overrides = None,
) -> None:
    """Make a recipe's starting model, if the cache has none."""
    from sapo.coldstart import describe, ensure_coldstart
    from sapo.config import load_recipe
    from sapo.progress import Display
    from sapo.session import resolve_machine

    config = resolve_machine(load_recipe(recipe, overrides))
    with Display(console) as display, _stop_signals() as stop:
        path, made = ensure_coldstart(config, display.coldstart, stop)
    record = describe(path)
    _say(
        f"{'made' if made else 'in the cache'}: {path}\n"
        f"  {record['parameters']:,} parameters, pass@1 {record['pass@1']:.3f} on fresh problems after "
        f"{record['updates']} updates ({record['seconds']:.0f} s)\n"
        f"next: sapo train {recipe}"
    )


@app.command(name="eval")
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
            help="Settings of the task, as in digits=4, and of its prompts, as in prompt.style=chat or prompt.shots=4.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task's name, or a .jsonl or .parquet file; repeatable. [default: the run's own tasks]",
            autocompletion=complete_task,
        ),
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Held-out problems. [default: 256, or the run's]")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions of each problem (n). [default: 4, or the run's]")
    ] = None,
    k: Annotated[
        str | None, typer.Option(help="Which pass@k to estimate, as in 1,4. [default: 1, or the run's]")
    ] = None,
    greedy: Annotated[
        bool | None,
        typer.Option("--greedy/--no-greedy", help="Draw one more at temperature 0. [default: no, or the run's]"),
    ] = None,
    constant: Annotated[
        bool | None,
        typer.Option("--constant/--no-constant", help="Judge the best constant answer. [default: yes, or the run's]"),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Smallest reward that counts as right.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion. [default: 64, or the run's]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy. [default: 1, or the run's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling. [default: 1, or the run's]")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the draws and the choice of problems. [default: 12345, or the run's]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: float32, or the run's]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The directory to write to. [default: evals/MODEL-TASK]")
    ] = None,
) -> None:
    """Evaluate a model on a task's held-out problems; the same command goes on with a killed one."""
    from sapo.evaluation_order import Subject
    from sapo.evaluation_plan import orders, place
    from sapo.tables import Progress, evaluation_table

    given = {
        "problems": problems,
        "samples": samples,
        "ks": None if k is None else _parse_ks(k),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "greedy": greedy,
        "constant": constant,
    }
    asked = orders(model, task or [], overrides or [], seed=seed, threshold=threshold, **given)
    subject = Subject.load(model, dtype, device)
    for order in asked:
        prompts = order.ask(subject.policy)
        directory, note = place(model, subject, order, prompts, out, alone=len(asked) == 1)
        if note:
            _say(f"note: {note}")
        with Progress(console) as progress, _stop_signals() as stop:
            results = order.carry_out(
                subject, prompts, out=directory, should_stop=stop, on_progress=progress, tell=progress.note
            )
        if problems is not None and results.evaluation.problems < problems:
            there = results.evaluation.problems
            _say(f"note: {order.task.name} has {there} held-out problems; {problems} were asked for")
        console.print(evaluation_table(results.evaluation))
        _say(f"wrote {directory}/results.json, completions.jsonl and the completions to read in {directory}/index.html")


@app.command(name="eval-compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's directory, or its results.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The one to set against it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the comparison as JSON.")] = None,
) -> None:
    """Compare two evaluations of the same problems, problem by problem, with paired tests."""
    from sapo.config import ConfigError
    from sapo.evaluation.comparison import compare as compare_results
    from sapo.evaluation.results import read_results
    from sapo.tables import comparison_table

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out")
    result = compare_results(read_results(first), read_results(second), (str(first), str(second)))
    console.print(comparison_table(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
        _say(f"wrote {out}")


@app.command()
def conformance(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUBJECT]... [KEY=VALUE]...",
            help="sapo, trl, liger, verl, or a loss of yours as module:function with its settings; sapo when left out.",
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="The objective that a loss of yours is.")] = "sapo",
    normalizer: Annotated[str | None, typer.Option(help="Its normaliser; that of the objective when left out.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the whole as a page of markdown.")] = None,
) -> None:
    """Judge policy losses by the laws they should obey.

    Exit code 1 when sapo or a loss of yours breaks one; 0 whatever the neighbours do.
    """
    from sapo.conformance.peers import FAMILIES
    from sapo.conformance.report import Report, judge_family, judge_function
    from sapo.conformance.report import markdown as as_markdown

    words = subjects or []
    names = [word for word in words if "=" not in word] or ["sapo"]
    settings = _settings([word for word in words if "=" in word])
    sys.path.insert(0, "")  # a loss of the user's, beside which the command was given
    reports: list[Report] = []
    for name in names:
        if ":" in name:
            reports.append(judge_function(name, objective=objective, normalizer=normalizer, hyper=settings))
        elif name in FAMILIES:
            reports.append(judge_family(name))
        else:
            from sapo.config import ConfigError

            known = ", ".join(FAMILIES)
            raise ConfigError(f"a subject is one of {known} or module:function; got {name!r}; choose one of these")
        _print_conformance(reports[-1])
    if markdown is not None:
        markdown.write_text(as_markdown(reports, shlex.join(["sapo", "conformance", *words])))
        _say(f"wrote {markdown}")
    if any(report.ours and report.broken for report in reports):
        raise typer.Exit(1)


app.command()(generate)
app.command()(export)
app.command()(doctor)


def main() -> None:
    """Entry point: one line and exit code 2 for the user's mistakes, tracebacks for ours."""
    try:
        code = app(standalone_mode=False)  # the code of a typer.Exit, None otherwise
    except TyperException as error:  # an unknown command or option, a value of the wrong type
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(message or "see sapo --help", code=2)
    except typer.Abort:
        sys.exit(130)
    except ValueError as error:
        if not _is_users_mistake(error):
            raise
        _fail(str(error), code=2)
    except RuntimeError as error:
        if not _is_runs_failure(error):
            raise
        _fail(str(error), code=1)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        _fail("stopped; nothing was lost: the same command starts again", code=128 + StopSignal.last)
    sys.exit(code or 0)


def _is_users_mistake(error: ValueError) -> bool:
    from sapo.config import ConfigError
    from sapo.model.policy import ModelError
    from sapo.tasks import TaskError

    return isinstance(error, ConfigError | ModelError | TaskError)


def _is_runs_failure(error: RuntimeError) -> bool:
    from sapo.coldstart import ColdStartError
    from sapo.training.trainer import NonFiniteError

    return isinstance(error, NonFiniteError | ColdStartError)


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        errors.print(f"sapo: {line}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class StopSignal:
    """True once Ctrl-C or a termination signal has come; a second one stops at once."""

    last: int = signal.SIGINT
    """The signal that came, for the exit code."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, _: Any) -> None:
        """The handler of both signals."""
        if self.received is not None:
            os._exit(128 + number)  # asked twice: the newest checkpoint on disk is what there is
        self.received = number
        StopSignal.last = number
        errors.print("stopping at the next safe point; once more stops at once", markup=False)


@contextmanager
def _stop_signals() -> Iterator[StopSignal]:
    stop = StopSignal()
    previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report_end(run: Any, stop: StopSignal) -> None:
    if run.stopped is not None:
        _say(f"stopped at {run.stopped.checkpoint.label}, saved in {run.stopped.checkpoint.path}")
        _say(f"next: sapo resume {run.directory}")
        raise typer.Exit(128 + (stop.received or signal.SIGINT))
    summary = run.summary
    start, final = summary["start"], summary["final"]
    if start and final and "pass@1" in final:
        _say(f"held-out pass@1 {start['pass@1']:.3f} -> {final['pass@1']:.3f} in {summary['steps']} steps")
        if "greedy" in final:
            _say(f"         greedy {start['greedy']:.3f} -> {final['greedy']:.3f}")
        if "constant" in final:
            _say(f"  best constant answer {final['constant']:.3f}, the same for every problem")
    seconds = {k: v for k, v in summary["seconds"].items() if k != "total"}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    _say(f"{summary['seconds']['total']:.1f} s: {parts}")
    model = run.directory / "checkpoints" / f"step-{summary['steps']:06d}"
    rollouts = ", rollouts/" if run.config.log.rollouts_every else ""
    _say(f"wrote {run.directory}/summary.json, metrics.jsonl{rollouts} and the model in {model}")
    _say(f"next: sapo eval {run.directory}")
    if run.config.log.tensorboard:
        _say(f"      tensorboard --logdir {run.directory}/tensorboard")


def _settings(words: list[str]) -> dict[str, Any]:
    from sapo.config import parse_override

    return dict(parse_override(word) for word in words)


def _print_conformance(report: Any) -> None:
    from sapo.conformance.report import counterexamples, summary
    from sapo.tables import conformance_table

    # No column is cut: what a table of fifteen objectives needs is more than most terminals have.
    Console(width=max(console.width, 48 + 10 * len(report.subjects))).print(conformance_table(report))
    for line in counterexamples(report):
        _say(line)
    _say(summary(report))


def _parse_ks(text: str) -> tuple[int, ...]:
    from sapo.config import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--k takes whole numbers between commas, as in 1,4; got {text!r}") from None


if __name__ == "__main__":
    main()
