"""Make the tasks of a run and check its prompts, so that a mistake is found before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from sapo.config import RunConfig
from sapo.conformance.objective_laws import Judgement, judge_objective
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.objectives import is_plugin
from sapo.rollout.curriculum import Curriculum, curricula
from sapo.rollout.prompting import PromptFormat, encode_by_task, formats_of
from sapo.tasks import Task, make_task
from sapo.utils.hashing import seed_for


@dataclass(frozen=True)
class TaskSet:
    """The tasks of a recipe.

    The order of training prompts depends on the run's seed. The held-out problems do not, so that runs of several seeds
    are evaluated on the same ones.
    """

    train: list[Task]
    held_out: list[Task]
    formats: dict[str, PromptFormat]
    """Prompt format of each task, by its name."""
    curricula: dict[str, Curriculum] = field(default_factory=dict)
    """Curriculum of each task that has one, by its name."""


def load_tasks(config: RunConfig) -> TaskSet:
    """Make the tasks of a recipe, which reads and checks their files.

    Raises:
        TaskError: a task or its rows are wrong.
        ConfigError: two tasks share a name, which would mix their metrics, or an endless task has a curriculum.
    """
    train = [make_task(t.name, seed=seed_for(config.seed, "tasks"), **t.options) for t in config.tasks]
    held_out = [make_task(t.name, seed=config.eval.seed, **t.options) for t in config.tasks]
    # Examples come from the held-out tasks, whose seed is not the run's, so that runs of all seeds show the same ones.
    seeds = {t.name: seed_for(config.seed, f"curriculum/{t.name}") for t in train}
    tasks = TaskSet(train, held_out, formats_of(config, held_out), curricula(config, train, seeds))
    names = [t.name for t in tasks.train]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tasks must have different names; got {name!r} twice; give one of them another label")
    return tasks


def check_objectives(config: RunConfig, on_judged: Callable[[Judgement], None] = lambda _: None) -> None:
    """Hold the conformance laws against the objectives of a recipe that are its user's own.

    Those are the one that is trained by and the counterfactual ones. Our tests hold the laws against ours.

    Args:
        on_judged: given the verdicts on each of them, before it is refused.

    Raises:
        ConfigError: one breaks a law that a run relies on.
    """
    named = [config.objective, *config.diagnostics.counterfactuals]
    own = {(c.name, repr(c.hyperparameters)): c for c in named if is_plugin(c.name)}
    for chosen in own.values():
        judged = judge_objective(chosen.name, chosen.hyperparameters)
        on_judged(judged)
        if judged.refusal is not None:
            raise ConfigError(judged.refusal)


def check_prompts(config: RunConfig, policy: Policy, tasks: TaskSet) -> None:
    """Encode the prompts of each task before anything is written: all rows of a finite one, one of an endless one.

    Raises:
        ModelError: the tokenizer cannot encode a prompt.
        ConfigError: a prompt leaves no room for a completion, or a stop token is not in the vocabulary.
    """
    vocabulary = policy.head_weight.shape[0]
    for token in config.rollout.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"rollout.stop_token_ids must lie in 0..{vocabulary - 1}; got {token}")
    room = config.rollout.max_new_tokens
    for train, held_out in zip(tasks.train, tasks.held_out, strict=True):
        rows = getattr(train, "num_train", 1)  # every row, so that a mistake in the last one is found now
        # One at a time, since a row may hold megabytes of tests. A benchmark without training rows refuses index 0.
        asked = (train.train_prompt(i) for i in range(max(rows, 1)))
        encoded = (encode_by_task(policy, tasks.formats, [train], [question]) for question in asked)
        problems = held_out.held_out(config.eval.problems)
        encoded_problems = (tasks.formats[train.name].encode(policy, [problem]) for problem in problems)
        for (prompt,) in itertools.chain(encoded, encoded_problems):
            if policy.max_length is not None and len(prompt.token_ids) + room > policy.max_length:
                raise ConfigError(
                    f"rollout.max_new_tokens must leave room for the prompt; got {room} with a prompt of "
                    f"{len(prompt.token_ids)} tokens ({prompt.text[:32]!r}) in a model of {policy.max_length}"
                )
