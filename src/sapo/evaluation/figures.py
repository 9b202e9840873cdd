"""The figures of one evaluation, all of them functions of its judged completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapo.data import Status
from sapo.evaluation.estimates import Estimate, bootstrap, bootstrap_ratio, majority_share, pass_at_k
from sapo.evaluation.records import GROUPINGS, Answered, Sample

# Words with an order of their own. Other values are sorted as numbers where they are numbers, else as text.
_ORDERED = ("very easy", "easy", "medium", "hard", "very hard")


@dataclass(frozen=True)
class ConstantAnswer:
    """The best answer for a model that gives the same answer to every problem.

    >>> ConstantAnswer(answer="7", share=0.25, judged=8, distinct=8).to_json()
    {'answer': '7', 'share': 0.25, 'judged': 8, 'distinct': 8}
    """

    answer: str
    share: float
    """Share of the problems it is right on."""
    judged: int
    """Distinct reference answers that were tried as a constant, the most frequent first."""
    distinct: int
    """Number of distinct reference answers."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"answer": self.answer, "share": self.share, "judged": self.judged, "distinct": self.distinct}


@dataclass(frozen=True)
class Slice:
    """The problems of one subject, level or difficulty.

    >>> Slice("Algebra", 2, Estimate(0.5, 0.0, 1.0), {1: Estimate(0.5, 0.0, 1.0)}, {"scored": 2}).problems
    2
    """

    value: str
    problems: int
    mean: Estimate
    pass_at: Mapping[int, Estimate]
    statuses: Mapping[str, int]

    def to_json(self, samples: int) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "value": self.value,
            "problems": self.problems,
            f"mean@{samples}": self.mean.to_json(),
            **{f"pass@{k}": estimate.to_json() for k, estimate in self.pass_at.items()},
            "statuses": dict(self.statuses),
        }


@dataclass(frozen=True)
class VerifierFigure:
    """A further figure of the verifier, such as cell accuracy: its mean over the completions that have it.

    >>> VerifierFigure(Estimate(0.5, 0.4, 0.6), completions=12).to_json()
    {'value': 0.5, 'low': 0.4, 'high': 0.6, 'completions': 12}
    """

    mean: Estimate
    completions: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {**self.mean.to_json(), "completions": self.completions}


@dataclass(frozen=True)
class Clock:
    """Seconds of generation and scoring: the only part of an evaluation that differs when it is repeated.

    >>> Clock(generate=1.5, score=0.25) + Clock(generate=0.5, score=0.25)
    Clock(generate=2.0, score=0.5)
    """

    generate: float = 0.0
    score: float = 0.0

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.generate + other.generate, self.score + other.score)

    @property
    def seconds(self) -> float:
        """Return the seconds of generation and scoring together."""
        return self.generate + self.score


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy on one task. Made by `Evaluation.of`."""

    task: str
    problems: int
    samples: int
    mean: Estimate
    """mean@n."""
    pass_at: dict[int, Estimate]
    """k -> pass@k."""
    majority: Estimate | None
    """majority@n; None where the verifier took no answer from any completion."""
    greedy: Estimate | None
    """Share of right greedy completions; None when none were asked for."""
    constant: ConstantAnswer | None
    """None when not asked for, or where no constant can be judged: see `constant.best_constant`."""
    reward_mean: float
    statuses: dict[str, int]
    finish_reasons: dict[str, int]
    """Completions by stop and length. One of `length` was cut, even where its task scores it."""
    figures: dict[str, VerifierFigure]
    slices: dict[str, list[Slice]]
    """Figures by subject, level and difficulty, where the prompts have at least two values of it."""
    length_mean: float
    length_max: int
    tokens: int
    """Tokens of the n samples of all problems."""
    greedy_tokens: int
    threshold: float
    """Smallest reward that counts as correct."""
    clock: Clock = field(compare=False)
    answered: tuple[Answered, ...] = field(repr=False)

    @classmethod
    def of(
        cls,
        task: str,
        answered: Sequence[Answered],
        *,
        ks: Sequence[int] = (1,),
        threshold: float = 1.0,
        constant: ConstantAnswer | None = None,
        clock: Clock | None = None,
    ) -> Evaluation:
        """Compute the figures of judged completions; every problem has the same number of them."""
        samples = len(answered[0].samples)
        flat = [s for problem in answered for s in problem.samples]
        correct_P = np.array([count_right(problem, threshold) for problem in answered])
        greedy = [problem.greedy for problem in answered if problem.greedy is not None]
        return cls(
            task=task,
            problems=len(answered),
            samples=samples,
            mean=bootstrap(correct_P / samples),
            pass_at={k: bootstrap(pass_at_k(samples, correct_P, k)) for k in ks},
            majority=_majority(answered, threshold),
            greedy=bootstrap(np.array([s.reward >= threshold for s in greedy])) if greedy else None,
            constant=constant,
            reward_mean=float(np.mean([s.reward for s in flat])),
            statuses=_statuses(flat),
            finish_reasons={r: sum(s.finish_reason == r for s in flat) for r in ("stop", "length")},
            figures=_figures(answered),
            slices=_slices(answered, correct_P, ks),
            length_mean=float(np.mean([s.tokens for s in flat])),
            length_max=max(s.tokens for s in flat),
            tokens=sum(s.tokens for s in flat),
            greedy_tokens=sum(s.tokens for s in greedy),
            threshold=threshold,
            clock=clock or Clock(),
            answered=tuple(answered),
        )

    @property
    def correct(self) -> list[int]:
        """Return c of each problem, (P,), in order: comparisons of runs are paired by it."""
        return [count_right(problem, self.threshold) for problem in self.answered]

    @property
    def seconds(self) -> float:
        """Return the seconds of generation and scoring together."""
        return self.clock.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Return tokens per second of generation, greedy completions included; None when no time was measured."""
        return (self.tokens + self.greedy_tokens) / self.clock.generate if self.clock.generate > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return all figures but the clock, with what each problem contributes to them; completions' texts are left
        out."""
        return {
            "task": self.task,
            "problems": self.problems,
            "samples": self.samples,
            "threshold": self.threshold,
            f"mean@{self.samples}": self.mean.to_json(),
            **{f"pass@{k}": estimate.to_json() for k, estimate in self.pass_at.items()},
            f"majority@{self.samples}": _or_none(self.majority),
            "greedy": _or_none(self.greedy),
            "constant": _or_none(self.constant),
            "reward_mean": self.reward_mean,
            "statuses": self.statuses,
            "finish_reasons": self.finish_reasons,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "length": {"mean": self.length_mean, "max": self.length_max},
            "tokens": self.tokens,
            "greedy_tokens": self.greedy_tokens,
            "slices": {name: [s.to_json(self.samples) for s in rows] for name, rows in self.slices.items()},
            "per_problem": [
                {
                    "id": problem.id,
                    "key": problem.key,
                    "prompt": problem.prompt[:80],
                    "correct": count_right(problem, self.threshold),
                    "reward_mean": float(np.mean([s.reward for s in problem.samples])),
                    "greedy": None if problem.greedy is None else problem.greedy.reward >= self.threshold,
                }
                for problem in self.answered
            ],
        }

    def timing(self) -> dict[str, Any]:
        """Return the figures of the clock, which are written apart."""
        return {
            "seconds": self.seconds,
            "generate_seconds": self.clock.generate,
            "score_seconds": self.clock.score,
            "tokens_per_second": self.tokens_per_second,
        }

    def metrics(self) -> dict[str, Any]:
        """Return flat figures for metrics.jsonl, without the clock."""
        metrics: dict[str, Any] = {
            "task": self.task,
            "problems": self.problems,
            "samples": self.samples,
            "reward/mean": self.reward_mean,
            f"mean@{self.samples}": self.mean.value,
            "length/mean": self.length_mean,
            "tokens/generated": self.tokens + self.greedy_tokens,
        }
        for k, estimate in self.pass_at.items():
            metrics[f"pass@{k}"] = estimate.value
            metrics[f"pass@{k}/low"], metrics[f"pass@{k}/high"] = estimate.low, estimate.high
        for name, figure in ((f"majority@{self.samples}", self.majority), ("greedy", self.greedy)):
            if figure is not None:
                metrics[name] = figure.value
                metrics[f"{name}/low"], metrics[f"{name}/high"] = figure.low, figure.high
        if self.constant is not None:
            metrics["constant"] = self.constant.share
        for name, further in self.figures.items():
            metrics[f"figure/{name}"] = further.mean.value
        for status, count in self.statuses.items():
            metrics[f"status/{status}"] = count
        return metrics


def count_right(problem: Answered, threshold: float) -> int:
    """Return c, the samples whose reward reaches the threshold."""
    return sum(s.reward >= threshold for s in problem.samples)


def _majority(answered: Sequence[Answered], threshold: float) -> Estimate | None:
    if all(s.answer is None for problem in answered for s in problem.samples):
        return None
    shares = [
        majority_share([s.answer for s in problem.samples], [s.reward >= threshold for s in problem.samples])
        for problem in answered
    ]
    return bootstrap(np.array(shares))


def _statuses(samples: Sequence[Sample]) -> dict[str, int]:
    return {status.value: sum(s.status is status for s in samples) for status in Status}


def _figures(answered: Sequence[Answered]) -> dict[str, VerifierFigure]:
    names = sorted({name for problem in answered for s in problem.samples for name in s.figures})
    found = {}
    for name in names:
        values = [[s.figures[name] for s in problem.samples if name in s.figures] for problem in answered]
        counts = np.array([len(v) for v in values])
        mean = bootstrap_ratio(np.array([sum(v) for v in values]), counts)
        found[name] = VerifierFigure(mean, int(counts.sum()))
    return found


def _slices(answered: Sequence[Answered], correct_P: np.ndarray, ks: Sequence[int]) -> dict[str, list[Slice]]:
    samples = len(answered[0].samples)
    slices: dict[str, list[Slice]] = {}
    for name in GROUPINGS:
        values = {value for problem in answered for value in problem.groups.get(name, ())}
        if len(values) < 2:
            continue
        slices[name] = []
        for value in _sorted_values(values):
            members = [i for i, problem in enumerate(answered) if value in problem.groups.get(name, ())]
            correct = correct_P[members]
            slices[name].append(
                Slice(
                    value=value,
                    problems=len(members),
                    mean=bootstrap(correct / samples),
                    pass_at={k: bootstrap(pass_at_k(samples, correct, k)) for k in ks},
                    statuses=_statuses([s for i in members for s in answered[i].samples]),
                )
            )
    return slices


def _sorted_values(values: set[str]) -> list[str]:
    if all(v.lower() in _ORDERED for v in values):
        return sorted(values, key=lambda v: _ORDERED.index(v.lower()))
    if all(v.isdecimal() for v in values):
        return sorted(values, key=int)
    return sorted(values)


def _or_none(value: Estimate | ConstantAnswer | None) -> dict[str, Any] | None:
    return None if value is None else value.to_json()
