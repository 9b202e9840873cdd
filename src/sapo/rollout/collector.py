"""Collect a rollout batch: draw prompts, have the engine complete them, score, and choose the groups to train on.

This is the first half of a step. It needs no trainer: the weights come as a stream, and log pi_old is taken elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

from sapo.config import RunConfig
from sapo.data import Completion, Group, Prompt
from sapo.model.policy import Policy
from sapo.rollout.curriculum import Curriculum
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request, Weights
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat, encode_by_task
from sapo.rollout.selection import Position, Selection, Selector
from sapo.rollout.shaping import shape_group
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
    ) -> None:
        self.config = config
        self.policy = policy
        self.engine = engine
        self.formats = formats
        self.params = SamplingParams.of(config.rollout, seed_for(config.seed, "rollout"), policy.stop_token_ids)
        self.selector = Selector(tasks, [t.weight for t in config.tasks], config.rollout, curricula)
        self._task = {task.name: task for task in tasks}
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

    def probe(self, like: Sequence[Group], weights: Weights, version: int) -> list[Group]:
        """Draw completions of the same prompts from whole distributions, for a comparison of log-probabilities.

        They are neither scored nor trained on.
        """
        params = replace(self.params, top_p=1.0, top_k=0, min_p=0.0)
        requests = [Request(group.prompt, len(group.completions)) for group in like]
        with loaded(self.engine, weights, version):
            drawn = draw(self.engine, requests, params, self._should_stop)
        return [
            Group(group.prompt, completions, advantages=(0.0,) * len(completions))
            for group, completions in zip(like, drawn, strict=True)
        ]

    def _groups(self, prompts: Sequence[Prompt], record_experts: bool) -> list[Group]:
        experts = ExpertLog() if record_experts else None
        with self._phase("generate"):
            give_back_freed_memory()
            prompts = encode_by_task(self.policy, self.formats, self._task.values(), prompts)
            requests = [Request(p, self.config.rollout.samples_per_prompt) for p in prompts]
            drawn = draw(self.engine, requests, self.params, self._should_stop, experts)
        with self._phase("score"):
            groups = self._scored(prompts, drawn)
            return groups if experts is None else experts.attach(groups)

    def _scored(self, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Completion]]) -> list[Group]:
        """Score completions and give them their advantages."""
        rollout, advantage = self.config.rollout, self.config.objective.advantage
        scored = score_groups([(self._task[p.task], p, c) for p, c in zip(prompts, drawn, strict=True)])
        return [shape_group(p, c, rollout, advantage, self._coins) for p, c in zip(prompts, scored, strict=True)]
