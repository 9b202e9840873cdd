"""Environments around a source of prompts: rows of a file, or prompts without end."""

from __future__ import annotations

from typing import Any

from sapo.data import Prompt, Score
from sapo.utils.hashing import hashed_integer


class Wrapped:
    """A task whose prompts, and what else it has, are another's.

    Args:
        task: the source.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self.name: str = task.name
        if hasattr(task, "train_row"):  # what tells rows from prompts without end
            self.train_row = task.train_row

    def __getattr__(self, name: str) -> Any:
        if name == "_task":  # in a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._task, name)  # notices, score_truncated, ... where the task has them

    @property
    def source(self) -> Any:
        """Return the task whose prompts these are."""
        return self._task

    @property
    def num_train(self) -> int:
        """Return the number of training rows, where the task has rows."""
        number: int = self._task.num_train
        return number

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of the task."""
        prompt: Prompt = self._task.train_prompt(index)
        return prompt

    def held_out(self, count: int) -> list[Prompt]:
        """Return the held-out prompts of the task."""
        prompts: list[Prompt] = self._task.held_out(count)
        return prompts

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Return the task's verdict about a text."""
        score: Score = self._task.verify(text, prompt)
        return score


def source_of(task: Any) -> Any:
    """Return the task whose prompts a task has: itself, unless it is wrapped."""
    while isinstance(task, Wrapped):
        task = task.source
    return task


class SamePrompt:
    """Prompts of one text without end: `metadata["seed"]` tells an environment which episode to play.

    >>> source = SamePrompt("Guess my number.")
    >>> source.train_prompt(3).text, source.train_prompt(3) == source.train_prompt(3)
    ('Guess my number.', True)
    """

    def __init__(self, text: str, name: str = "same_prompt", seed: int = 0) -> None:
        self.text, self.name, self.seed = text, name, seed

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of an index, with a seed of 31 bits."""
        return self._prompt("train", index)

    def held_out(self, count: int) -> list[Prompt]:
        """Return prompts with other seeds."""
        return [self._prompt("held_out", index) for index in range(count)]

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Refuse to score: only the environment can.

        Raises:
            TypeError: always.
        """
        raise TypeError("the task same_prompt has no verifier; the environment must give the reward")

    def _prompt(self, side: str, index: int) -> Prompt:
        chosen = hashed_integer(side, self.seed if side == "train" else 0, index) % 2**31
        return Prompt(index, self.name, self.text, metadata={"seed": chosen})


def row_of(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as a row of a data set: its text or messages, its answer and all other columns."""
    row = {key: value for key, value in prompt.metadata.items() if key != "messages"}
    return {"prompt": prompt.metadata.get("messages", prompt.text), "answer": prompt.answer, **row}


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as messages of a chat."""
    found = prompt.metadata.get("messages")
    return [dict(m) for m in found] if found else [{"role": "user", "content": prompt.text}]


def real(value: Any, what: str) -> float:
    """Return a reward as a number, for a sum.

    Raises:
        TypeError: it is none.
    """
    if value is None:
        return 0.0
    if isinstance(value, str | bytes):  # float() would read them
        raise TypeError(f"{what} must be a number; got {value!r:.40}")
    return float(value)
