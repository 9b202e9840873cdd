"""Collect a rollout batch: draw prompts, have the engine complete them, score, and choose the groups to train on.

This is the first half of a step. It needs no trainer: the weights come as a stream, and log pi_old is taken elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from sapo.config import RunConfig
from sapo.data import Completion, Group, Prompt
from sapo.environments import is_environment
from sapo.model.policy import Policy
from sapo.rollout.curriculum import Curriculum
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request, Weights
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import Joiner, joiners_for
from sapo.rollout.episodes.live import Play
from sapo.rollout.episodes.reply_times import ReplyTimes
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat, encode_by_task
from sapo.rollout.selection import Position, Selection, Selector
from sapo.rollout.shaping import has_turn_rewards, require_token_advantages, shape_group
from sapo.rollout.weights import loaded
from sapo.tasks import Task, score_groups
from sapo.utils.hashing import seed_for
from sapo.utils.machine import give_back_freed_memory

Phase = Callable[[str], AbstractContextManager[object]]
"""Times what is done within it under a name."""


class Collector:
    """Turns prompts into scored groups with advantages, a batch at a time.

    Args:
        config: `rollout`, `objective.advantage`, `seed` and the tasks' weights are used.
        policy: its tokenizer encodes the prompts.
        engine: draws the completions.
        tasks: training sides, in the order of the recipe.
        formats: how the questions of each task are put, by its name.
        curricula: which rows are asked less, by name of the task.
        phase: times "generate" and "score".
        should_stop: asked by the engine between two tokens.
        times: gets the times of environments.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        engine: Engine,
        tasks: Sequence[Task],
        formats: Mapping[str, PromptFormat],
        curricula: Mapping[str, Curriculum],
        phase: Phase = nullcontext,
        should_stop: Callable[[], bool] = lambda: False,
        times: ReplyTimes | None = None,
    ) -> None:
        self.config = config
        self._times = times
        self.policy = policy
        self.engine = engine
        self.formats = formats
        self.params = SamplingParams.of(config.rollout, seed_for(config.seed, "rollout"), policy.stop_token_ids)
        self.selector = Selector(tasks, [t.weight for t in config.tasks], config.rollout, curricula)
        self._task: dict[str, Any] = {task.name: task for task in tasks}
        self._joiners: dict[str, dict[str, Joiner]] = {}
        random = config.experiments.rewards == "random"
        self._coins = seed_for(config.seed, "random_rewards") if random else None
        self._phase = phase
        self._should_stop = should_stop

    def collect(
        self, batch: int, position: Position, weights: Weights, version: int, record_experts: bool = False
    ) -> Selection:
        """Collect one batch, refills included, all of it drawn from the same weights.

        Args:
            batch: its number, 0, 1, ..., which decides its prompts and its noise.
            position: where its prompts begin.
            weights: to draw from.
            version: updates made by them.
            record_experts: groups carry the experts that the engine went through (routing replay R3).

        Raises:
            ConfigError: the engine gave something other than it was asked for; see `draw`.
            Interrupted: when `should_stop` says so. Nothing has changed, and the batch comes out the same later.
        """
        with ExitStack() as stack:
            with self._phase("generate"):
                stack.enter_context(loaded(self.engine, weights, version))
            return self.selector.select(batch, position, lambda prompts: self._groups(prompts, record_experts))

    def groups(self, prompts: Sequence[Prompt], record_experts: bool = False) -> list[Group]:
        """Draw and score a group for each prompt, from the weights that the engine holds; see `collect`.

        Completions carry the versions of the weights that drew them: the engine's own account, or its `version`.
        """
        return [_with_versions(g, self.engine.version) for g in self._groups(prompts, record_experts)]

    def first_prompts(self, batch: int, position: Position) -> list[Prompt]:
        """Return the prompts that a batch draws first, encoded."""
        return self._encoded(self.selector.first_prompts(batch, position))

    def probe(self, prompts: Sequence[Prompt], weights: Weights, version: int) -> list[Group]:
        """Draw completions of encoded prompts from whole distributions, for a comparison of log-probabilities.

        They are neither scored nor trained on.
        """
        params = replace(self.params, top_p=1.0, top_k=0, min_p=0.0)
        requests = [Request(prompt, self.config.rollout.samples_per_prompt) for prompt in prompts]
        with loaded(self.engine, weights, version):
            drawn = draw(self.engine, requests, params, self._should_stop)
        return [
            Group(prompt, completions, advantages=(0.0,) * len(completions))
            for prompt, completions in zip(prompts, drawn, strict=True)
        ]

    def _encoded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return encode_by_task(self.policy, self.formats, self._task.values(), prompts)

    def _groups(self, prompts: Sequence[Prompt], record_experts: bool) -> list[Group]:
        experts = ExpertLog() if record_experts else None
        with self._phase("generate"):
            give_back_freed_memory()
            prompts = self._encoded(prompts)
            played = [i for i, p in enumerate(prompts) if is_environment(self._task[p.task])]
            asked = [p for p in prompts if not is_environment(self._task[p.task])]
            requests = [Request(p, self.config.rollout.samples_per_prompt) for p in asked]
            drawn = draw(self.engine, requests, self.params, self._should_stop, experts) if asked else []
            episodes = self._play([prompts[i] for i in played])
        with self._phase("score"):
            scored = iter(score_groups([(self._task[p.task], p, c) for p, c in zip(asked, drawn, strict=True)]))
            by_place = dict(zip(played, episodes, strict=True))
            completions = [by_place[i] if i in by_place else next(scored) for i in range(len(prompts))]
            groups = self._shaped(prompts, completions)
            return groups if experts is None else experts.attach(groups)

    def _play(self, prompts: Sequence[Prompt]) -> list[tuple[Completion, ...]]:
        """Play the episodes of environments, which score themselves."""
        if not prompts:
            return []
        for prompt in prompts:
            if prompt.task not in self._joiners:
                task, form = self._task[prompt.task], self.formats[prompt.task]
                self._joiners[prompt.task] = joiners_for(self.policy, task, form, prompt)
        joiners = {name: joiner for found in self._joiners.values() for name, joiner in found.items()}
        driver = EpisodeDriver(
            *(self.policy, self.engine, self.params, self.config.rollout.turns, joiners, self._should_stop),
            times=self._times,
        )
        samples = self.config.rollout.samples_per_prompt
        return driver.play([Play(self._task[p.task], p, samples) for p in prompts])

    def _shaped(self, prompts: Sequence[Prompt], scored: Sequence[Sequence[Completion]]) -> list[Group]:
        """Give scored completions their advantages.

        Raises:
            ConfigError: turns are to have advantages of their own, and the objective takes one for a whole sequence.
        """
        rollout, advantage = self.config.rollout, self.config.objective.advantage
        for prompt, completions in zip(prompts, scored, strict=True):
            if self._coins is None and has_turn_rewards(completions, rollout):
                require_token_advantages(self.config.objective.make(), f"task {prompt.task!r}")
                break
        return [shape_group(p, c, rollout, advantage, self._coins) for p, c in zip(prompts, scored, strict=True)]


def _with_versions(group: Group, version: int) -> Group:
    """Return the group with a version for every token, this one where its completions name none."""
    completions = (c if c.versions else replace(c, versions=((len(c), version),)) for c in group.completions)
    return replace(group, completions=tuple(completions))
