"""`sapo.evaluate`: a model, a run or a model object on a task, rows in memory, or the tasks of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapo.config import PromptConfig, RunConfig, TaskConfig
from sapo.config.rollout import TurnsConfig
from sapo.errors import ConfigError
from sapo.evaluation import Evaluation
from sapo.front.given.models import save_model
from sapo.front.settings import refuse_unknown
from sapo.front.train import make_tasks, verifier_settings
from sapo.model.policy import Policy
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.run.directory import RunDirectory
from sapo.run.models import run_of
from sapo.tasks import Task, make_task
from sapo.workflows import train as training
from sapo.workflows.evaluate import EvaluatedModel, EvaluationSettings, PlannedEvaluation


def evaluate(
    model: Any,
    task: Any = None,
    *,
    rows: Any = None,
    rewards: Any = None,
    problems: int | None = None,
    samples: int = 4,
    ks: tuple[int, ...] = (1,),
    threshold: float = 1.0,
    greedy: bool = False,
    constant: bool = False,
    params: SamplingParams | None = None,
    max_new_tokens: int | None = None,
    prompt_format: PromptFormat | PromptConfig | None = None,
    turns: TurnsConfig | None = None,
    engine: str = "local",
    dtype: str | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **unknown: Any,
) -> Evaluation:
    """Evaluate a model on held-out problems.

    Args:
        model: what `sapo.train` returned, a run directory, a model directory, a hub id, a pair (model, tokenizer) of
            transformers, or a Policy.
        task: a task's name, its settings, or a Task; the first task of a run when None.
        rows: in place of a task: all of them are asked. See `sapo.train`.
        rewards: in place of the task's verifier. See `sapo.train`.
        problems: how many; all there are, when there are fewer. None: all rows, or 256 of a task that generates them.
        samples: n, completions of each problem.
        ks: which pass@k to estimate, each at most `samples`.
        threshold: smallest reward that counts as correct.
        greedy: draw one more completion of each problem, at temperature 0.
        constant: judge the best constant answer as well.
        params: of sampling; temperature 1 and `max_new_tokens` when None. The model's own stop tokens are added.
        max_new_tokens: longest completion in tokens; that of the run, else 64, when None.
        prompt_format: format of the questions; that of the run, else as they are, when None.
        turns: limits of the episodes of an environment, and where they play; those of the run, else the defaults, when
            None.
        engine: the engine that draws, as `rollout.engine` names it.
        dtype: float32 or bfloat16; that of the run, else float32, when None.
        device: auto, cpu, cuda or cuda:N.
        out: a directory to keep it in, so that a killed evaluation can be resumed; at the end it has results.json,
            completions.jsonl and index.html.
        should_stop: asked between chunks of problems.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be done as asked, or an argument is unknown.
        Interrupted: `should_stop` returned true; what is in `out` is kept.
    """
    refuse_unknown(unknown, evaluate)
    model = as_model(model)
    config = _config_of(model)
    section = None if config is None else config.tasks[0]
    if rows is None and task is None and section is None:
        raise ConfigError(
            "sapo.evaluate needs something to evaluate on; got a model alone; task='gsm8k' names a task, rows=[{...}] "
            "gives rows"
        )
    chosen = _task(task, rows, rewards, section, 0 if config is None else config.eval.seed)
    if max_new_tokens is None:
        max_new_tokens = 64 if config is None else config.rollout.max_new_tokens
    if prompt_format is None and config is not None:
        prompt_format = (section.prompt if task is None and rows is None and section else None) or config.prompt
    if turns is None:
        turns = TurnsConfig() if config is None else config.rollout.turns
    settings = EvaluationSettings(
        problems=problems,
        samples=samples,
        ks=tuple(ks),
        threshold=threshold,
        greedy=greedy,
        constant=constant,
        engine=engine,
        params=params or SamplingParams(max_new_tokens=max_new_tokens),
        turns=turns,
    )
    if not isinstance(prompt_format, PromptFormat):
        prompt_format = PromptFormat.of(prompt_format or PromptConfig(), chosen)
    subject = EvaluatedModel.load(model, dtype, device)
    planned = PlannedEvaluation(chosen, prompt_format, settings, {"name": chosen.name})
    return planned.run(subject, out=out, should_stop=should_stop).evaluation


def as_model(model: Any) -> str | Path | Policy:
    """Return a model as the workflows take it: a directory, a hub id or a policy.

    Raises:
        ModelError: an object that is no model.
    """
    if isinstance(model, training.Run):
        return model.directory
    if isinstance(model, str | Path | Policy):
        return model
    return save_model(model)[0]


def _config_of(model: str | Path | Policy) -> RunConfig | None:
    if isinstance(model, Policy):
        return None
    run = run_of(Path(model))
    return None if run is None else RunDirectory.read_config(run)


def _task(task: Any, rows: Any, rewards: Any, section: TaskConfig | None, seed: int) -> Task:
    """Make the task to evaluate on; of rows, all are asked."""
    judged = {} if rewards is None else {"verifier": verifier_settings(rewards)}
    if isinstance(task, Task) and rows is None and not judged:
        return task
    if task is None and rows is None and section is not None:
        return make_task(section.name, seed=seed, **{**section.options, **judged})
    made = make_tasks(task, rows, judged, all_held_out=True)
    if made is None or len(made) != 1:
        raise ConfigError(f"sapo.evaluate takes one task; got {0 if made is None else len(made)}; call it for each")
    settings = {**made[0], **judged}
    checked = TaskConfig.model_validate(settings)
    return make_task(checked.name, seed=seed, **checked.options)
