"""What verifiers say of single answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sapo.data import Prompt, Score
from sapo.tasks.verifiers.base import Verifier
from sapo.tasks.verifiers.registry import build_verifier


@cache
def _verifier(name: str) -> Verifier:
    limits = {"minimum": 0, "maximum": 999} if name == "boxed_integer" else {}
    return build_verifier({"name": name, **limits})


def reward_of(verifier: str, reference: str, text: str, options: Sequence[str] = ()) -> float:
    """The reward of a completion, by a verifier of its ordinary settings."""
    metadata = {"options": list(options)} if options else {}
    return _verifier(verifier)(text, Prompt(id=0, task="t", text="?", answer=reference, metadata=metadata)).reward


def judge(spec: Any, text: str, answer: str | None = None, **metadata: Any) -> Score:
    """The score of a completion, by a verifier as a recipe writes it."""
    return build_verifier(spec)(text, Prompt(id=0, task="t", text="?", answer=answer, metadata=metadata))
