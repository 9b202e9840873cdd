"""What a task is: a source of prompts, numbered without end, and the judge of the answers to them.

A task knows nothing of tokenizers, batches or models. Its training prompts are a pure function of (seed, index), so
that a resumed run, or one on more ranks, asks exactly the same questions in the same order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from sapo.data import Prompt, Score


class TaskError(ValueError):
    """The user's mistake in a task: an option, a file, a row or a verifier."""


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of an error message, or nothing.

    >>> did_you_mean("arithmatic", ["arithmetic", "file"])
    "; did you mean 'arithmetic'?"
    >>> did_you_mean("xyz", ["arithmetic", "file"])
    ''
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_index(index: int) -> None:
    """Refuse a negative index, which would otherwise quietly name another prompt."""
    if index < 0:
        raise TaskError(f"a training prompt's index must be 0 or more; got {index}; count from 0")
