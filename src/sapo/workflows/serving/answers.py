"""What OpenAI's clients get: answers in one, and the events of streamed ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sapo.workflows.serving.served import Piece, Token
from sapo.workflows.serving.tools import OfferedTools


def new_id(prefix: str) -> str:
    """Return an identifier that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _finish(drawn: str | None, calls: Sequence[Any]) -> str | None:
    """Return why an answer ended. One that was cut at its length is not said to be whole, calls or none."""
    return "tool_calls" if calls and drawn == "stop" else drawn


class ChatAnswers:
    """The shapes of answers to a chat.

    Args:
        tools: those that were offered. The text of an answer then waits until it is whole: it may become a call.
    """

    def __init__(self, model: str, logprobs: bool, tools: OfferedTools | None = None) -> None:
        self.logprobs, self.tools = logprobs, tools
        self._held: dict[int, str] = {}
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the first events of a stream: whose turn it is."""
        turn = {"role": "assistant", "content": ""}
        return [self._event(number, turn, None, None) for number in range(choices)]

    def event(self, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        finish = piece.finish
        if self.tools is not None:
            text = self._held.pop(piece.choice, "") + piece.text
            if finish is None:
                self._held[piece.choice], delta = text, {}
            else:
                said, calls = self.tools.split(text)
                delta = {"content": said} if said else {}
                if calls:
                    delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
                finish = _finish(finish, calls)
        return self._event(piece.choice, delta, self._logprobs(piece.tokens), finish)

    def _event(self, choice: int, delta: Mapping[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        made = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [made]}

    def whole(self, choices: Sequence[Sequence[Piece]], used: Mapping[str, int]) -> dict[str, Any]:
        """Return an answer in one."""
        made = [self._choice(number, pieces) for number, pieces in enumerate(choices)]
        return {**self.head, "object": "chat.completion", "choices": made, "usage": used}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        said: str | None = "".join(p.text for p in pieces)
        calls: list[dict[str, Any]] = []
        if self.tools is not None:
            said, calls = self.tools.split(said or "")
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        return {
            "index": number,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": self._logprobs(t for p in pieces for t in p.tokens),
            "finish_reason": _finish(pieces[-1].finish, calls),
        }

    def last(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Return the event that has the numbers of tokens."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": used}

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [{**_shown(token), "top_logprobs": [_shown(other) for other in token.likeliest]} for token in tokens]
        return {"content": content, "refusal": None}


class CompletionAnswers:
    """The shapes of answers to /v1/completions.

    Args:
        likeliest: tokens that are shown beside each drawn one.
    """

    def __init__(self, model: str, logprobs: bool, likeliest: int = 0) -> None:
        self.logprobs, self.likeliest = logprobs, likeliest
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return no events."""
        return []

    def event(self, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece."""
        return {**self.head, "choices": [self._choice(piece.choice, [piece])]}

    def whole(self, choices: Sequence[Sequence[Piece]], used: Mapping[str, int]) -> dict[str, Any]:
        """Return an answer in one."""
        made = [self._choice(number, pieces) for number, pieces in enumerate(choices)]
        return {**self.head, "choices": made, "usage": used}

    def last(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Return the event that has the numbers of tokens."""
        return {**self.head, "choices": [], "usage": used}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "index": number,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._logprobs(number, [t for p in pieces for t in p.tokens]),
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets, at = [], self._offsets.get(choice, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        self._offsets[choice] = at
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [_likeliest(t) for t in tokens] if self.likeliest else None,
            "text_offset": offsets,
        }


def _shown(token: Token) -> dict[str, Any]:
    # A token may be part of a character, whose bytes its text does not have.
    whole = "\N{REPLACEMENT CHARACTER}" not in token.text
    return {"token": token.text, "logprob": token.logprob, "bytes": list(_bytes(token.text)) if whole else None}


def _likeliest(token: Token) -> dict[str, float]:
    """Return the log-probabilities of the likeliest tokens and of the drawn one, by their texts.

    Of tokens that have one text, which are parts of characters, the likeliest is shown.

    >>> _likeliest(Token("b", -3.0, (Token("?", -0.1), Token("?", -1.0))))
    {'?': -0.1, 'b': -3.0}
    """
    shown = {other.text: other.logprob for other in reversed(token.likeliest)}
    return dict(sorted({token.text: token.logprob, **shown}.items(), key=lambda pair: -pair[1]))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
