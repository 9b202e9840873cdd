"""How a chat template lays out messages behind an assistant's turn, found by a dummy conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sapo.rollout.episodes.pieces import Piece

_QUESTION, ANSWER = "qzquestionqz", "qzanswerqz"
BODY = "qzbody{}qz"
"""Texts that stand for contents in the dummy conversation; a message's has its number."""

CALL_ID = "call00000"  # nine letters and digits, as Mistral's templates demand


@dataclass(frozen=True)
class Form:
    """How messages are written so that a template takes them."""

    parts: bool = False
    """Contents are lists of parts, as of vision-language models."""
    arguments: Literal["object", "text"] = "object"
    calls: Literal["all", "one", "none"] = "all"
    """How many calls of an assistant's turn the template is shown; with none they are the turn's text."""

    def applied(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages in this form."""
        return [self._message(dict(m)) for m in messages]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        calls = message.get("tool_calls")
        if calls and self.calls == "none":
            message["content"] = " ".join(json.dumps(call["function"]["arguments"]) for call in calls)
            del message["tool_calls"]
        elif calls:
            calls = calls[:1] if self.calls == "one" else calls
            message["tool_calls"] = [{**call, "function": self._function(dict(call["function"]))} for call in calls]
        if self.parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        if self.arguments == "text" and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"])
        return function


FORMS = tuple(
    Form(parts, arguments, calls)
    for parts in (False, True)
    for calls in ("all", "one", "none")
    for arguments in ("object", "text")
)


@dataclass(frozen=True)
class Layout:
    """What a template writes around the contents of messages that follow an assistant's turn."""

    form: Form
    head: tuple[dict[str, Any], ...]
    """The dummy conversation before the messages."""
    pieces: tuple[str, ...]
    """What the template writes before, between and behind the contents, from the end of the assistant's turn on."""
    before: str
    """What it writes up to there."""
    end: int
    """The token that ends an assistant's turn which others follow."""
    ends: frozenset[int]
    """Tokens that the model may have ended it with."""


def cut_content(said: str, whole: str, mark: str) -> Piece:
    """Return a content as the template writes it, trimmed perhaps, or as JSON.

    Args:
        said: rendering with the content.
        whole: rendering with a mark in its place.

    Raises:
        ValueError: the template writes something else around it.
    """
    before, _, after = whole.partition(mark)
    if not (said.startswith(before) and said.endswith(after) and len(said) >= len(before) + len(after)):
        raise ValueError("the chat template writes something else around this content than around others")
    return Piece(said[len(before) : len(said) - len(after)], ours=False)


def dummy_before(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation up to an assistant's turn that these messages may follow."""
    called = [m for m in messages if m["role"] == "tool"]
    calls = [
        {
            "id": m.get("tool_call_id") or CALL_ID,
            "type": "function",
            "function": {"name": m.get("name") or "tool", "arguments": {"x": ANSWER}},
        }
        for m in called
    ]
    answer = (
        {"role": "assistant", "content": "", "tool_calls": calls} if calls else {"role": "assistant", "content": ANSWER}
    )
    return [{"role": "user", "content": _QUESTION}, answer]


def with_contents(messages: Sequence[Mapping[str, Any]], contents: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages with other contents."""
    return [{**m, "content": content} for m, content in zip(messages, contents, strict=True)]


def split_at(text: str, marks: Sequence[str]) -> tuple[str, ...]:
    """Return what lies between marks.

    Raises:
        ValueError: one is missing, comes twice, or in another order.
    """
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("the chat template does not write each message once and in order")
        parts.append(before)
    return (*parts, text)


def common_length(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def first_mark(text: str, marks: Sequence[str]) -> int:
    """Return the place of the first of some marks, the end of the text where there is none."""
    return min((at for m in marks if (at := text.find(m)) >= 0), default=len(text))
