"""Make the tasks of a run and check its prompts, so that a mistake is found before anything is written."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

from sapo.config import RunConfig, TaskConfig
from sapo.conformance.objective_laws import Judgement, judge_objective
from sapo.data import Group, Status
from sapo.environments import is_environment
from sapo.errors import ConfigError, ModelError, RewardError
from sapo.model.policy import Policy
from sapo.objectives import is_plugin
from sapo.rollout.curriculum import Curriculum, curricula
from sapo.rollout.episodes.driver import check_environment, host_for
from sapo.rollout.episodes.joining import joiners_for
from sapo.rollout.prompting import PromptFormat, PromptLengths, apply_limit, formats_of
from sapo.tasks import DatasetTask, FileTask, RowTask, Task, TriedReward, failed_calls, make_task, try_reward
from sapo.tasks.episodes.origin import is_of_others, say_why_here
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
    for task in train:
        if is_environment(task):
            check_environment(task)
            if (host := host_for(task, config.rollout.turns)) is not None:
                host.ready()
            if config.model.routing_replay not in (False, "R2"):
                raise ConfigError(
                    f"routing replay of episodes records in the trainer; got {config.model.routing_replay} with "
                    f"environment {task.name!r}; set model.routing_replay=R2"
                )
    held_out = [_held_out_side(task, t, config.eval.seed) for task, t in zip(train, config.tasks, strict=True)]
    # Examples come from the held-out tasks, whose seed is not the run's, so that runs of all seeds show the same ones.
    seeds = {t.name: seed_for(config.seed, f"curriculum/{t.name}") for t in train}
    tasks = TaskSet(train, held_out, formats_of(config, held_out), curricula(config, train, seeds))
    names = [t.name for t in tasks.train]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"tasks must have different names; got {name!r} twice; give one of them another label")
    return tasks


def _held_out_side(train: Task, section: TaskConfig, seed: int) -> Task:
    """Return a task with the seed of evaluations; files are read once, for both sides."""
    if type(train) in (FileTask, DatasetTask):
        return cast(RowTask, train).with_seed(seed)
    return make_task(section.name, seed=seed, **section.options)


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


def try_rewards(tasks: TaskSet) -> tuple[TriedReward, ...]:
    """Call each reward function of the user's own once, on a made completion.

    Raises:
        TaskError: one of them fails.
    """
    tried = [try_reward(task) for task in tasks.train]
    return tuple(one for one in tried if one is not None)


def check_rewards(groups: Sequence[Group], step: int, warn: Callable[[str, str], None]) -> None:
    """Warn of calls of a verifier that failed in a step, with the first exception's text and their number.

    Args:
        groups: what the step has sampled.
        step: number of the step, from 1.
        warn: given the cause and the text.

    Raises:
        RewardError: all of them failed, so that every reward is 0 and says nothing.
    """
    failed = failed_calls(completion for group in groups for completion in group.completions)
    if failed is None:
        return
    if failed.failed == failed.called:
        raise RewardError(
            f"step {step}: {failed.sentence}; nothing was updated; mend the verifier, then `sapo resume` the run"
        )
    warn("verifier_failed", failed.sentence)


def check_episodes(groups: Sequence[Group], step: int, most: float, environments: Collection[str]) -> str | None:
    """Return a sentence on the environments that failed in a step, or None where none did.

    It has the most frequent failure and says where to find the first of it.

    Args:
        groups: what the step has sampled.
        step: number of the step, from 1.
        most: largest share of episodes that may fail.
        environments: names of the tasks that are played in episodes.

    Raises:
        RewardError: more of them failed.
    """
    episodes = [
        (g.prompt, sample, c.score)
        for g in groups
        if g.prompt.task in environments
        for sample, c in enumerate(g.completions)
    ]
    failed = [played for played in episodes if played[2].status is Status.ENVIRONMENT_ERROR]
    if not failed:
        return None
    reasons = Counter(score.detail.partition(", after turn")[0] for *_, score in failed)
    reason, count = reasons.most_common(1)[0]
    prompt, sample, score = next(f for f in failed if f[2].detail.startswith(reason))
    sentence = (
        f"environments failed in {len(failed)} of {len(episodes)} episodes, {count} times with {score.detail} "
        f"(first: task {prompt.task}, prompt {prompt.id}, sample {sample})"
    )
    if len(failed) > most * len(episodes):
        raise RewardError(
            f"step {step}: {sentence}; nothing was updated; mend the environment, then `sapo resume` the run, or give "
            "it rollout.turns.max_environment_errors=... to allow more"
        )
    return sentence


def limit_prompts(policy: Policy, tasks: TaskSet) -> None:
    """Leave out the rows with longer prompts than their task allows (max_prompt_tokens), or refuse the first of them.

    Raises:
        TaskError: a row is refused, or none are left.
    """
    for task in (*tasks.train, *tasks.held_out):
        apply_limit(policy, task, tasks.formats[task.name])


def check_prompts(config: RunConfig, policy: Policy, tasks: TaskSet) -> None:
    """Check the prompts of each task before anything is written: all rows of a finite one, one of an endless one.

    Those are encoded whose length or characters might be a problem.

    Raises:
        ModelError: the tokenizer cannot encode a prompt.
        ConfigError: a prompt leaves no room for a completion, or a stop token is not in the vocabulary.
    """
    vocabulary = policy.head_weight.shape[0]
    eos = policy.tokenizer.eos_token_id
    if eos is not None and eos >= vocabulary:
        raise ModelError(
            f"the end token must be one that the model can draw; got {policy.tokenizer.eos_token!r}, token {eos} of "
            f"{vocabulary}; resize the embedding (resize_token_embeddings), or use the model's own tokenizer"
        )
    if not any(token < vocabulary for token in policy.stop_token_ids):
        raise ModelError(
            f"an end token must be one that the model can draw; got {sorted(policy.stop_token_ids)} of {vocabulary}; "
            "set eos_token_id in its generation_config.json"
        )
    for token in config.rollout.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"rollout.stop_token_ids must lie in 0..{vocabulary - 1}; got {token}")
        if token in policy.unused_tokens:
            raise ConfigError(
                f"rollout.stop_token_ids must be tokens of the tokenizer, since others are never drawn; got {token}; "
                "leave it out"
            )
    room, longest = config.rollout.max_new_tokens, policy.max_length
    within = None if longest is None else longest - room
    for train, held_out in zip(tasks.train, tasks.held_out, strict=True):
        lengths = PromptLengths(policy, tasks.formats[train.name])
        rows = getattr(train, "num_train", 1)  # every row, so that a mistake in the last one is found now
        # One at a time, since a row may hold megabytes of tests. A benchmark without training rows refuses index 0.
        asked = (train.train_prompt(i) for i in range(max(rows, 1)))
        for prompt in itertools.chain(asked, held_out.held_out(config.eval.problems)):
            tokens = lengths.count(prompt, within)
            if within is not None and tokens > within:
                raise ConfigError(
                    f"rollout.max_new_tokens must leave room for the prompt; got {room} with a prompt of "
                    f"{tokens} tokens ({prompt.text[:32]!r}) in a model of {longest}"
                )


def prompt_warnings(config: RunConfig, policy: Policy, tasks: TaskSet) -> list[str]:
    """Return sentences on prompts that are no mistake and rarely meant.

    They are of chats whose end of turn ends no completion, of templates that would change earlier turns, and of
    environments that are not played in processes of their own.

    Raises:
        ModelError: an environment's prompts are chats, and the template has no proven way from turn to turn.
    """
    bridges = [
        f"task {task.name}: {notice}"
        for task in tasks.held_out
        if is_environment(task)
        for joiner in joiners_for(policy, task, tasks.formats[task.name], task.train_prompt(0)).values()
        for notice in getattr(joiner, "notices", ())
    ]
    return bridges + _ends_of_turns(config, policy, tasks) + _played_here(config, tasks)


def _played_here(config: RunConfig, tasks: TaskSet) -> list[str]:
    """Say which environments of a user's own play in this process although the recipe would have it otherwise."""
    return [
        f"environment {task.name!r} {say_why_here(task)} and plays in the process that draws: where it blocks, all "
        "episodes wait, and where it crashes the run ends; named as module:Class it would play in processes of its own"
        for task in tasks.train
        if config.rollout.turns.play_in == "process" and is_environment(task) and is_of_others(task)
        if host_for(task, config.rollout.turns) is None
    ]


def _ends_of_turns(config: RunConfig, policy: Policy, tasks: TaskSet) -> list[str]:
    end = policy.end_of_turn()
    stops = policy.stop_token_ids | set(config.rollout.stop_token_ids)
    chats = [
        task.name
        for task in tasks.train
        if (form := tasks.formats[task.name]).style == "chat" or (form.style == "auto" and form.prefers_chat)
        if end is not None and end[0] not in stops and not any(string in end[1] for string in form.stop)
    ]
    if end is None or not chats:
        return []
    return [
        f"the chat template ends a turn with {end[1]!r} (token {end[0]}), and it ends no completion of "
        f"{', '.join(chats)}: completions go on to max_new_tokens; set rollout.stop_token_ids=[{end[0]}]"
    ]
