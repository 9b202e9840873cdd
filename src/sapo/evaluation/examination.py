"""The steps of an evaluation: ask, draw, judge, count.

An evaluation goes chunk by chunk. A chunk is a fixed run of problems that one call of the engine draws: which sequences
share a batch decides how their sums are rounded, so it must not depend on where an evaluation was killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from sapo.config import PromptConfig
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt
from sapo.data.transcripts import transcript
from sapo.environments import is_environment
from sapo.errors import TaskError
from sapo.evaluation.constant import best_constant
from sapo.evaluation.figures import Clock, Evaluation
from sapo.evaluation.records import Answered, Sample, groups_of
from sapo.model.policy import Policy
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import Joiner, joiners_for
from sapo.rollout.episodes.live import Play
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import Task, score_groups


class ProgressStore(Protocol):
    """Keeps the problems of an evaluation that are done, so that a killed one can go on: see
    `store.EvaluationStore`."""

    answered: list[Answered]
    """Problems that are done, in order."""
    clock: Clock

    def keep(self, chunk: Sequence[Answered], clock: Clock) -> None:
        """Store the next problems and the time they took."""
        ...


class InMemoryStore:
    """Keeps an evaluation for as long as the process lives.

    >>> memory = InMemoryStore()
    >>> memory.keep([], Clock(generate=1.0))
    >>> memory.clock
    Clock(generate=1.0, score=0.0)
    """

    def __init__(self) -> None:
        self.answered: list[Answered] = []
        self.clock = Clock()

    def keep(self, chunk: Sequence[Answered], clock: Clock) -> None:
        """Keep the next problems in memory; see `ProgressStore.keep`."""
        self.answered += chunk
        self.clock += clock


def evaluate_policy(
    policy: Policy,
    engine: Engine,
    task: Task,
    *,
    problems: int,
    samples: int,
    params: SamplingParams,
    ks: Sequence[int] = (1,),
    threshold: float = 1.0,
    prompt_format: PromptFormat | None = None,
    greedy: bool = False,
    constant: bool = False,
    turns: TurnsConfig | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate a policy on a task's held-out problems, all drawn by one call of the engine.

    Args:
        problems: how many; all there are, when there are fewer.
        samples: completions of each problem.
        params: of sampling; its seed and a problem's number fix the draws.
        ks: which pass@k to estimate, each at most `samples`.
        threshold: smallest reward that counts as correct.
        prompt_format: how the questions are put; as they are when None.
        greedy: draw one more completion of each problem, at temperature 0.
        constant: judge the best constant answer as well; not of an environment, which takes no answer in one piece.
        turns: limits of episodes, for an environment; their defaults when None.

    Raises:
        Interrupted: when `should_stop` says so.
        TaskError: the task has no held-out problem.
    """
    form = prompt_format or PromptFormat.of(PromptConfig(), task)
    prompts = ask(policy, task, problems, form)
    memory = InMemoryStore()
    examine(
        policy,
        engine,
        task,
        prompts,
        memory,
        chunk=len(prompts),
        samples=samples,
        params=params,
        greedy=greedy,
        turns=turns,
        joiners=joiners_for(policy, task, form, prompts[0]),
        should_stop=should_stop,
    )
    constant = constant and not is_environment(task)
    best = best_constant(task, prompts, threshold=threshold, should_stop=should_stop) if constant else None
    return Evaluation.of(task.name, memory.answered, ks=ks, threshold=threshold, constant=best, clock=memory.clock)


def ask(policy: Policy, task: Task, problems: int, prompt_format: PromptFormat | None = None) -> list[Prompt]:
    """Number and encode the held-out problems.

    Raises:
        TaskError: there is none.
    """
    prompts = [replace(p, id=i) for i, p in enumerate(task.held_out(problems))]
    if not prompts:
        raise TaskError(f"an evaluation needs a held-out problem; task {task.name!r} has none; hold some rows out")
    return (prompt_format or PromptFormat.of(PromptConfig(), task)).encode(policy, prompts)


def examine(
    policy: Policy,
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    keeper: ProgressStore,
    *,
    chunk: int,
    samples: int,
    params: SamplingParams,
    greedy: bool = False,
    turns: TurnsConfig | None = None,
    joiners: Mapping[str, Joiner] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Draw and judge completions of the prompts that the store does not hold yet.

    Args:
        prompts: encoded; those that are done come first, whole chunks of them.
        chunk: problems of one call of the engine.
        turns, joiners: limits of episodes and how turns of a chat are joined, for an environment; see `EpisodeDriver`.
        on_progress: called with the problems done, and all of them, after each chunk.
    """

    def drawing(part: Sequence[Prompt]) -> tuple[list[tuple[Completion, ...]], list[Completion] | None]:
        if is_environment(task):
            limits, between = turns or TurnsConfig(), joiners or {}
            return _played(policy, engine, task, part, samples, params, limits, between, greedy, should_stop)
        drawn = draw(engine, [Request(p, samples) for p in part], params, should_stop)
        return drawn, _greedily(engine, part, drawn, params, should_stop) if greedy else None

    for first in range(len(keeper.answered), len(prompts), chunk):
        part = prompts[first : first + chunk]
        started = time.perf_counter()
        drawn, likeliest = drawing(part)
        generated = time.perf_counter()
        answered = _judge(policy, task, part, drawn, likeliest)
        keeper.keep(answered, Clock(generated - started, time.perf_counter() - generated))
        on_progress(first + len(part), len(prompts))


def _likeliest(params: SamplingParams) -> SamplingParams:
    return replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)


def _played(
    policy: Policy,
    engine: Engine,
    task: Any,
    prompts: Sequence[Prompt],
    samples: int,
    params: SamplingParams,
    turns: TurnsConfig,
    joiners: Mapping[str, Joiner],
    greedy: bool,
    should_stop: Callable[[], bool],
) -> tuple[list[tuple[Completion, ...]], list[Completion] | None]:
    """Play episodes of an environment, as training does; with `greedy`, one more of each prompt at temperature 0."""

    def play(params: SamplingParams, samples: int) -> list[tuple[Completion, ...]]:
        driver = EpisodeDriver(policy, engine, params, turns, joiners, should_stop)
        return driver.play([Play(task, p, samples) for p in prompts])

    return play(params, samples), [c for (c,) in play(_likeliest(params), 1)] if greedy else None


def _greedily(
    engine: Engine,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Completion]],
    params: SamplingParams,
    should_stop: Callable[[], bool],
) -> list[Completion]:
    if params.temperature == 0:
        return [completions[0] for completions in drawn]
    likeliest = _likeliest(params)
    return [c for (c,) in draw(engine, [Request(p, 1) for p in prompts], likeliest, should_stop)]


def _judge(
    policy: Policy,
    task: Task,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Completion]],
    likeliest: Sequence[Completion] | None,
) -> list[Answered]:
    """Score all completions in one call, so that slow verifiers work side by side."""
    extra: list[list[Completion]] = [[] for _ in prompts] if likeliest is None else [[c] for c in likeliest]
    together = [(task, p, [*c, *e]) for p, c, e in zip(prompts, drawn, extra, strict=True)]
    judged = [tuple(c) for _, _, c in together] if is_environment(task) else score_groups(together)
    answered = []
    for prompt, completions, scored in zip(prompts, drawn, judged, strict=True):
        samples = tuple(
            replace(Sample.of(c), transcript=transcript(c, len(prompt.token_ids), policy.show)) for c in scored
        )
        answered.append(
            Answered(
                id=prompt.id,
                prompt=prompt.text,
                seen=policy.show_prompt(prompt),
                answer=prompt.answer,
                groups=groups_of(prompt),
                samples=samples[: len(completions)],
                greedy=samples[len(completions)] if likeliest is not None else None,
                pictures=tuple(picture.sha256 for picture in prompt.pictures),
            )
        )
    return answered
