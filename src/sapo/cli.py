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
from rich.table import Table
from typer.exceptions import TyperException

from sapo.commands.doctor import doctor
from sapo.commands.export import export
from sapo.commands.generate import generate
from sapo.completion import complete_override, complete_recipe, complete_run

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
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, a checkpoint or a run directory.")],
    task: Annotated[str, typer.Option(help="A task's name, or a .jsonl or .parquet file.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the task, as in digits=4.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each problem.")] = 4,
    k: Annotated[str, typer.Option(help="Which pass@k to estimate, as in 1,4.")] = "1",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws and the choice of problems.")] = 12345,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the results as JSON.")] = None,
) -> None:
    """Evaluate a model on a task's held-out problems."""
    from sapo.config import ConfigError
    from sapo.rollout.sampling import SamplingParams
    from sapo.session import evaluate as run_evaluation
    from sapo.session import newest_model

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype must be float32 or bfloat16; got {dtype!r}")
    out = out or _free_path(Path("evals") / f"{model.resolve().name}-{Path(task).stem}.json")
    if out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out")
    ks = _parse_ks(k, samples)
    try:
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error
    made = _make_task(task, options or [], seed)
    directory = newest_model(model)
    with _stop_signals() as stop:
        result = run_evaluation(
            directory,
            made,
            problems=problems,
            samples=samples,
            ks=ks,
            params=params,
            dtype=dtype,
            device=device,
            should_stop=stop,
        )
    if result.problems < problems:
        _say(f"note: {result.task} has {result.problems} held-out problems; {problems} were asked for")
    _print_evaluation(result)
    record = {
        "model": str(directory),
        "task": {"name": task, "options": options or []},
        "sampling": {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed},
        "results": result.to_json(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    _say(f"wrote {out}")


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
    seconds = {k: v for k, v in summary["seconds"].items() if k != "total"}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    _say(f"{summary['seconds']['total']:.1f} s: {parts}")
    model = run.directory / "checkpoints" / f"step-{summary['steps']:06d}"
    rollouts = ", rollouts/" if run.config.log.rollouts_every else ""
    _say(f"wrote {run.directory}/summary.json, metrics.jsonl{rollouts} and the model in {model}")
    _say(f"next: sapo eval {run.directory} {_as_options(run.config)}")
    if run.config.log.tensorboard:
        _say(f"      tensorboard --logdir {run.directory}/tensorboard")


def _as_options(config: Any) -> str:
    """A recipe's first task and sampling as options of `sapo eval`."""
    task, rollout = config.tasks[0], config.rollout
    parts = [f"--task {task.name}", *(f"{key}={shlex.quote(str(value))}" for key, value in task.options.items())]
    for option, value, default in (
        ("max-new-tokens", rollout.max_new_tokens, 64),
        ("temperature", rollout.temperature, 1.0),
        ("top-p", rollout.top_p, 1.0),
    ):
        if value != default:
            parts.append(f"--{option} {value}")
    return " ".join(parts)


def _make_task(name: str, options: list[str], seed: int) -> Any:
    from sapo.config import parse_override
    from sapo.tasks import make_task

    settings = dict(parse_override(o) for o in options)
    if Path(name).suffix in (".jsonl", ".parquet", ".json"):
        return make_task("file", seed=seed, path=name, **settings)
    return make_task(name, seed=seed, **settings)


def _parse_ks(text: str, samples: int) -> tuple[int, ...]:
    from sapo.config import ConfigError

    try:
        ks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--k takes whole numbers between commas, as in 1,4; got {text!r}") from None
    if min(ks) < 1 or max(ks) > samples:
        raise ConfigError(f"every k must lie in 1..samples ({samples}); got {text}; raise --samples")
    return ks


def _free_path(path: Path) -> Path:
    """The path itself, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _print_evaluation(result: Any) -> None:
    table = Table(title=f"{result.task}: {result.problems} held-out problems x {result.samples} samples")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    for name, estimate in [
        (f"mean@{result.samples}", result.mean),
        *((f"pass@{k}", e) for k, e in result.pass_at.items()),
    ]:
        table.add_row(name, f"{estimate.value:.3f}", f"{estimate.low:.3f} .. {estimate.high:.3f}")
    table.add_section()
    for status, count in result.statuses.items():
        table.add_row(status, str(count), "")
    table.add_row("mean length", f"{result.length_mean:.1f} tokens", "")
    table.add_row("time", f"{result.seconds:.1f} s", "")
    console.print(table)


if __name__ == "__main__":
    main()
