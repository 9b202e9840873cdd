"""Evaluation on held-out problems: mean@n, unbiased pass@k, bootstrap intervals over problems.

n completions of each problem; c of them correct (reward of at least the threshold). mean@n is the mean of c/n over
problems (pass@1 averaged over n samples), pass@k the unbiased estimate of Chen et al. 2021
(https://arxiv.org/abs/2107.03374).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sapo.config import PromptConfig
from sapo.data import Completion, Prompt, Status
from sapo.model.policy import Policy
from sapo.prompting import PromptFormat
from sapo.rollout.engine import Engine, Request
from sapo.rollout.sampling import SamplingParams
from sapo.tasks import Task, score_groups

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval.

    >>> Estimate(0.5, 0.4, 0.6).to_json()
    {'value': 0.5, 'low': 0.4, 'high': 0.6}
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As a JSON value."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy on one task."""

    task: str
    problems: int
    samples: int
    mean: Estimate
    """mean@n."""
    pass_at: dict[int, Estimate]
    """k -> pass@k."""
    reward_mean: float
    statuses: dict[str, int]
    length_mean: float
    tokens: int
    seconds: float
    completions: list[tuple[Prompt, tuple[Completion, ...]]] = field(repr=False, default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, completions included."""
        return {
            "task": self.task,
            "problems": self.problems,
            "samples": self.samples,
            f"mean@{self.samples}": self.mean.to_json(),
            **{f"pass@{k}": estimate.to_json() for k, estimate in self.pass_at.items()},
            "reward_mean": self.reward_mean,
            "statuses": self.statuses,
            "length_mean": self.length_mean,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "completions": [
                {
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "samples": [
                        {
                            "text": c.text,
                            "reward": c.score.reward,
                            "status": c.score.status.value,
                            "detail": c.score.detail,
                            "finish_reason": c.finish_reason,
                            "tokens": len(c),
                        }
                        for c in completions
                    ],
                }
                for prompt, completions in self.completions
            ],
        }

    def metrics(self) -> dict[str, Any]:
        """Flat figures for metrics.jsonl, the clock left out."""
        metrics: dict[str, Any] = {
            "task": self.task,
            "problems": self.problems,
            "samples": self.samples,
            "reward/mean": self.reward_mean,
            f"mean@{self.samples}": self.mean.value,
            "length/mean": self.length_mean,
            "tokens/generated": self.tokens,
        }
        for k, estimate in self.pass_at.items():
            metrics[f"pass@{k}"] = estimate.value
            metrics[f"pass@{k}/low"], metrics[f"pass@{k}/high"] = estimate.low, estimate.high
        for status, count in self.statuses.items():
            metrics[f"status/{status}"] = count
        return metrics


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """1 - C(n-c, k) / C(n, k) for each problem, by the product that does not overflow; 1 when n - c < k.

    Args:
        samples: n, completions of each problem.
        correct: (P,) c, how many of them are right.
        k: at most n.

    >>> pass_at_k(4, np.array([0, 1, 4]), 2)
    array([0. , 0.5, 1. ])

    Raises:
        ValueError: k outside 1..n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie in 1..samples ({samples}); got {k}")
    factors_nP = 1.0 - k / np.arange(1, samples + 1)[:, None]
    wrong_P = samples - np.asarray(correct)
    used_nP = np.arange(1, samples + 1)[:, None] > wrong_P[None, :]
    return np.where(wrong_P < k, 1.0, 1.0 - np.where(used_nP, factors_nP, 1.0).prod(axis=0))


def bootstrap(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of one value per problem with a percentile interval over resampled problems."""
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.array([values[generator.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


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
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate on a task's held-out problems.

    Args:
        problems: how many; all there are, when there are fewer.
        samples: completions of each problem.
        params: of sampling; its seed and a problem's number fix the draws.
        ks: which pass@k to estimate, each at most `samples`.
        threshold: smallest reward that counts as correct.
        prompt_format: how the questions are put; as they are when None.
    """
    started = time.perf_counter()
    prompts = [replace(p, id=i) for i, p in enumerate(task.held_out(problems))]
    prompts = (prompt_format or PromptFormat.of(PromptConfig(), task)).encode(policy, prompts)
    drawn = engine.generate([Request(p, samples) for p in prompts], params, should_stop)
    scored = score_groups([(task, p, completions) for p, completions in zip(prompts, drawn, strict=True)])
    rewards_PS = np.array([[c.score.reward for c in completions] for completions in scored])
    correct_P = (rewards_PS >= threshold).sum(axis=1)
    flat = [c for completions in scored for c in completions]
    return Evaluation(
        task=task.name,
        problems=len(prompts),
        samples=samples,
        mean=bootstrap(correct_P / samples),
        pass_at={k: bootstrap(pass_at_k(samples, correct_P, k)) for k in ks},
        reward_mean=float(rewards_PS.mean()),
        statuses={s.value: sum(c.score.status is s for c in flat) for s in Status},
        length_mean=float(np.mean([len(c) for c in flat])),
        tokens=sum(len(c) for c in flat),
        seconds=time.perf_counter() - started,
        completions=list(zip(prompts, scored, strict=True)),
    )
