"""Choose the prompts of a step among several tasks: in exact shares, as a pure function of the step.

After any number of steps, the number of prompts of a task differs from its exact share by less than one. The indices of
each task are 0, 1, 2, ... without gaps or repetitions. There is no state to save.

There are two methods. Where every task has at least one prompt a step on average, the running totals are the largest
remainders of the running shares. Each total is less than one from its share, and the share grows by at least one a
step, so that totals cannot fall. For rarer tasks they could (the Alabama paradox). Then one period of the mixture is
laid out prompt by prompt: the next is always of the eligible task with the earliest deadline. That stays within one
of the share, by Tijdeman, "The chairman assignment problem" (1980).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

from sapo.errors import TaskError

T = TypeVar("T")

# One period of this many prompts is laid out in well under a second, once per process.
MAX_PERIOD = 100_000


def prompts_for_step(
    tasks_with_weights: Sequence[tuple[T, float]], step: int, prompts_per_step: int
) -> list[tuple[T, int]]:
    """Return the (task, index) pairs of `step` = 0, 1, ... The cost does not grow with the step.

    Args:
        tasks_with_weights: tasks, which are returned as they are, with relative positive weights. 0.1 means one tenth
            exactly.

    Raises:
        TaskError: a weight is not positive, or the weights of rare tasks have too long a common period.

    >>> from sapo.tasks.generated.arithmetic import ArithmeticTask
    >>> add, times = ArithmeticTask(name="add"), ArithmeticTask(name="times", operation="multiply", digits=2)
    >>> [(task.name, index) for task, index in prompts_for_step([(add, 2), (times, 1)], step=1, prompts_per_step=3)]
    [('add', 2), ('add', 3), ('times', 1)]
    """
    if step < 0 or prompts_per_step < 1:
        raise TaskError(
            f"a step must be 0 or more and prompts_per_step at least 1; got {step} and {prompts_per_step}; count from 0"
        )
    weights = _whole_weights(tuple(weight for _, weight in tasks_with_weights))
    rare = min(weights) * prompts_per_step < sum(weights)
    totals = _period_totals if rare else _largest_remainders
    before = totals(weights, step * prompts_per_step)
    after = totals(weights, (step + 1) * prompts_per_step)
    return [
        (task, index)
        for (task, _), start, stop in zip(tasks_with_weights, before, after, strict=True)
        for index in range(start, stop)
    ]


@lru_cache
def _whole_weights(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Return the same proportions in the smallest whole numbers."""
    if not weights:
        raise TaskError("a mixture must have at least one task; got none; add one")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise TaskError(f"a task's weight must be positive and finite; got {weight!r}; leave the task out instead")
    # Through the decimal text, so that 0.1 is exactly a tenth and not the nearest binary float.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    return tuple(weight // math.gcd(*whole) for weight in whole)


def _largest_remainders(weights: tuple[int, ...], count: int) -> list[int]:
    """Apportion `count` prompts: to every task the whole part of its share, the rest to the largest remainders."""
    total = sum(weights)
    totals = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda task: -(count * weights[task] % total))
    for task in by_remainder[: count - sum(totals)]:
        totals[task] += 1
    return totals


def _period_totals(weights: tuple[int, ...], count: int) -> list[int]:
    """Count the prompts of each task among the first `count`, where the laid-out period repeats."""
    periods, rest = divmod(count, sum(weights))
    return [
        periods * weight + bisect_right(places, rest) for weight, places in zip(weights, _period(weights), strict=True)
    ]


@lru_cache
def _period(weights: tuple[int, ...]) -> tuple[list[int], ...]:
    """Lay out one period, and return the places 1..sum(weights) that each task takes."""
    total = sum(weights)
    if total > MAX_PERIOD:
        raise TaskError(
            f"a mixture with a task of less than one prompt per step must repeat within {MAX_PERIOD} prompts; got "
            f"weights in the proportion {list(weights)}; use small whole weights or more prompts per step"
        )
    places: tuple[list[int], ...] = tuple([] for _ in weights)
    for place in range(1, total + 1):
        # Eligible: one more prompt leaves the task less than one ahead of its share. Deadline: the place by which it
        # must have one more, or be a whole prompt behind.
        eligible = [task for task, taken in enumerate(places) if len(taken) * total < place * weights[task]]
        chosen = min(eligible, key=lambda task: -(-(len(places[task]) + 1) * total // weights[task]))
        places[chosen].append(place)
    return places
