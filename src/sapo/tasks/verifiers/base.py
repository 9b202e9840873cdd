"""The protocol of verifiers, and helpers that they share.

A verifier takes the text of a finished completion and its prompt, and returns a Score. A completion without a readable
answer is `unparseable`, which is not the same as wrong. A verifier keeps no state between calls, so that the order of
completions does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.utils.text import name_error


class Verifier(Protocol):
    """Scores one completion.

    A verifier that may hang, crash or run a user's code has the attributes `isolated = True` and `deadline`, in
    seconds. `workers/pool.py` then runs it in a worker process. These are optional:

    - `prepare()` loads what the verifier needs, and `prepare_prompt(prompt)` what it needs for one prompt. Neither
      counts towards the deadline of a completion.
    - `check_reference(prompt)` raises a ValueError where it cannot read the prompt's answer. It is called for every row
      when a recipe is loaded. Without it, a verifier that is not isolated is called on `PROBE` instead.
    - `check_machine()` refuses a machine on which the verifier cannot work. It is called when a recipe is loaded.
    - `batched = True` says that all completions of a prompt are judged by one call of `score_batch(texts, prompt)`,
      which returns a list of scores, with None for a completion that the verifier does not judge.
    - `pure = True` says that scores depend only on the text and the prompt.
    """

    def __call__(self, text: str, prompt: Prompt, /) -> Score: ...


@dataclass(frozen=True)
class IsolatedOptions:
    """Options of every verifier with a deadline."""

    isolated: ClassVar[bool] = True
    deadline: float = 10.0
    """Seconds for one completion. After them the worker process is killed, and the completion is a `verifier_error`."""

    def __post_init__(self) -> None:
        check_deadline(self.deadline)


def check_deadline(deadline: Any) -> None:
    """Refuse a deadline that is no positive number of seconds."""
    number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if not number or not 0 < deadline < float("inf"):
        raise TaskError(
            f"a verifier's deadline must be a positive number of seconds; got {deadline!r}; set deadline: 10"
        )


def deadline_of(verifier: Verifier) -> float:
    """Return the deadline in seconds of a verifier that runs in a worker, and 0 for one that runs in this process."""
    plain = verifier.func if isinstance(verifier, functools.partial) else verifier
    return float(getattr(plain, "deadline", 0.0)) if getattr(plain, "isolated", False) else 0.0


def prepare(verifier: Verifier) -> None:
    """Let a verifier load what it needs, before the first deadline starts."""
    if (load := getattr(verifier, "prepare", None)) is not None:
        load()


def prepare_prompt(verifier: Verifier, prompt: Prompt) -> None:
    """Let a verifier load what it needs for a prompt, before the deadline of a completion starts."""
    if (make := getattr(verifier, "prepare_prompt", None)) is not None:
        make(prompt)


def check_machine(verifier: Verifier) -> None:
    """Let a verifier refuse a machine on which it cannot work, before a run begins.

    Raises:
        TaskError: the verifier cannot work here; the message says what is missing.
    """
    if (check := getattr(verifier, "check_machine", None)) is not None:
        check()


ABSTAINED = Score(0.0, Status.UNPARSEABLE, "the reward function abstained: it returned None")
"""The score of a completion that no verifier judged."""


def is_batched(verifier: Verifier) -> bool:
    """Return whether a verifier judges all completions of a prompt in one call."""
    return bool(getattr(verifier, "batched", False))


def score_batch(verifier: Verifier, texts: Sequence[str], prompt: Prompt) -> list[Score | None]:
    """Score completions of a prompt, None where the verifier abstains."""
    if hasattr(verifier, "score_batch"):
        found: list[Score | None] = verifier.score_batch(texts, prompt)
        return found
    return [verifier(text, prompt) for text in texts]


def score_many(verifier: Verifier, requests: Sequence[tuple[Sequence[str], Prompt]]) -> list[list[Score | None]]:
    """Score completions of several prompts, None where the verifier abstains; an exception is a `verifier_error`."""
    if hasattr(verifier, "score_many"):
        found: list[list[Score | None]] = verifier.score_many(requests)
        return found
    return [_guarded_batch(verifier, texts, prompt) for texts, prompt in requests]


def _guarded_batch(verifier: Verifier, texts: Sequence[str], prompt: Prompt) -> list[Score | None]:
    try:
        return score_batch(verifier, texts, prompt)
    except Exception as error:
        return [Score(0.0, Status.VERIFIER_ERROR, name_error(error))] * len(texts)


PROBE = "0"
"""A completion by which it is found out whether a verifier can read the answer of a prompt."""


def check_reference(verifier: Verifier, prompt: Prompt) -> None:
    """Refuse a prompt whose answer a verifier cannot read, so that no completion could be right.

    Raises:
        ValueError: the verifier cannot read it.
    """
    if (check := getattr(verifier, "check_reference", None)) is not None:
        check(prompt)
    elif not deadline_of(verifier):
        verifier(PROBE, prompt)


def is_pure(verifier: Verifier) -> bool:
    """Return whether equal (text, prompt) always have equal scores, as with all verifiers that run in this process."""
    plain = verifier.func if isinstance(verifier, functools.partial) else verifier
    return bool(getattr(plain, "pure", not getattr(plain, "isolated", False)))


def unparseable(detail: str) -> Score:
    """Return the score of a completion without a readable answer."""
    return Score(0.0, Status.UNPARSEABLE, detail)


def reference_of(prompt: Prompt) -> str:
    """Return the prompt's answer.

    Raises:
        ValueError: the prompt has none.
    """
    if prompt.answer is None:
        raise ValueError("this verifier compares with the prompt's answer; got none; set answer_field")
    return prompt.answer


def brief(text: str, length: int = 60) -> str:
    """Return a text for a message, cut and on one line."""
    shown = repr(text[: length + 1])
    return shown if len(text) <= length else f"{shown[:length]}...'"
