"""`sapo.train` and `sapo.resume`: from what Python gives to a run, with its progress shown."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sapo.config import RunConfig
from sapo.config.recipes import change_recipe
from sapo.errors import ConfigError
from sapo.front.callbacks import Callbacks, Listeners
from sapo.front.given.models import model_settings
from sapo.front.given.rewards import in_process_names, keep_rewards, verifier_settings
from sapo.front.given.rows import rows_settings
from sapo.front.given.tasks import keep_tasks, tasks_settings
from sapo.front.progress import make_display
from sapo.front.run import Run
from sapo.front.settings import as_changes, read_settings
from sapo.run.directory import RunDirectory
from sapo.run.listener import Listener
from sapo.tasks.verifiers.in_process import standing_in
from sapo.workflows import train as training
from sapo.workflows.coldstart import ColdStartProgress

DEFAULTS: dict[str, Any] = {
    "train": {"steps": 100, "learning_rate": 1e-6, "minibatches": 2},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 256},
    "eval": {"every": 25, "problems": 64},
    "checkpoint": {"every": 25},
}
"""Settings of a run without a recipe, where a recipe's own defaults are for larger runs or there are none."""


def train(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    model: Any = None,
    tasks: Any = None,
    rewards: Any = None,
    rows: Any = None,
    callbacks: Any = (),
    progress: bool = True,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_coldstart: Callable[[ColdStartProgress], None] | None = None,
    **overrides: Any,
) -> Run:
    """Train a policy, and return the run.

    Args:
        recipe: a shipped recipe's name, a YAML file, a dict of settings or a RunConfig. None: defaults for the model
            and the rows or tasks that are given, and the recipe quickstart where nothing is.
        model: a path, a hub id, a pair (model, tokenizer) of transformers, or such a model alone. An object is copied:
            `run.load_model()` has the trained weights.
        tasks: in place of the recipe's: a name, its settings, a Task, or a list of these or of pairs with weights.
            With rows: a dict of further options of their task, as {"score_truncated": True}.
        rewards: in place of the tasks' verifiers: a function, a verifier's name, or several with weights, as a list of
            pairs or a dict. A function takes `completion`, or `completions` of one prompt, and the columns of the rows
            by name; it may be a coroutine function.
        rows: prompts and answers: a list of dicts, a datasets.Dataset, a DataFrame, a dict of splits, a file, a hub id.
        callbacks: functions of (step, metrics), or objects with on_step, on_evaluation or on_checkpoint; one that
            returns True stops the run.
        progress: show the progress, on a terminal, in a notebook or as plain lines; not where a listener is given.
        listener: told of all there is to tell, in place of the progress.
        should_stop: asked wherever the run can stop without loss.
        on_coldstart: called with each evaluation while a starting model is made.
        overrides: settings of the recipe by keyword: `learning_rate=1e-5`, `eval__every=0`, `train={"steps": 20}`.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be run as asked, or an argument is unknown; nothing was written.
        RunFailure: the run stopped itself; the message names the cause and the way out.
    """
    asked = Callbacks(callbacks)
    config = make_config(recipe, model=model, tasks=tasks, rewards=rewards, rows=rows, overrides=overrides)

    def begin(told: Listener, stop: Callable[[], bool], coldstart: Callable[[ColdStartProgress], None]) -> training.Run:
        return training.train(config, listener=told, should_stop=stop, on_coldstart=on_coldstart or coldstart)

    return _watched(begin, asked, listener, should_stop, progress)


def resume(
    run: str | Path | training.Run,
    overrides: Sequence[str] | None = None,
    *,
    rewards: Any = None,
    tasks: Any = None,
    accept_changes: Sequence[str] = (),
    callbacks: Any = (),
    progress: bool = True,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Run:
    """Resume a run from its newest whole checkpoint; on the same machine it continues bit for bit.

    Args:
        run: the run directory, or what `train` returned.
        overrides: `key=value` for the few settings that may change in mid-run; by keyword they may be given too.
        rewards, tasks: the functions and task objects that the run was begun with, in a process that has not got them.
        accept_changes: keys of settings and files that have changed since the run began, to go on with as they are.
        callbacks, progress, listener, should_stop: see `train`.

    Raises:
        ConfigError: not a run directory; an override that would make it another run; or inputs that have changed.
        TaskError: the run has a reward function of a Python session, and it is not given.
    """
    asked = Callbacks(callbacks)
    directory = run.directory if isinstance(run, training.Run) else Path(run)
    given = [] if rewards is None else keep_rewards(rewards)
    if tasks is not None:
        keep_tasks(tasks)
    changes = [*(overrides or []), *(f"{key}={_written(value)}" for key, value in as_changes(settings, resume))]

    def begin(told: Listener, stop: Callable[[], bool], _: Callable[[ColdStartProgress], None]) -> training.Run:
        named = _functions_of(directory) if given else []
        with standing_in(given, named):
            return training.resume(directory, changes, accept_changes=accept_changes, listener=told, should_stop=stop)

    return _watched(begin, asked, listener, should_stop, progress)


def _functions_of(run: Path) -> list[str]:
    """Return the names of reward functions of a Python session that a run was begun with."""
    tasks = RunDirectory.read_config(run).tasks
    return list(dict.fromkeys(name for task in tasks for name in in_process_names(task.options.get("verifier"))))


def make_config(
    recipe: str | Path | Mapping[str, Any] | RunConfig | None,
    *,
    model: Any = None,
    tasks: Any = None,
    rewards: Any = None,
    rows: Any = None,
    overrides: Mapping[str, Any],
) -> RunConfig:
    """Make the checked recipe of a call of `train`.

    Raises:
        ConfigError, ModelError, TaskError: something is missing, unknown or cannot be written down.
    """
    changes = as_changes(overrides, train)
    if isinstance(recipe, RunConfig) and not changes and all(x is None for x in (model, tasks, rewards, rows)):
        return _with_directory(recipe, None)
    if recipe is None and model is None and tasks is None and rows is None:
        recipe = "quickstart"
    raw, name = read_settings(recipe)
    if recipe is None:
        raw = {key: dict(section) for key, section in DEFAULTS.items()}
    if model is not None:
        raw["model"] = model_settings(model, raw.get("model") or {})
    judged = {} if rewards is None else {"verifier": verifier_settings(rewards)}
    given = make_tasks(tasks, rows, judged)
    if given is not None or raw.get("tasks"):
        raw["tasks"] = [{**task, **judged} for task in (given or raw["tasks"])]
    _refuse_incomplete(raw, changes)
    return _with_directory(change_recipe(raw, changes, name or "the settings given to sapo.train"), name)


def make_tasks(
    tasks: Any, rows: Any, judged: Mapping[str, Any], *, all_held_out: bool = False
) -> list[dict[str, Any]] | None:
    """Return the section `tasks` for tasks and rows that were given, None for neither.

    Args:
        tasks: with rows, a dict without a name holds further options of their task.
        judged: the verifier of all tasks, where one was given.
        all_held_out: of rows, hold all out.

    Raises:
        TaskError: one of them is none.
    """
    if rows is None:
        return None if tasks is None else tasks_settings(tasks)
    of_rows = isinstance(tasks, Mapping) and "name" not in tasks
    options = {**(tasks if of_rows else {}), **judged}
    others = [] if tasks is None or of_rows else tasks_settings(tasks)
    return [rows_settings(rows, options, all_held_out=all_held_out), *others]


def _refuse_incomplete(raw: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> None:
    keys = {key.partition(".")[0] for key, _ in changes}
    if not raw.get("model") and "model" not in keys:
        raise ConfigError(
            "sapo.train needs a model; got none; model= takes a path, a hub id or (model, tokenizer), and a recipe "
            "names one"
        )
    if not raw.get("tasks") and "tasks" not in keys:
        raise ConfigError("sapo.train needs something to train on; got neither rows nor tasks; rows=[{...}] gives rows")


def _with_directory(config: RunConfig, name: str | None) -> RunConfig:
    """Return a recipe with a run directory: runs/NAME of a recipe's file, else the first free runs/run, run-2, ..."""
    if config.run_dir is not None:
        return config
    if name is not None:
        return config.model_copy(update={"run_dir": f"runs/{name}"})
    number = 1
    while (path := Path("runs") / ("run" if number == 1 else f"run-{number}")).exists():
        number += 1
    return config.model_copy(update={"run_dir": str(path)})


def _written(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _watched(
    begin: Callable[[Listener, Callable[[], bool], Callable[[ColdStartProgress], None]], training.Run],
    asked: Callbacks,
    listener: Listener | None,
    should_stop: Callable[[], bool],
    progress: bool,
) -> Run:
    """Run with callbacks told and the progress shown; an interrupt stops it at the next safe point."""
    if listener is not None or not progress:
        told = asked if listener is None else Listeners(listener, asked)
        with _interrupts() as interrupted:
            return Run.of(begin(told, lambda: should_stop() or asked.asked or interrupted(), lambda _: None))
    with make_display() as display, _interrupts() as interrupted:
        stop = lambda: should_stop() or asked.asked or interrupted()  # noqa: E731
        run = Run.of(begin(Listeners(display, asked), stop, display.coldstart))
    if run.stopped is not None and asked.asked:
        display.say("a callback asked the run to stop")
    display.ended(run)
    return run


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Take the first Ctrl-C, or a notebook's stop button, as a request to stop without loss; a second ends at once."""
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
