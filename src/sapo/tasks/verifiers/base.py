"""What a verifier is, and what the verifiers share.

A verifier takes a finished completion's text and its prompt and returns a Score. What it cannot read is `unparseable`,
which is not the same as wrong. It keeps no state between calls, so that the order of completions means nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError


class Verifier(Protocol):
    """Judges one completion.

    A verifier that must run outside this process, since it may hang, crash or run the user's code, has an attribute
    `isolated = True` and its `deadline` in seconds; `workers/pool.py` runs it. What it has to load first it may load in
    a method `prepare()`, and make what it needs for a prompt in `prepare_prompt(prompt)`; neither is part of a
    completion's deadline. What it cannot do without, and is cheap to look for, it may look for in `check_machine()`,
    which is called where it is named. `pure = True` says that its scores depend on nothing but the text and the prompt.
    """

    def __call__(self, text: str, prompt: Prompt, /) -> Score: ...


@dataclass(frozen=True)
class IsolatedOptions:
    """What every verifier with a deadline has."""

    isolated: ClassVar[bool] = True
    deadline: float = 10.0
    """Seconds for one completion, after which the worker process is killed: `verifier_error` for that completion."""

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
    """Seconds that a verifier needs at most in a worker; 0 for one that runs here."""
    plain = verifier.func if isinstance(verifier, functools.partial) else verifier
    return float(getattr(plain, "deadline", 0.0)) if getattr(plain, "isolated", False) else 0.0


def prepare(verifier: Verifier) -> None:
    """Let a verifier load what it needs before the first deadline starts."""
    if (load := getattr(verifier, "prepare", None)) is not None:
        load()


def prepare_prompt(verifier: Verifier, prompt: Prompt) -> None:
    """Let a verifier make what it needs for a prompt before the deadline of a completion starts."""
    if (make := getattr(verifier, "prepare_prompt", None)) is not None:
        make(prompt)


def check_machine(verifier: Verifier) -> None:
    """Let a verifier refuse a machine on which it could judge nothing, before a run begins.

    Raises:
        TaskError: what is missing here.
    """
    if (check := getattr(verifier, "check_machine", None)) is not None:
        check()


def is_pure(verifier: Verifier) -> bool:
    """Whether equal (text, prompt) have equal scores by construction: so do all that run in this process."""
    plain = verifier.func if isinstance(verifier, functools.partial) else verifier
    return bool(getattr(plain, "pure", not getattr(plain, "isolated", False)))


def unparseable(detail: str) -> Score:
    """The score of a completion in which no answer can be read."""
    return Score(0.0, Status.UNPARSEABLE, detail)


def reference_of(prompt: Prompt) -> str:
    """The prompt's answer.

    Raises:
        ValueError: it has none.
    """
    if prompt.answer is None:
        raise ValueError("this verifier compares with the prompt's answer; got none; set answer_field")
    return prompt.answer


def brief(text: str, length: int = 60) -> str:
    """A text for a message, on one line and cut."""
    shown = repr(text[: length + 1])
    return shown if len(text) <= length else f"{shown[:length]}...'"
