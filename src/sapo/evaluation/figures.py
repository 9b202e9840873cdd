"""The figures of one evaluation, all of them functions of its judged completions.

Completions whose verifier or environment failed were not judged: they are counted, and are in no other figure. A
problem has as many samples as were judged, and one with fewer than k is left out of pass@k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sapo.data import Status
from sapo.evaluation.estimates import Estimate, bootstrap, bootstrap_ratio, majority_share, pass_at_k
from sapo.evaluation.records import GROUPINGS, Answered, Sample
from sapo.utils.rewards import is_right

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
    mean: Estimate | None
    pass_at: Mapping[int, Estimate | None]
    statuses: Mapping[str, int]

    def to_json(self, samples: int) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "value": self.value,
            "problems": self.problems,
            f"mean@{samples}": _or_none(self.mean),
            **{f"pass@{k}": _or_none(estimate) for k, estimate in self.pass_at.items()},
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
    mean: Estimate | None
    """mean@n, n the judged samples of a problem; None where no completion was judged."""
    pass_at: dict[int, Estimate | None]
    """k -> pass@k; None where no problem has k judged samples."""
    majority: Estimate | None
    """majority@n; None where the verifier took no answer from any completion."""
    greedy: Estimate | None
    """Share of right greedy completions; None when none were asked for."""
    constant: ConstantAnswer | None
    """None when not asked for, or where no constant can be judged: see `constant.best_constant`."""
    reward_mean: float | None
    """None where no completion was judged."""
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
        greedy = [problem.greedy for problem in answered if problem.greedy is not None]
        rewards = [s.reward for s in flat if not s.status.failed]
        return cls(
            task=task,
            problems=len(answered),
            samples=samples,
            mean=_mean(answered, threshold),
            pass_at=_pass_at(answered, threshold, ks),
            majority=_majority(answered, threshold),
            greedy=_bootstrap([is_right(s.reward, threshold) for s in greedy if not s.status.failed]),
            constant=constant,
            reward_mean=float(np.mean(rewards)) if rewards else None,
            statuses=_statuses(flat),
            finish_reasons={r: sum(s.finish_reason == r for s in flat) for r in ("stop", "length")},
            figures=_figures(answered),
            slices=_slices(answered, threshold, ks),
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
    def judged(self) -> list[int]:
        """Return the samples of each problem, (P,), whose verifier and environment did not fail."""
        return [count_judged(problem) for problem in self.answered]

    @property
    def rewards(self) -> list[float | None]:
        """Return the mean reward of each problem, (P,), over its judged samples; None where there is none."""
        return [problem.reward_mean for problem in self.answered]

    @property
    def failed(self) -> int:
        """Return how many completions failed to be judged, greedy ones included."""
        return sum(s.status.failed for s in self._drawn)

    def failure(self, most: float) -> str | None:
        """Return a sentence on the completions that failed, where they are more than a share of all, or all.

        Args:
            most: largest share that may fail.
        """
        drawn, failed = len(self._drawn), [s for s in self._drawn if s.status.failed]
        if not failed or (len(failed) < drawn and len(failed) <= most * drawn):
            return None
        (status, reason), count = Counter(
            (s.status, s.detail.partition(", after turn")[0]) for s in failed
        ).most_common(1)[0]
        who = "environments" if status is Status.ENVIRONMENT_ERROR else "the verifier"
        return (
            f"evaluation on {self.task}: {who} failed in {len(failed)} of {drawn} completions, {count} times with "
            f"{reason}; its figures are over the others"
        )

    @property
    def _drawn(self) -> list[Sample]:
        return [s for p in self.answered for s in (*p.samples, *([p.greedy] if p.greedy is not None else []))]

    @property
    def binary(self) -> bool:
        """Return whether every reward is 0 or 1; where not, the mean reward is shown without shares of right ones."""
        return all(s.reward in (0.0, 1.0) for s in self._drawn if not s.status.failed)

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
            f"mean@{self.samples}": _or_none(self.mean),
            **{f"pass@{k}": _or_none(estimate) for k, estimate in self.pass_at.items()},
            f"majority@{self.samples}": _or_none(self.majority),
            "greedy": _or_none(self.greedy),
            "constant": _or_none(self.constant),
            "reward_mean": self.reward_mean,
            "binary": self.binary,
            "statuses": self.statuses,
            "finish_reasons": self.finish_reasons,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "length": {"mean": self.length_mean, "max": self.length_max},
            "tokens": self.tokens,
            "greedy_tokens": self.greedy_tokens,
            "slices": {name: [s.to_json(self.samples) for s in rows] for name, rows in self.slices.items()},
            "per_problem": [self._of_problem(problem) for problem in self.answered],
        }

    def _of_problem(self, problem: Answered) -> dict[str, Any]:
        judged = count_judged(problem)
        greedy = None if problem.greedy is None or problem.greedy.status.failed else problem.greedy
        return {
            "id": problem.id,
            "key": problem.key,
            "prompt": problem.prompt[:80],
            "correct": count_right(problem, self.threshold),
            **({"judged": judged} if judged < len(problem.samples) else {}),
            "reward_mean": problem.reward_mean,
            "greedy": None if greedy is None else is_right(greedy.reward, self.threshold),
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
        """Return flat figures for metrics.jsonl, without the clock; those that were not measured are left out."""
        metrics: dict[str, Any] = {
            "task": self.task,
            "problems": self.problems,
            "samples": self.samples,
            "binary": self.binary,
            "length/mean": self.length_mean,
            "tokens/generated": self.tokens + self.greedy_tokens,
        }
        if self.reward_mean is not None and self.mean is not None:
            metrics |= {"reward/mean": self.reward_mean, f"mean@{self.samples}": self.mean.value}
        shares = [(f"pass@{k}", estimate) for k, estimate in self.pass_at.items()]
        for name, figure in (*shares, (f"majority@{self.samples}", self.majority), ("greedy", self.greedy)):
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
    """Return c, the judged samples whose reward reaches the threshold."""
    return sum(is_right(s.reward, threshold) for s in problem.samples if not s.status.failed)


def count_judged(problem: Answered) -> int:
    """Return n, the samples whose verifier and environment did not fail."""
    return sum(not s.status.failed for s in problem.samples)


def _bootstrap(values: Sequence[float] | np.ndarray) -> Estimate | None:
    return bootstrap(np.array(values)) if len(values) else None


def _mean(answered: Sequence[Answered], threshold: float) -> Estimate | None:
    return _bootstrap([count_right(p, threshold) / n for p in answered if (n := count_judged(p))])


def _pass_at(answered: Sequence[Answered], threshold: float, ks: Sequence[int]) -> dict[int, Estimate | None]:
    judged_P = np.array([count_judged(problem) for problem in answered])
    correct_P = np.array([count_right(problem, threshold) for problem in answered])
    estimates = {}
    for k in ks:
        value_P = np.full(len(answered), np.nan)
        for n in sorted({int(n) for n in judged_P if n >= k}):
            value_P[judged_P == n] = pass_at_k(n, correct_P[judged_P == n], k)
        estimates[k] = _bootstrap(value_P[judged_P >= k])
    return estimates


def _majority(answered: Sequence[Answered], threshold: float) -> Estimate | None:
    judged = [[s for s in problem.samples if not s.status.failed] for problem in answered]
    if all(s.answer is None for samples in judged for s in samples):
        return None
    return _bootstrap(
        [
            majority_share([s.answer for s in samples], [is_right(s.reward, threshold) for s in samples])
            for samples in judged
            if samples
        ]
    )


def _statuses(samples: Sequence[Sample]) -> dict[str, int]:
    counts = {status.value: sum(s.status is status for s in samples) for status in Status}
    return {name: n for name, n in counts.items() if n or name != Status.ENVIRONMENT_ERROR.value}


def _figures(answered: Sequence[Answered]) -> dict[str, VerifierFigure]:
    names = sorted({name for problem in answered for s in problem.samples for name in s.figures})
    found = {}
    for name in names:
        values = [[s.figures[name] for s in problem.samples if name in s.figures] for problem in answered]
        counts = np.array([len(v) for v in values])
        mean = bootstrap_ratio(np.array([sum(v) for v in values]), counts)
        found[name] = VerifierFigure(mean, int(counts.sum()))
    return found


def _slices(answered: Sequence[Answered], threshold: float, ks: Sequence[int]) -> dict[str, list[Slice]]:
    slices: dict[str, list[Slice]] = {}
    for name in GROUPINGS:
        values = {value for problem in answered for value in problem.groups.get(name, ())}
        if len(values) < 2:
            continue
        slices[name] = []
        for value in _sorted_values(values):
            members = [problem for problem in answered if value in problem.groups.get(name, ())]
            slices[name].append(
                Slice(
                    value=value,
                    problems=len(members),
                    mean=_mean(members, threshold),
                    pass_at=_pass_at(members, threshold, ks),
                    statuses=_statuses([s for problem in members for s in problem.samples]),
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
