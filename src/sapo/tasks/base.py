"""The protocol of tasks: a source of prompts, numbered without end, and the verifier of completions.

A task knows nothing of tokenizers, batches or models. Its training prompts are a pure function of (seed, index), so
that a resumed run, or one on more ranks, samples exactly the same prompts in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError


@runtime_checkable
class Task(Protocol):
    """Prompts and their verifier.

    `verify` is called for finished completions only. A task with the attribute `score_truncated = True` gets the
    truncated ones too. Otherwise they have reward 0 and status `truncated`.
    """

    name: str

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of `index` = 0, 1, 2, ... Its `id` is the index, its `token_ids` are empty."""
        ...

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of a fixed list of distinct prompts that are never trained on, or all of them."""
        ...

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Score a finished completion. An exception raised here becomes the status `verifier_error`."""
        ...


@runtime_checkable
class FiniteTask(Task, Protocol):
    """A task whose training prompts are rows: every row comes once in `num_train` indices, and again in the next."""

    @property
    def num_train(self) -> int:
        """Return the number of training rows: the length of an epoch."""
        ...

    def train_row(self, index: int) -> int:
        """Return which of the rows 0..num_train-1 is the training prompt of `index`."""
        ...


@runtime_checkable
class WorkedTask(Task, Protocol):
    """A task that can also write correct solutions, which a cold start learns from."""

    def worked_example(self, index: int) -> tuple[Prompt, str]:
        """Return the training prompt of `index` and a completion that `verify` rewards with 1."""
        ...


def notices_of(tasks: Iterable[Task]) -> list[str]:
    """Return the lines that tasks have for the user, as of rows that were skipped."""
    return [line for task in tasks for line in getattr(task, "notices", ())]


class JudgedTask:
    """A task with one verifier, to whose workers a batch of completions goes at once.

    A subclass that overrides `verify` scores completions itself, and `verifier` is not used.
    """

    verifier: Callable[[str, Prompt], Score]

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Return the score of the verifier."""
        return self.verifier(text, prompt)


LARGEST_REWARD = 1e15
"""Largest |reward| and |figure|. Sums of squares of such numbers are finite in float32, and their last digit is still
below 1; a larger one is a fault of its verifier."""


def checked_score(score: Any, method: str = "verify") -> Score:
    """Return a score whose reward is a float that can be computed with.

    Args:
        method: that returned it.

    Raises:
        TypeError: `score` is no Score, or its reward is no real number.
        ValueError: its reward or a further figure is not finite or beyond LARGEST_REWARD, its status is unknown, or its
            reward is not the sum of its turn_rewards.
    """
    if not isinstance(score, Score):
        raise TypeError(f"{method} must return a Score; got {type(score).__name__}")
    for name, figure in score.figures.items():  # otherwise a NaN would be found only when the metrics are written
        if not (isinstance(figure, Real) and math.isfinite(figure)):
            raise ValueError(f"a verifier's figures must be finite numbers; got {name}={figure!r}; leave it out")
        if abs(figure) > LARGEST_REWARD:
            raise ValueError(f"a verifier's figures must lie within +-{LARGEST_REWARD:g}; got {name}={figure!r}")
    reward, by_turn = checked_reward(score.reward), tuple(map(checked_reward, score.turn_rewards))
    if by_turn and not math.isclose(reward, math.fsum(by_turn), rel_tol=1e-6, abs_tol=1e-6):
        raise ValueError(
            f"a reward must be the sum of its turn_rewards; got {reward:g} and {math.fsum(by_turn):g}; give their sum"
        )
    return replace(score, reward=reward, status=Status(score.status), turn_rewards=by_turn)


def checked_reward(value: Any) -> float:
    """Return a reward as a float that can be computed with.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is not finite, or beyond LARGEST_REWARD.
    """
    # numpy's bool is no Real. It is recognised by name, so that a worker need not load numpy.
    is_numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not (isinstance(value, Real) or is_numpy_bool):
        raise TypeError(f"a reward must be a number; got {type(value).__name__}; return a float, a bool or a Score")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite; got {reward}; return 0 for an answer that cannot be judged")
    if abs(reward) > LARGEST_REWARD:
        raise ValueError(f"a reward must lie within +-{LARGEST_REWARD:g}; got {reward:g}; scale it down")
    return reward


def check_index(index: int) -> None:
    """Refuse a negative index, which would otherwise silently give another prompt."""
    if index < 0:
        raise TaskError(f"a training prompt's index must be 0 or more; got {index}; count from 0")
