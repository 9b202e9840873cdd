"""Keep what a model thinks apart from what it answers: a verifier is shown the text after the thoughts alone.

Reasoning models write a draft between markers, with answers that they reject later. Without this, the last box of a
draft would be the answer of a completion that gives none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import (
    Verifier,
    check_machine,
    check_reference,
    deadline_of,
    is_pure,
    prepare,
    prepare_prompt,
    unparseable,
)

# Markers of DeepSeek-R1 and Qwen3, of prompts that ask for tags, of Magistral, of Sky-T1 and of Kimi.
THINKING_END = ("</think>", "</thinking>", "</thought>", "[/THINK]", "<|end_of_thought|>", "◁/think▷")

OPTIONS = ("thinking_end", "thinking_start")


@dataclass(frozen=True)
class AfterThoughts:
    """Judges what follows a completion's thoughts, by another verifier.

    >>> from sapo.tasks.verifiers.numbers import last_number
    >>> judge = AfterThoughts(last_number, THINKING_END, ("<think>",))
    >>> prompt = Prompt(id=0, task="t", text="?", answer="5")
    >>> [judge(text, prompt).reward for text in ("<think> 4? </think> 5", "5 <think> or 6", "<think> 5 </think>")]
    [1.0, 0.0, 0.0]
    """

    verifier: Verifier
    ends: tuple[str, ...]
    """Markers that end a thought: everything up to the last of them is dropped. None of them: nothing is."""
    starts: tuple[str, ...]
    """Markers that begin a thought. Where one is left in the rest, the thought is unfinished and there is no answer.
    An empty one stands for a prompt that begins the thought: a completion without an end has no answer."""

    @property
    def isolated(self) -> bool:
        """Return whether the verifier must run in a worker."""
        return deadline_of(self.verifier) > 0

    @property
    def deadline(self) -> float:
        """Return the deadline of the verifier, in seconds."""
        return deadline_of(self.verifier)

    @property
    def pure(self) -> bool:
        """Return whether the verifier is pure."""
        return is_pure(self.verifier)

    def prepare(self) -> None:
        """Prepare the verifier."""
        prepare(self.verifier)

    def prepare_prompt(self, prompt: Prompt) -> None:
        """Let the verifier load what it needs for a prompt."""
        prepare_prompt(self.verifier, prompt)

    def check_reference(self, prompt: Prompt) -> None:
        """Let the verifier read the prompt's answer."""
        check_reference(self.verifier, prompt)

    def check_machine(self) -> None:
        """Let the verifier check the machine."""
        check_machine(self.verifier)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        answer = after_thoughts(text, self.ends, self.starts)
        if answer is None:
            return unparseable("the thought is unfinished, so that there is no answer")
        if not answer.strip() and text.strip():
            return unparseable("no answer after the thoughts")
        return self.verifier(answer, prompt)


def after_thoughts(text: str, ends: Sequence[str] = THINKING_END, starts: Sequence[str] | None = None) -> str | None:
    """Return what follows the last marker that ends a thought, or None where a thought is unfinished.

    Args:
        text: a completion.
        ends: markers that end a thought.
        starts: markers that begin one; None takes those that belong to `ends`.

    >>> after_thoughts("<think>4?</think> 5"), after_thoughts("<think>4?"), after_thoughts("5")
    (' 5', None, '5')
    """
    cut = max((text.rfind(end) + len(end) for end in ends if end in text), default=0)
    rest = text[cut:]
    begun = starts_of(ends) if starts is None else starts
    unfinished = any(start in rest for start in begun if start) or ("" in begun and cut == 0)
    return None if unfinished else rest


def starts_of(ends: Sequence[str]) -> tuple[str, ...]:
    """Return the markers that begin what `ends` end, where their spelling says so: <x> for </x>, [X] for [/X].

    >>> starts_of(["</think>", "<|end_of_thought|>", "FINAL:"])
    ('<think>', '<|begin_of_thought|>')
    """
    opened = [re.sub(r"^([<\[◁])/", r"\1", end).replace("|end_of_", "|begin_of_") for end in ends]
    return tuple(start for start, end in zip(opened, ends, strict=True) if start != end)


def apply_thinking(verifier: Verifier, options: dict[str, Any], *, by_default: bool) -> Verifier:
    """Return a verifier that reads the answer alone, as the options `thinking_end` and `thinking_start` say.

    Args:
        verifier: any verifier.
        options: of the recipe; those named in OPTIONS are removed. null turns one off.
        by_default: whether to drop thoughts where the options do not say.

    Raises:
        TaskError: an option is no text and no list of texts.
    """
    asked = any(name in options for name in OPTIONS)
    ends = _markers("thinking_end", options.pop("thinking_end", THINKING_END))
    starts = _markers("thinking_start", options.pop("thinking_start", starts_of(ends)))
    if not (by_default or asked) or not (ends or starts):
        return verifier
    return AfterThoughts(verifier, ends, starts)


def _markers(name: str, value: Any) -> tuple[str, ...]:
    if value is None or value is False:
        return ()
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (None,)
    if not all(isinstance(marker, str) and (marker or name == "thinking_start") for marker in found):
        raise TaskError(f"{name} must be a marker, a list of markers, or null for none; got {value!r}")
    return found
