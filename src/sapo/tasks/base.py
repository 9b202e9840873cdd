"""What a task is: a source of prompts, numbered without end, and the judge of the answers to them.

A task knows nothing of tokenizers, batches or models. Its training prompts are a pure function of (seed, index), so
that a resumed run, or one on more ranks, asks exactly the same questions in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError


@runtime_checkable
class Task(Protocol):
    """Prompts and their verifier.

    `verify` is called for finished completions only. A task that also wants the truncated ones sets an attribute
    `score_truncated = True`; without it they get reward 0 and status `truncated`.
    """

    name: str

    def train_prompt(self, index: int) -> Prompt:
        """The training prompt of `index` = 0, 1, 2, ...; its `id` is the index, `token_ids` are left empty."""
        ...

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` of a fixed list of distinct prompts never trained on; fewer when there are no more."""
        ...

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Judge a finished completion; an exception raised here becomes the status `verifier_error`."""
        ...


@runtime_checkable
class FiniteTask(Task, Protocol):
    """A task whose training prompts are rows that come round again, every row once in `num_train` indices."""

    @property
    def num_train(self) -> int:
        """Training rows: the length of an epoch."""
        ...

    def train_row(self, index: int) -> int:
        """Which of the rows 0..num_train-1 the training prompt of `index` asks."""
        ...


@runtime_checkable
class WorkedTask(Task, Protocol):
    """A task that can also write a right solution, which is what a cold start learns from."""

    def worked_example(self, index: int) -> tuple[Prompt, str]:
        """The training prompt of `index` and a completion that `verify` rewards with 1."""
        ...


class JudgedTask:
    """A task whose judge is one verifier: a batch of its completions goes to the verifier's workers at once.

    To judge in another way, override `verify`: `verifier` is then left alone.
    """

    verifier: Callable[[str, Prompt], Score]

    def verify(self, text: str, prompt: Prompt) -> Score:
        """What the verifier says."""
        return self.verifier(text, prompt)


def checked_score(score: Any) -> Score:
    """`score` as a Score with a finite float for a reward.

    Raises:
        TypeError: it is no Score, or its reward is no real number.
        ValueError: its reward or a further figure is not finite, or its status is none.
    """
    if not isinstance(score, Score):
        raise TypeError(f"verify must return a Score; got {type(score).__name__}")
    for name, figure in score.figures.items():  # a NaN would only be found when the metrics are written
        if not (isinstance(figure, Real) and math.isfinite(figure)):
            raise ValueError(f"a verifier's figures must be finite numbers; got {name}={figure!r}; leave it out")
    return replace(score, reward=checked_reward(score.reward), status=Status(score.status))


def checked_reward(value: Any) -> float:
    """`value` as a finite float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not finite.
    """
    # numpy's bool is no Real; it is recognised by name, so that a worker need not load numpy.
    is_numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not (isinstance(value, Real) or is_numpy_bool):
        raise TypeError(f"a reward must be a number; got {type(value).__name__}; return a float, a bool or a Score")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be finite; got {reward}; return 0 for an answer that cannot be judged")
    return reward


def check_index(index: int) -> None:
    """Refuse a negative index, which would otherwise quietly name another prompt."""
    if index < 0:
        raise TaskError(f"a training prompt's index must be 0 or more; got {index}; count from 0")
