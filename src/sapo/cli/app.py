"""The command line: parse arguments, call the library, print what was written and what to run next.

Exit codes: 0 done; 2 the user's mistake, in one line; 1 the run's failure, or ours (with its traceback); 130, 143, 129
and 138 stopped by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, with everything saved.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from sapo.cli.chat import chat
from sapo.cli.compare import compare
from sapo.cli.completion import complete_override, complete_recipe, complete_run
from sapo.cli.diagnose import diagnose
from sapo.cli.doctor import doctor
from sapo.cli.evaluate import compare as compare_evaluations
from sapo.cli.evaluate import evaluate
from sapo.cli.export import export
from sapo.cli.generate import generate
from sapo.cli.plan import plan
from sapo.cli.recipes import recipes
from sapo.cli.report import report
from sapo.cli.serve import serve
from sapo.cli.terminal import StopSignal, console, errors, say, stop_signals
from sapo.cli.watch import watch
from sapo.errors import ConfigError, Interrupted, RankError, RunFailure, UserError
from sapo.utils.faults import memory_failure
from sapo.utils.files import FULL, check_output, storage_failure

# For annotations only: `--help` is to answer before a library is loaded.
if TYPE_CHECKING:
    from sapo.front.display import Display
    from sapo.workflows.train import Run

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


Quietly = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the lines of metrics.jsonl as they come, and the summary as the last.")
]


def _say_version(asked: bool) -> None:
    if asked:
        from sapo import __version__

        say(f"sapo {__version__}")
        raise typer.Exit


@app.callback()
def sapo(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Soft Adaptive Policy Optimization: reinforcement-learning post-training of language models."""


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
    quiet: Quietly = False,
    as_json: AsJson = False,
) -> None:
    """Train a policy by a recipe."""
    from sapo.config.recipes import load_recipe
    from sapo.workflows.train import dry_run as rehearse
    from sapo.workflows.train import train as run_training

    display = _display(quiet, as_json)
    if dry_run and (quiet or as_json):
        raise ConfigError(f"--dry-run prints tables; got {'--quiet' if quiet else '--json'} with it; leave one out")
    config = load_recipe(recipe, overrides)
    if dry_run:
        from sapo.cli.dry_run import show_dry_run, show_laws

        show_dry_run(rehearse(config, on_judged=lambda judged: show_laws(judged, console)), console)
        return
    with display, stop_signals() as stop:
        run = run_training(config, listener=display, should_stop=stop, on_coldstart=display.coldstart)
    _report_end(run, stop, display)


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
            "train.tokens_per_microbatch, train.picture_tokens_per_microbatch, train.ranks, train.replicas, "
            "train.max_restarts, "
            "train.rank_timeout, train.stall_timeout, "
            "train.context_parallel, train.stop_when, rollout.parity_every, rollout.parity_tolerance, rollout.servers, "
            "rollout.server_timeout, rollout.run_in, rollout.max_staleness, rollout.timeout, "
            "rollout.turns.max_environment_errors, rollout.turns.seconds_per_reply, rollout.turns.play_in, "
            "rollout.turns.env, eval.every, "
            "checkpoint, log, profile, diagnostics, warnings and cluster, each with its keys.",
            autocompletion=complete_override,
        ),
    ] = None,
    accept_changes: Annotated[
        str | None,
        typer.Option(
            metavar="KEY[,KEY]",
            help="Go on with rows, models, modules or settings that have changed since the run began, by their keys.",
        ),
    ] = None,
    quiet: Quietly = False,
    as_json: AsJson = False,
) -> None:
    """Resume a run from its newest whole checkpoint."""
    from sapo.workflows.train import resume as resume_training

    with _display(quiet, as_json) as display, stop_signals() as stop:
        accepted = [key.strip() for key in (accept_changes or "").split(",") if key.strip()]
        run = resume_training(run_directory, overrides, accept_changes=accepted, listener=display, should_stop=stop)
    _report_end(run, stop, display)


@app.command()
def coldstart(
    recipe: Annotated[
        str, typer.Argument(help="A recipe with a model.coldstart section.", autocompletion=complete_recipe)
    ],
    overrides: Overrides = None,
) -> None:
    """Make a recipe's starting model, if the cache has none."""
    from sapo.config.recipes import load_recipe
    from sapo.front.display import Display
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
    from sapo.conformance.report import Report, check_subjects, judge_family, judge_function
    from sapo.conformance.report import markdown as as_markdown

    words = subjects or []
    names = [word for word in words if "=" not in word] or ["sapo"]
    settings = _settings([word for word in words if "=" in word])
    check_subjects(names, objective=objective, normalizer=normalizer)
    if markdown is not None:
        check_output(markdown, "--markdown")
    reports: list[Report] = []
    for name in names:
        if ":" in name:
            reports.append(judge_function(name, objective=objective, normalizer=normalizer, hyper=settings))
        else:
            reports.append(judge_family(name))
        _print_conformance(reports[-1])
    if markdown is not None:
        try:
            markdown.write_text(as_markdown(reports, shlex.join(["sapo", "conformance", *words])))
        except OSError as error:
            if error.errno in FULL:
                raise
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
app.command()(chat)
app.command()(serve)
app.command()(export)
app.command()(report)
app.command()(watch)
app.command()(plan)
app.command()(doctor)
app.command()(recipes)


def main() -> None:
    """Run the command line: one line and exit code 2 for a user's mistake, a traceback for ours."""
    _quiet_threads()
    try:
        _refuse_windows()
        _under_torchrun()
        code = app(standalone_mode=False)  # the code of a typer.Exit, None otherwise
    except TyperException as error:  # an unknown command or option, a value of the wrong type
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(message or "see sapo --help", code=2)
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        _fail(str(error), code=2)
    except RankError as error:
        _fail("\n".join([str(error), *error.table]), code=1)
    except RunFailure as error:
        _fail(str(error), code=1)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Interrupted:
        _fail("stopped; nothing was lost: run the same command again", code=128 + StopSignal.last)
    except Exception as error:
        _fail_for_storage(error)
        if (reason := memory_failure(error)) is not None:
            _fail(f"there was not enough memory: {reason}; free memory, or ask for less at a time", code=1)
        raise
    sys.exit(code or 0)


def _refuse_windows() -> None:
    """Refuse a system without the processes and signals that runs are made of; the objectives work there."""
    if sys.platform == "win32":
        raise ConfigError("sapo runs on Linux and macOS; this is Windows; use WSL2 (`wsl --install`), which is Linux")


def _quiet_threads() -> None:
    """Leave out the traceback of a thread that could not write, as TensorBoard's: the run says why it stops."""
    shown = threading.excepthook

    def show(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or storage_failure(failure.exc_value) is None:
            shown(failure)

    threading.excepthook = show


def _fail_for_storage(error: Exception) -> None:
    """End in one line where a file or directory is at fault: 1 where a disk is, 2 where a name is.

    Errors that name no file are of pipes and sockets, and ours.
    """
    reason = storage_failure(error)
    if reason is None or (isinstance(error, OSError) and error.filename is None and error.errno not in FULL):
        return
    if isinstance(error, OSError) and error.errno not in FULL:
        _fail(f"a path cannot be used: {reason}; check the names on the command line and in the recipe", code=2)
    _fail(f"a file cannot be written or read: {reason}; make room, and run the same command again", code=1)


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


def _display(quiet: bool, as_json: bool) -> Display:
    """Return what shows a run.

    Raises:
        ConfigError: two ways at once.
    """
    from sapo.front.display import Display, JsonLines, Quiet

    if quiet and as_json:
        raise ConfigError("--quiet prints nothing and --json a line for each record; got both; leave one out")
    return JsonLines(console, errors) if as_json else Quiet(errors) if quiet else Display(console)


def _report_end(run: Run, stop: StopSignal, display: Display) -> None:
    """Print what a run has come to and the next commands; leave with the code of a signal where one has stopped it."""
    display.ended(run)
    if run.stopped is not None:
        raise typer.Exit(128 + (stop.received or signal.SIGINT))
    if run.config.profile is not None:
        from sapo.cli.tables import seconds_table

        display.show(seconds_table(run.summary["seconds"]))
        for trace in sorted((run.directory / "profile").glob("*.json.gz")):
            display.say(f"trace: {trace}, for chrome://tracing or https://ui.perfetto.dev")


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
