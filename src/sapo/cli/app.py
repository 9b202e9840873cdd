"""The command line: parse arguments, call the library, print what was written and what to run next.

Exit codes: 0 done; 2 the user's mistake, in one line; 1 the run's failure, or ours (with its traceback); 130 and 143
stopped by Ctrl-C or a termination signal, with everything saved.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from sapo.cli.compare import compare
from sapo.cli.completion import complete_override, complete_recipe, complete_run
from sapo.cli.diagnose import diagnose
from sapo.cli.doctor import doctor
from sapo.cli.evaluate import compare as compare_evaluations
from sapo.cli.evaluate import evaluate
from sapo.cli.export import export
from sapo.cli.generate import generate
from sapo.cli.report import report
from sapo.cli.terminal import StopSignal, console, errors, say, stop_signals
from sapo.errors import ConfigError, Interrupted, RunFailure, UserError

app = typer.Typer(
    name="sapo",
    help="Soft Adaptive Policy Optimization: reinforcement-learning post-training of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings to change, as in train.steps=100.",
        autocompletion=complete_override,
    ),
]


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a shipped recipe: quickstart, moe_quickstart, smollm2_sums, ...",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Load and check everything, print what the run would do and its memory, and stop."
        ),
    ] = False,
) -> None:
    """Train a policy by a recipe."""
    from sapo.cli.progress import Display
    from sapo.config.recipes import load_recipe
    from sapo.workflows.train import dry_run as rehearse
    from sapo.workflows.train import train as run_training

    config = load_recipe(recipe, overrides)
    if dry_run:
        from sapo.cli.dry_run import show_dry_run, show_laws

        show_dry_run(rehearse(config, on_judged=lambda judged: show_laws(judged, console)), console)
        return
    with Display(console) as display, stop_signals() as stop:
        run = run_training(config, listener=display, should_stop=stop, on_coldstart=display.coldstart)
    _report_end(run, stop)


@app.command()
def resume(
    run_directory: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The run directory, as in runs/quickstart.", autocompletion=complete_run),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to change, as in train.steps=100. These may change: train.steps, train.learning_rate, "
            "train.tokens_per_microbatch, train.ranks, train.replicas, train.max_restarts, "
            "train.context_parallel, rollout.parity_every, rollout.parity_tolerance, eval.every, checkpoint, log, "
            "profile, diagnostics and warnings, each with its keys.",
            autocompletion=complete_override,
        ),
    ] = None,
) -> None:
    """Resume a run from its newest whole checkpoint."""
    from sapo.cli.progress import Display
    from sapo.workflows.train import resume as resume_training

    with Display(console) as display, stop_signals() as stop:
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
    from sapo.cli.progress import Display
    from sapo.config.recipes import load_recipe
    from sapo.run.machine import resolve_machine
    from sapo.workflows.coldstart import describe, ensure_coldstart

    config = resolve_machine(load_recipe(recipe, overrides))
    with Display(console) as display, stop_signals() as stop:
        path, made = ensure_coldstart(config, display.coldstart, stop)
    record = describe(path)
    say(
        f"{'made' if made else 'in the cache'}: {path}\n"
        f"  {record['parameters']:,} parameters, pass@1 {record['pass@1']:.3f} on fresh problems after "
        f"{record['updates']} updates ({record['seconds']:.0f} s)\n"
        f"next: sapo train {recipe}"
    )


@app.command()
def conformance(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUBJECT]... [KEY=VALUE]...",
            help="sapo, trl, liger, verl, or your own: a loss as module:function or an objective as module:Class, with "
            "its settings; default: sapo.",
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="The objective that your own loss implements.")] = "sapo",
    normalizer: Annotated[
        str | None, typer.Option(help="Normalizer of your own loss; default: that of the objective.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the results as markdown to this file.")] = None,
) -> None:
    """Judge policy losses and objectives by the laws they should obey.

    The exit code is 1 when sapo or a loss of yours breaks a law, and 0 otherwise, whatever the other libraries do.
    """
    from sapo.conformance.peers import FAMILIES
    from sapo.conformance.report import Report, judge_family, judge_function
    from sapo.conformance.report import markdown as as_markdown

    words = subjects or []
    names = [word for word in words if "=" not in word] or ["sapo"]
    settings = _settings([word for word in words if "=" in word])
    reports: list[Report] = []
    for name in names:
        if ":" in name:
            reports.append(judge_function(name, objective=objective, normalizer=normalizer, hyper=settings))
        elif name in FAMILIES:
            reports.append(judge_family(name))
        else:
            known = ", ".join(FAMILIES)
            raise ConfigError(
                f"a subject is one of {known}, module:function or module:Class; got {name!r}; choose one of these"
            )
        _print_conformance(reports[-1])
    if markdown is not None:
        try:
            markdown.write_text(as_markdown(reports, shlex.join(["sapo", "conformance", *words])))
        except OSError as error:
            raise ConfigError(
                f"--markdown {markdown} cannot be written: {error.strerror}; name another file"
            ) from error
        say(f"wrote {markdown}")
    if any(report.ours and report.broken for report in reports):
        raise typer.Exit(1)


app.command()(compare)
app.command(name="eval")(evaluate)
app.command(name="eval-compare")(compare_evaluations)
app.command()(diagnose)
app.command()(generate)
app.command()(export)
app.command()(report)
app.command()(doctor)


def main() -> None:
    """Run the command line: one line and exit code 2 for a user's mistake, a traceback for ours."""
    try:
        _under_torchrun()
        code = app(standalone_mode=False)  # the code of a typer.Exit, None otherwise
    except TyperException as error:  # an unknown command or option, a value of the wrong type
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(message or "see sapo --help", code=2)
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        _fail(str(error), code=2)
    except RunFailure as error:
        _fail(str(error), code=1)
    except Interrupted:
        _fail("stopped; nothing was lost: run the same command again", code=128 + StopSignal.last)
    sys.exit(code or 0)


def _under_torchrun() -> None:
    """Serve the driver where torchrun started this process as another rank.

    Raises:
        ConfigError: a command that runs in one process.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from sapo.workflows.training_group import is_other_rank, serve_rank

    several = sys.argv[1:2] in (["train"], ["resume"]) and "--dry-run" not in sys.argv
    if is_other_rank():
        if several:
            serve_rank()
        sys.exit(0 if several else 2)
    if not several:
        raise ConfigError(
            "torchrun starts several processes for `sapo train` and `sapo resume` only; got "
            f"{shlex.join(sys.argv[1:])}; start it without torchrun"
        )


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        errors.print(f"sapo: {line}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _report_end(run: Any, stop: StopSignal) -> None:
    if run.stopped is not None:
        say(f"stopped at {run.stopped.checkpoint.label}, saved in {run.stopped.checkpoint.path}")
        say(f"next: sapo resume {run.directory}")
        raise typer.Exit(128 + (stop.received or signal.SIGINT))
    from sapo.diagnostics.titles import metric_title

    summary = run.summary
    start, final = summary["start"], summary["final"]
    if start and final and "pass@1" in final:
        title = metric_title("eval", "pass@1").title
        say(f"{title} {start['pass@1']:.3f} -> {final['pass@1']:.3f} in {summary['steps']} steps")
        if "greedy" in final:
            say(f"         greedy {start['greedy']:.3f} -> {final['greedy']:.3f}")
        if "constant" in final:
            say(f"  best constant {final['constant']:.3f}, one answer for every problem")
    _report_seconds(run)
    model = run.directory / "checkpoints" / f"step-{summary['steps']:06d}"
    rollouts = ", rollouts/" if run.config.log.rollouts_every else ""
    say(f"wrote {run.directory}/summary.json, metrics.jsonl{rollouts} and the model in {model}")
    say(f"next: sapo eval {run.directory}")
    if run.config.log.tensorboard:
        say(f"      tensorboard --logdir {run.directory}/tensorboard")


def _report_seconds(run: Any) -> None:
    from sapo.run.profiling import phases

    seconds = run.summary["seconds"]
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases(seconds).items() if name != "total")
    say(f"{seconds['total']:.1f} s: {parts}")
    if run.config.profile is not None:
        from sapo.cli.tables import seconds_table

        console.print(seconds_table(seconds))
        for trace in sorted((run.directory / "profile").glob("*.json.gz")):
            say(f"trace: {trace}, for chrome://tracing or https://ui.perfetto.dev")


def _settings(words: list[str]) -> dict[str, Any]:
    from sapo.config.recipes import parse_override

    return dict(parse_override(word) for word in words)


def _print_conformance(report: Any) -> None:
    from sapo.cli.tables import conformance_table
    from sapo.conformance.report import counterexamples, summary

    # No column is cut: a table of fifteen objectives is wider than most terminals.
    Console(width=max(console.width, 48 + 10 * len(report.subjects)), emoji=False).print(conformance_table(report))
    for line in counterexamples(report):
        say(line)
    say(summary(report))


if __name__ == "__main__":
    main()
