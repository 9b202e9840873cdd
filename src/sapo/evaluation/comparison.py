"""Two evaluations of the same problems, compared problem by problem.

Differences problem by problem say more than two intervals side by side: most of the spread of a pass rate is that of
the problems, which the two evaluations share. With d_i the difference of the pass rates c_i/n on problem i, the figures
are

- the mean of d_i with a paired bootstrap interval over problems;
- a paired permutation test: if the two models were the same, each d_i could as well have the other sign. The two-sided
  p-value is the share of all 2^P choices of signs whose sum is at least as far from 0 as the one seen. It is computed
  exactly, by convolution: the d_i are multiples of one fraction;
- McNemar's exact test on greedy completions, or on samples where there is one of each: of the problems that just one of
  the two solves, it solves as many as fair coins would. It is the permutation test for differences of -1, 0 and 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sapo.errors import ConfigError
from sapo.evaluation.estimates import Estimate, bootstrap

SCHEMA = "sapo.comparison/1"

MOST_STEPS = 2e9
"""Largest number of steps of the exact convolution; above it (large, coprime numbers of samples) signs are drawn."""

REWARD_UNITS = 10**9
"""Units that the largest mean reward, rounded up to a power of ten, is cut into for the permutation test."""

DRAWS = 100_000
"""Draws of signs where the exact distribution takes too long: a p-value of .05 is then known to about .0007."""


@dataclass(frozen=True)
class Discordance:
    """Problems that just one of two models solved, each judged by one completion, with McNemar's exact p-value.

    >>> round(Discordance(only_a=1, only_b=5).p_value, 12)  # 2 * (C(6,0) + C(6,1)) / 2**6
    0.21875
    """

    only_a: int
    only_b: int

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of a fair coin; 1 when there is no such problem."""
        from scipy.stats import binomtest  # takes more than a second to import

        n = self.only_a + self.only_b
        return float(binomtest(self.only_a, n, 0.5).pvalue) if n else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {"only_a": self.only_a, "only_b": self.only_b, "p_value": self.p_value}


@dataclass(frozen=True)
class Comparison:
    """Model b against model a on the same problems. Made by `compare`."""

    problems: int
    names: tuple[str, str]
    samples: tuple[int, int]
    means: tuple[Estimate, Estimate]
    difference: Estimate
    """b's figure less a's, with the paired interval."""
    p_value: float
    """p-value of the permutation test."""
    better: int
    """Problems on which b's pass rate, or mean reward, is higher."""
    worse: int
    greedy: Discordance | None
    """None unless both evaluations have greedy completions."""
    single: Discordance | None
    """None unless both have one sample of each problem."""
    graded: bool = False
    """Whether one of the two saw rewards other than 0 and 1: the figure is then the mean reward, not mean@n."""

    def to_json(self) -> dict[str, Any]:
        """Return what `sapo eval-compare` writes."""
        return {
            "schema": SCHEMA,
            "figure": "reward_mean" if self.graded else "mean@n",
            "a": {"name": self.names[0], "samples": self.samples[0], "mean": self.means[0].to_json()},
            "b": {"name": self.names[1], "samples": self.samples[1], "mean": self.means[1].to_json()},
            "problems": self.problems,
            "difference": self.difference.to_json(),
            "permutation_p_value": self.p_value,
            "better": self.better,
            "worse": self.worse,
            "equal": self.problems - self.better - self.worse,
            "mcnemar_greedy": self.greedy.to_json() if self.greedy else None,
            "mcnemar_samples": self.single.to_json() if self.single else None,
        }


def compare(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Compare two results.json of the same problems, in whatever prompt formats they were asked.

    Problems of which one of the two judged no sample, since its verifier or environment failed, are left out. Where
    rewards other than 0 and 1 were seen, mean rewards are compared, and no test counts right completions.

    Raises:
        ConfigError: not the same problems, none that both judged, or judged by different thresholds.
    """
    figures_a, figures_b = a["results"], b["results"]
    if figures_a["threshold"] != figures_b["threshold"]:
        raise ConfigError(
            "two evaluations are compared by one threshold of the reward; got "
            f"{figures_a['threshold']} and {figures_b['threshold']}; evaluate again with one --threshold"
        )
    n_a, n_b = figures_a["samples"], figures_b["samples"]
    paired = _paired(figures_a["per_problem"], figures_b["per_problem"], names)
    greedy = [(p["greedy"], q["greedy"]) for p, q in paired if None not in (p["greedy"], q["greedy"])]
    pairs = [(p, q) for p, q in paired if p.get("judged", n_a) and q.get("judged", n_b)]
    if not pairs:
        raise ConfigError(
            f"two evaluations are compared on problems that both judged; got none of {len(paired)}; mend the verifier "
            "or the environment, and evaluate again"
        )
    if not all(figures.get("binary", True) for figures in (figures_a, figures_b)):
        return _of_rewards(pairs, names, (n_a, n_b))
    correct_a, correct_b = (np.array([pair[side]["correct"] for pair in pairs]) for side in (0, 1))
    judged_a = np.array([p.get("judged", n_a) for p, _ in pairs])
    judged_b = np.array([q.get("judged", n_b) for _, q in pairs])
    # In units of one over the least common multiple the differences are whole numbers, and ties are ties.
    unit = math.lcm(*judged_a.tolist(), *judged_b.tolist())
    difference_P = correct_b * (unit // judged_b) - correct_a * (unit // judged_a)
    return Comparison(
        problems=len(pairs),
        names=names,
        samples=(n_a, n_b),
        means=(bootstrap(correct_a / judged_a), bootstrap(correct_b / judged_b)),
        difference=bootstrap(difference_P / unit),
        p_value=sign_flip_p_value(difference_P),
        better=int((difference_P > 0).sum()),
        worse=int((difference_P < 0).sum()),
        greedy=_discordance(greedy) if greedy else None,
        single=_discordance([(p["correct"] > 0, q["correct"] > 0) for p, q in pairs]) if n_a == n_b == 1 else None,
    )


def _of_rewards(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], names: tuple[str, str], samples: tuple[int, int]
) -> Comparison:
    mean_a, mean_b = (np.array([pair[side]["reward_mean"] for pair in pairs]) for side in (0, 1))
    difference_P = mean_b - mean_a
    # Whole units that float64 still tells apart: rounding of the rewards then makes no differences and breaks no ties.
    largest = max(float(np.abs([mean_a, mean_b]).max()), 1.0)
    whole_P = np.round(difference_P / 10.0 ** math.ceil(math.log10(largest)) * REWARD_UNITS).astype(np.int64)
    return Comparison(
        problems=len(pairs),
        names=names,
        samples=samples,
        means=(bootstrap(mean_a), bootstrap(mean_b)),
        difference=bootstrap(difference_P),
        p_value=sign_flip_p_value(whole_P),
        better=int((whole_P > 0).sum()),
        worse=int((whole_P < 0).sum()),
        greedy=None,
        single=None,
        graded=True,
    )


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> float:
    """Compute the two-sided p-value of the sum of whole numbers under independent fair signs.

    Args:
        differences: (P,) integers.
        seed: of the draws where the exact distribution would take too long; 100,000 of them, the one seen counted in.

    >>> sign_flip_p_value(np.array([1, 1, 1, 1]))  # ++++ and ----: 2 of 2**4
    0.125
    >>> sign_flip_p_value(np.array([0, 0]))
    1.0
    """
    sizes = np.abs(np.asarray(differences, dtype=np.int64))
    sizes = np.sort(sizes[sizes > 0])  # small steps first: the distribution stays narrow for longer
    observed = abs(int(np.sum(differences)))
    if not len(sizes):
        return 1.0
    common = int(np.gcd.reduce(sizes))
    sizes, observed = sizes // common, observed // common
    if len(sizes) * 2.0 * sizes.sum() > MOST_STEPS:
        return _drawn_p_value(sizes, observed, seed)
    # probability[s] of the sum s - width, over the choices made so far. Sums of positive terms: no cancellation.
    probability = np.ones(1)
    for size in sizes:
        wider = np.zeros(len(probability) + 2 * size)
        wider[: len(probability)] += 0.5 * probability
        wider[2 * size :] += 0.5 * probability
        probability = wider
    width = len(probability) // 2
    tail = probability[width + observed :].sum()
    return float(min(1.0, 2 * tail)) if observed else 1.0


def _drawn_p_value(sizes: np.ndarray, observed: int, seed: int) -> float:
    generator = np.random.Generator(np.random.PCG64(seed))
    as_far = 0
    for _ in range(DRAWS // 1000):
        signs = 2 * generator.integers(2, size=(1000, len(sizes)), dtype=np.int64) - 1
        as_far += int((np.abs(signs @ sizes) >= observed).sum())
    return (1 + as_far) / (1 + DRAWS)


def _discordance(pairs: Sequence[tuple[bool, bool]]) -> Discordance:
    return Discordance(only_a=sum(p and not q for p, q in pairs), only_b=sum(q and not p for p, q in pairs))


def _paired(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    by_name_a, by_name_b = _by_name(a), _by_name(b)
    shared = by_name_a.keys() & by_name_b.keys()
    strangers = [
        (side, problem)
        for side, problems in zip(names, (by_name_a, by_name_b), strict=True)
        for name, problem in problems.items()
        if name not in shared
    ]
    if strangers:
        side, problem = strangers[0]
        raise ConfigError(
            f"two evaluations are compared on the same problems; got {len(a)} and {len(b)} with {len(shared)} in "
            f"common, {problem['prompt'][:40]!r} is in {side} only; evaluate both with the same task, --problems "
            "and --seed"
        )
    return [(problem, by_name_b[name]) for name, problem in by_name_a.items()]


def _by_name(problems: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Map each problem's key, with a number where rows are repeated, to the problem."""
    seen: Counter[str] = Counter()
    named = {}
    for problem in problems:
        named[problem["key"], seen[problem["key"]]] = problem
        seen[problem["key"]] += 1
    return named
