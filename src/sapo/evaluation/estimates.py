"""The arithmetic of an evaluation: unbiased pass@k, majority of n, bootstrap intervals over problems.

n completions of each problem; c of them correct (reward of at least the threshold). mean@n is the mean of c/n over
problems (pass@1 averaged over n samples), pass@k the unbiased estimate of Chen et al. 2021
(https://arxiv.org/abs/2107.03374), majority@n self-consistency's vote (Wang et al. 2022,
https://arxiv.org/abs/2203.11171) over the answers the verifier took from the completions.

Intervals resample problems: these are the draws from a population, while completions are draws for each problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sapo.errors import ConfigError

RESAMPLES = 2000
"""Resamples of a bootstrap; the ends of an interval then vary by about 2% of its width."""
CONFIDENCE = 0.95
"""Share of the resampled means that lies within an interval."""

DRAWN_AT_ONCE = 2**20
"""Draws of a bootstrap that are held in memory together."""


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
        """Return a JSON value."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """Compute 1 - C(n-c, k) / C(n, k) for each problem, by a product that does not overflow; 1 when n - c < k.

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


def majority_share(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Return how right the most frequent answer of one problem's samples is: 1 or 0, or in between where answers tie.

    A tie is broken by a fair draw, of which this is the expectation, so that the figure depends on no order. Samples
    without an answer have no vote; a problem on which nobody votes is wrong. Where a verifier judged equal answers
    differently, the share of them that was right counts.

    >>> majority_share(["7", "8", "7", None], [True, False, True, False])
    1.0
    >>> majority_share(["7", "8", None, None], [True, False, False, False])
    0.5
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, is_right in zip(answers, right, strict=True):
        if answer is not None:
            votes[answer].append(is_right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most]))


def bootstrap(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of one value per problem with a percentile interval over resampled problems.

    Where every problem has the same value the interval is that value: resampling cannot show what it never saw.

    `scipy.stats.bootstrap` draws the same resamples and gives the same interval to the last bit or next to it. It is
    not called: every run that evaluates would import scipy.stats, which takes 1.7 s and 21 MiB.
    """
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, DRAWN_AT_ONCE // len(values))
    means = [
        values[generator.integers(len(values), size=(min(rows, resamples - first), len(values)))].mean(axis=1)
        for first in range(0, resamples, rows)
    ]
    return _with_interval(float(values.mean()), np.concatenate(means))


def bootstrap_crossed(values_SP: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean over seeds and problems with a percentile interval; seeds and problems are resampled
    independently.

    Runs of all seeds answer the same problems, so a problem that is drawn twice counts twice in every run (Owen 2007,
    The pigeonhole bootstrap, Annals of Applied Statistics 1(2)). With one seed the interval is over problems alone. Few
    seeds show little of how far seeds lie apart, and the interval is then too narrow rather than too wide.

    Args:
        values_SP: one value of each run and problem: a pass rate, or the difference of two. Problems that some run did
            not judge, whose value is NaN there, are left out of all.

    Raises:
        ConfigError: no problem is left.

    >>> bootstrap_crossed(np.array([[1.0, 1.0], [1.0, 1.0]]))
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    values_SP = np.asarray(values_SP, dtype=np.float64)
    if np.isnan(values_SP).any():
        values_SP = values_SP[:, ~np.isnan(values_SP).any(axis=0)]
    if not values_SP.size:
        raise ConfigError(
            "runs are compared on problems that all of them judged; got none; mend the verifier or the environment"
        )
    seeds, problems = values_SP.shape
    generator = np.random.Generator(np.random.PCG64(seed))
    times_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    times_RP = generator.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    means = ((times_RS @ values_SP) * times_RP).sum(axis=1) / values_SP.size
    return _with_interval(float(values_SP.mean()), means)


def bootstrap_ratio(totals: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of a figure that not every completion has: the sum of `totals` over the sum of `counts`, by
    problem.

    A resample in which no completion has the figure says nothing of it and is left out.

    Raises:
        ValueError: no completion has it.

    >>> bootstrap_ratio(np.array([1.0, 3.0]), np.array([1, 3]))
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    totals, counts = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not counts.sum() > 0:
        raise ValueError("the mean of a figure needs a completion that has it; got none; leave the figure out")
    generator = np.random.Generator(np.random.PCG64(seed))
    means = []
    for _ in range(resamples):
        drawn = generator.integers(len(totals), size=len(totals))
        if counts[drawn].sum() > 0:
            means.append(totals[drawn].sum() / counts[drawn].sum())
    return _with_interval(float(totals.sum() / counts.sum()), np.array(means))


def _with_interval(value: float, means: np.ndarray) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
