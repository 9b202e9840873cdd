"""The evaluations that `sapo eval` was asked for: tasks by name with their settings, or the tasks of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sapo.config import PromptConfig
from sapo.config.recipes import parse_override, parse_prompt
from sapo.data import Prompt
from sapo.errors import ConfigError
from sapo.evaluation.store import difference
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.run.directory import RunDirectory
from sapo.run.models import run_of
from sapo.tasks import make_task
from sapo.tasks.rows.reading import EXTENSIONS
from sapo.utils.hashing import seed_for
from sapo.workflows.evaluate import EvaluatedModel, EvaluationSettings, PlannedEvaluation

# The default of eval.seed, so that runs and `sapo eval` draw the same problems.
DEFAULT_SEED = 12345

# Settings of a prompt that are text. On a command line they are taken literally: YAML would parse the colon and braces
# of "Q: {prompt}".
_TEXTS = ("prompt.system", "prompt.template", "prompt.answer_template")


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
        tasks: names of TASKS, or files.
        overrides: `key=value`; keys under `prompt.` set the format of the questions, others the tasks' own settings.
        seed: seed of the draws and of the choice of problems, as a run's eval.seed is.
        given: fields of EvaluationSettings and SamplingParams; None leaves the run's own value. Without a run the
            defaults are used, and the best constant answer is judged.

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    given = {name: value for name, value in given.items() if value is not None} | {"threshold": threshold}
    if tasks:
        seed = DEFAULT_SEED if seed is None else seed
        settings = _settings({"constant": True}, {"seed": seed_for(seed, "evaluation"), "max_new_tokens": 64}, given)
        return [plan_task_evaluation(name, overrides, settings, seed) for name in tasks]
    run = run_of(model)
    if run is None:
        raise ConfigError(f"{model} is not a run directory, so it has no tasks of its own; name one with --task")
    return plan_run_evaluations(run, overrides, given, seed)


def plan_task_evaluation(
    name: str, overrides: Sequence[str], settings: EvaluationSettings, seed: int = DEFAULT_SEED
) -> PlannedEvaluation:
    """Plan the evaluation of a task by its name, or of a file, with its settings and those of its prompts.

    >>> overrides = ["digits=2", "prompt.template={prompt} Answer:"]
    >>> planned = plan_task_evaluation("arithmetic", overrides, EvaluationSettings())
    >>> planned.task.name, planned.prompt_format.template
    ('add2', '{prompt} Answer:')

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    options, prompt = split_overrides(overrides)
    if Path(name).suffix in EXTENSIONS:
        name, options = "file", {"path": name, **options}
    return _plan(name, options, seed, parse_prompt(prompt), settings)


def plan_run_evaluations(
    run: Path, overrides: Sequence[str], given: Mapping[str, Any], seed: int | None = None
) -> list[PlannedEvaluation]:
    """Plan the tasks of a run as it evaluates them itself, except for what is given.

    Raises:
        ConfigError, TaskError: no run, or an override of a task's own settings.
    """
    config = RunDirectory.read_config(run)
    options, prompt = split_overrides(overrides)
    if options:
        raise ConfigError(
            f"the settings of a run's tasks are in its config.yaml; got {next(iter(options))}=...; name the task with "
            "--task to evaluate it otherwise, or change prompt.* only"
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
    own = {"problems": asked.problems, "samples": asked.samples, "ks": ks, "engine": rollout.engine}
    settings = _settings({**own, "greedy": asked.greedy, "constant": asked.constant}, sampling, given)
    return [
        _plan(
            t.name,
            t.options,
            seed,
            parse_prompt({**(t.prompt or config.prompt).model_dump(), **prompt}),
            settings,
        )
        for t in config.tasks
    ]


def _plan(
    kind: str, options: Mapping[str, Any], seed: int, prompt: PromptConfig, settings: EvaluationSettings
) -> PlannedEvaluation:
    task = make_task(kind, seed=seed, **options)
    about = {"name": task.name, "kind": kind, "options": dict(options), "seed": seed}
    return PlannedEvaluation(task, PromptFormat.of(prompt, task), settings, about)


def _settings(own: Mapping[str, Any], sampling: Mapping[str, Any], given: Mapping[str, Any]) -> EvaluationSettings:
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
    run = run_of(model)
    name = model.resolve().name
    if run is not None and run.resolve() != model.resolve():
        name = f"{run.resolve().name}-{name}"
    first = Path("evals") / f"{name}-{task}"
    asked = planned.asked(subject, prompts)
    candidate, number, reason = first, 1, None
    while (found := difference(candidate, asked)) is not None:
        reason = reason or f"{first} holds {found}"
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate, reason and f"{reason}; this one is written to {candidate}"
