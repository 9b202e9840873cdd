"""The evaluations that `sapo eval` was asked for: tasks by name with their settings, or the tasks of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sapo.config import PromptConfig, TaskConfig
from sapo.config.recipes import parse_override, parse_prompt, parse_turns
from sapo.config.rollout import TurnsConfig
from sapo.data import Prompt
from sapo.environments.base import is_environment
from sapo.errors import ConfigError, TaskError
from sapo.evaluation.store import difference
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.run.directory import RunDirectory
from sapo.run.models import run_of
from sapo.tasks import TASKS, make_task
from sapo.tasks.rows.datasets import HELD_OUT_SIDES, DatasetTask
from sapo.tasks.rows.reading import is_rows_file
from sapo.tasks.rows.task import FileTask
from sapo.utils.hashing import seed_for
from sapo.utils.names import did_you_mean
from sapo.utils.text import first_line
from sapo.workflows.evaluate import EvaluatedModel, EvaluationSettings, PlannedEvaluation

# The default of eval.seed, so that runs and `sapo eval` draw the same problems.
DEFAULT_SEED = 12345

# Settings that are text. On a command line they are taken literally: YAML would parse the colon and braces of
# "Q: {prompt}", and "####" as a comment.
_TEXTS = ("prompt.system", "prompt.template", "prompt.answer_template", "template", "answer_after")


def plan_evaluations(
    model: Path,
    tasks: Sequence[str],
    overrides: Sequence[str],
    *,
    seed: int | None = None,
    threshold: float = 1.0,
    **given: Any,
) -> list[PlannedEvaluation]:
    """Plan what a command asks for: the tasks named, or a run's own, each made and checked.

    Args:
        model: the model; a run directory, or a checkpoint in one, brings tasks where none are named.
        tasks: names of TASKS, files, or labels of the run's tasks, which are then planned as the run evaluates them.
        overrides: `key=value`; keys under `prompt.` set the format of the questions, those under `turns.` the limits of
            episodes (`rollout.turns`), others the tasks' own settings. A run's limits hold where they change none.
        seed: seed of the draws and of the choice of problems, as a run's eval.seed is.
        given: fields of EvaluationSettings and SamplingParams; None leaves the run's own value. Without a run the
            defaults are used, and the best constant answer is judged.

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    given = {name: value for name, value in given.items() if value is not None} | {"threshold": threshold}
    run = run_of(model)
    if tasks:
        changes, others = split_turns(overrides)
        own_seed = DEFAULT_SEED if seed is None else seed
        settings = make_settings(
            {"constant": True, "turns": changed_turns(turns_of(model), changes)},
            {"seed": seed_for(own_seed, "evaluation"), "max_new_tokens": 64},
            given,
        )
        planned = []
        for name in tasks:
            place = place_of_label(run, name)
            if run is not None and place is not None:
                planned += plan_run_evaluations(run, others, given, seed, [place], changes)
            else:
                planned.append(plan_task_evaluation(name, others, settings, own_seed))
        refuse_turns_of_no_environment(planned, changes)
        return planned
    if run is None:
        raise ConfigError(f"{model} is not a run directory, so it has no tasks of its own; name one with --task")
    return plan_run_evaluations(run, overrides, given, seed)


def turns_of(model: Path | None) -> TurnsConfig:
    """Return a run's limits of episodes, or the defaults for what is no run."""
    run = None if model is None else run_of(model)
    return TurnsConfig() if run is None else RunDirectory.read_config(run).rollout.turns


def place_of_label(run: Path | None, name: str) -> int | None:
    """Return the place of the run's task of that label, or of that name where it has no label; None of a name that
    stands for a task by itself.

    Raises:
        ConfigError: it is neither, with the labels that the run has.
    """
    tasks = [] if run is None else RunDirectory.read_config(run).tasks
    written = [task.label for task in tasks]
    if name in written:
        return written.index(name)
    if run is None or name in TASKS or ":" in name or is_rows_file(name):
        return None
    labels: list[str] = []
    unmade: list[str] = []
    for task in tasks:
        try:
            labels.append(own_name(task))
        except (ConfigError, TaskError) as error:  # rows that are gone, perhaps not those of the task that is asked for
            labels.append(task.name)
            unmade.append(f"; its task {task.name} cannot be made: {first_line(error)}")
    if name in labels:
        return labels.index(name)
    raise ConfigError(
        f"--task must be a task of the run, one of sapo.tasks.TASKS or a file of rows; got {name!r}"
        f"{did_you_mean(name, labels)}; the run has {', '.join(labels)}{''.join(unmade)}"
    )


def own_name(task: TaskConfig) -> str:
    """Return the name of a run's task in logs and metrics: its label, or what it is called by itself."""
    return task.label or make_task(task.name, seed=0, **task.options).name


def plan_task_evaluation(
    name: str, overrides: Sequence[str], settings: EvaluationSettings, seed: int = DEFAULT_SEED
) -> PlannedEvaluation:
    """Plan the evaluation of a task by its name, or of a file, with its settings and those of its prompts.

    Rows are all evaluated, unless the settings say which are held out: a held-out share is for training.

    >>> overrides = ["digits=2", "prompt.template={prompt} Answer:"]
    >>> planned = plan_task_evaluation("arithmetic", overrides, EvaluationSettings())
    >>> planned.task.name, planned.prompt_format.template
    ('add2', '{prompt} Answer:')

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    options, prompt = split_overrides(overrides)
    kind, options = named_task(name, options)
    return plan_options(kind, options, seed, parse_prompt(prompt), settings)


def named_task(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the kind and the options of a task that is named by its kind, or by a file of rows.

    All rows are held out where the options do not say which are.

    >>> named_task("sums.jsonl", {"verifier": "last_number"})
    ('file', {'path': 'sums.jsonl', 'verifier': 'last_number', 'held_out_fraction': 1})
    """
    if is_rows_file(name):
        name, options = "file", {"path": name, **options}
    return name, _with_all_rows(name, options)


def plan_run_evaluations(
    run: Path,
    overrides: Sequence[str],
    given: Mapping[str, Any],
    seed: int | None = None,
    places: Sequence[int] | None = None,
    turns: Mapping[str, Any] | None = None,
) -> list[PlannedEvaluation]:
    """Plan the tasks of a run as it evaluates them itself, except for what is given.

    Args:
        overrides: `key=value`, with keys under `prompt.` and `turns.` alone.
        turns: limits of episodes that the caller has taken out of them, and checks.
        places: of the tasks that are planned, in the recipe; None plans all.

    Raises:
        ConfigError, TaskError: no run, or an override of a task's own settings.
    """
    config = RunDirectory.read_config(run)
    changes, others = split_turns(overrides)
    turns = changes if turns is None else turns
    options, prompt = split_overrides(others)
    if options:
        named = "the task" if places is None else f"its kind, {config.tasks[places[0]].name},"
        raise ConfigError(
            f"the settings of a run's tasks are in its config.yaml; got {next(iter(options))}=...; name {named} with "
            "--task to evaluate it otherwise, or change prompt.* and turns.* only"
        )
    asked, rollout = config.eval, config.rollout
    seed = asked.seed if seed is None else seed
    sampling = {
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature if asked.temperature is None else asked.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "min_p": rollout.min_p,
        "seed": seed_for(seed, "evaluation"),
        "stop_token_ids": frozenset(rollout.stop_token_ids),
    }
    # With fewer samples than the run drew, only its k up to that number can be estimated.
    ks = tuple(k for k in asked.k if k <= given.get("samples", asked.samples)) or (1,)
    own = {
        "problems": asked.problems,
        "samples": asked.samples,
        "ks": ks,
        "engine": rollout.engine,
        "turns": changed_turns(rollout.turns, turns),
    }
    settings = make_settings({**own, "greedy": asked.greedy, "constant": asked.constant}, sampling, given)
    planned = [
        plan_options(
            t.name,
            t.options,
            seed,
            parse_prompt({**(t.prompt or config.prompt).model_dump(), **prompt}),
            settings,
        )
        for t in (config.tasks if places is None else [config.tasks[place] for place in places])
    ]
    refuse_turns_of_no_environment(planned, changes)
    return planned


def changed_turns(own: TurnsConfig, changes: Mapping[str, Any]) -> TurnsConfig:
    return parse_turns({**own.model_dump(), **changes}) if changes else own


def refuse_turns_of_no_environment(planned: Sequence[PlannedEvaluation], changes: Mapping[str, Any]) -> None:
    if changes and not any(is_environment(each.task) for each in planned):
        raise ConfigError(
            f"turns.* are limits of environments; got turns.{next(iter(changes))} for {planned[0].task.name}, which is "
            "answered in one turn; leave it out"
        )


def _with_all_rows(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task, with all rows held out where it has rows and the options do not say which are."""
    share = TASKS.get(name) in (FileTask, DatasetTask) and all(options.get(side) is None for side in HELD_OUT_SIDES)
    return {**options, "held_out_fraction": 1} if share else dict(options)


def plan_options(
    kind: str, options: Mapping[str, Any], seed: int, prompt: PromptConfig, settings: EvaluationSettings
) -> PlannedEvaluation:
    """Plan the evaluation of a task whose settings and prompt format are known.

    Raises:
        ConfigError, TaskError: what is wrong with them.
    """
    task = make_task(kind, seed=seed, **options)
    about = {"name": task.name, "kind": kind, "options": dict(options), "seed": seed}
    return PlannedEvaluation(task, PromptFormat.of(prompt, task), settings, about)


def make_settings(own: Mapping[str, Any], sampling: Mapping[str, Any], given: Mapping[str, Any]) -> EvaluationSettings:
    """Make the settings from their defaults and from what is given for them or for SamplingParams."""
    names = {f.name for f in fields(SamplingParams)}
    try:
        params = SamplingParams(**{**sampling, **{k: v for k, v in given.items() if k in names}})
    except ValueError as error:
        name, _, rule = str(error).partition(" ")
        raise ConfigError(f"--{name.replace('_', '-')} {rule}") from error
    return EvaluationSettings(**{**own, **{k: v for k, v in given.items() if k not in names}}, params=params)


def split_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split overrides into the settings of a task and those of its prompts (`prompt.`), the latter without the prefix.

    >>> split_overrides(["path=sums.jsonl", "prompt.style=chat", "prompt.thinking=true", 'prompt.stop=["\\\\n"]'])
    ({'path': 'sums.jsonl'}, {'style': 'chat', 'thinking': True, 'stop': ['\\n']})
    """
    options: dict[str, Any] = {}
    prompt: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if key in _TEXTS and separator and not text.startswith(('"', "'")) and text != "null":
            value: Any = text.replace("\\n", "\n").replace("\\t", "\t")
        else:
            key, value = parse_override(override)
        if key.startswith("prompt."):
            prompt[key.removeprefix("prompt.")] = value
        else:
            options[key] = value
    return options, prompt


def split_turns(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the limits of episodes out of overrides; return them by name, and the other overrides.

    >>> split_turns(["turns.max=3", "rollout.turns.env=[MY_KEY]", "digits=2"])
    ({'max': 3, 'env': ['MY_KEY']}, ['digits=2'])
    """
    turns: dict[str, Any] = {}
    others = []
    for override in overrides:
        name = override.removeprefix("rollout.")
        if name.startswith("turns."):
            key, value = parse_override(name)
            turns[key.removeprefix("turns.")] = value
        else:
            others.append(override)
    return turns, others


def output_directory(
    model: Path,
    subject: EvaluatedModel,
    planned: PlannedEvaluation,
    prompts: Sequence[Prompt],
    out: Path | None,
    *,
    alone: bool,
) -> tuple[Path, str | None]:
    """Choose the directory of an evaluation of `prompts`, which `planned.ask` made; return it with a note on the
    choice.

    `out` is the user's choice; several tasks have a directory each below it. Without it the directory is
    evals/MODEL-TASK or, where that holds another evaluation, the first of -2, -3, ... that does not.
    """
    task = re.sub(r"[^\w.-]+", "_", planned.task.name)
    if out is not None:
        return (out if alone else out / task), None
    name = evaluated_name(model)
    first = Path("evals") / f"{name}-{task}"
    asked = planned.asked(subject, prompts)
    candidate, number, reason = first, 1, None
    while (found := difference(candidate, asked)) is not None:
        reason = reason or f"{first} holds {found}"
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate, reason and f"{reason}; this one is written to {candidate}"


def evaluated_name(model: Path) -> str:
    """Return the name of a model in that of a directory: its own, behind its run's where it is a checkpoint."""
    run, name = run_of(model), model.resolve().name
    return name if run is None or run.resolve() == model.resolve() else f"{run.resolve().name}-{name}"
