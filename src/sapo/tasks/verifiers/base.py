"""The protocol of verifiers, and helpers that they share.

A verifier takes the text of a finished completion and its prompt, and returns a Score. A completion without a readable
answer is `unparseable`, which is not the same as wrong. A verifier keeps no state between calls, so that the order of
completions does not matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError


class Verifier(Protocol):
    """Scores one completion.

    A verifier that may hang, crash or run a user's code has the attributes `isolated = True` and `deadline`, in
    seconds. `workers/pool.py` then runs it in a worker process. These are optional:

    - `prepare()` loads what the verifier needs, and `prepare_prompt(prompt)` what it needs for one prompt. Neither
      counts towards the deadline of a completion.
    - `check_machine()` refuses a machine on which the verifier cannot work. It is called when a recipe is loaded.
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
