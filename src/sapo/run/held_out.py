"""Evaluate a run's policy on the held-out problems of its tasks, with the policy's own weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sapo.config import RunConfig
from sapo.evaluation import ConstantAnswer, Evaluation, evaluate_policy
from sapo.model.policy import Policy
from sapo.rollout.engine import Engine
from sapo.rollout.params import SamplingParams
from sapo.rollout.weights import loaded
from sapo.run.preflight import TaskSet
from sapo.tasks import Task
from sapo.utils.hashing import seed_for


class HeldOutEvaluations:
    """The evaluations of one run.

    Args:
        config: `eval` and the sampling settings of `rollout` are used.
        should_stop: asked by the engine between two tokens.
    """

    def __init__(
        self, config: RunConfig, policy: Policy, engine: Engine, tasks: TaskSet, should_stop: Callable[[], bool]
    ) -> None:
        self.settings = config.eval
        self.turns = config.rollout.turns
        self.policy = policy
        self.engine = engine
        self.tasks = tasks
        params = SamplingParams.of(config.rollout, seed_for(config.eval.seed, "evaluation"), policy.stop_token_ids)
        temperature = config.eval.temperature
        self.params = params if temperature is None else replace(params, temperature=temperature)
        self._should_stop = should_stop
        self._constants: dict[str, ConstantAnswer] = {}  # of each task: no matter of the policy, so judged once

    def evaluate(self, version: int) -> list[Evaluation]:
        """Evaluate every task at the policy's present weights.

        Args:
            version: updates made by these weights.

        Raises:
            Interrupted: when `should_stop` says so.
        """
        with loaded(self.engine, self.policy.weights(), version):
            return [self._evaluate_task(task) for task in self.tasks.held_out]

    def _evaluate_task(self, task: Task) -> Evaluation:
        known = self._constants.get(task.name)
        evaluation = evaluate_policy(
            self.policy,
            self.engine,
            task,
            problems=self.settings.problems,
            samples=self.settings.samples,
            params=self.params,
            ks=self.settings.k,
            prompt_format=self.tasks.formats[task.name],
            greedy=self.settings.greedy,
            constant=self.settings.constant and known is None,
            turns=self.turns,
            should_stop=self._should_stop,
        )
        if evaluation.constant is not None:
            self._constants[task.name] = evaluation.constant
        return replace(evaluation, constant=evaluation.constant or known)
