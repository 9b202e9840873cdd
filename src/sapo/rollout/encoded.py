"""Token ids of the prompts of one task, kept so that each prompt goes through the tokenizer once in a run.

A row of a data set is asked for at least twice: by the check before a run and by the first epoch; a held-out problem at
every evaluation. The ids are kept as int32, 4 bytes a token where a tuple of Python ints takes about 40, under a digest
of what they are made of, so that the memory of a row does not grow with its text.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from sapo.data import PictureTokens, Prompt

MAX_BYTES = 256 * 2**20
"""Memory for the ids of one task: about 400,000 rows of 120 tokens."""

# A digest, the header of a bytes object and their share of the dict: 135 to 180 bytes on CPython 3.11.
BYTES_PER_PROMPT = 180

_Kept = bytes | tuple[tuple[bytes, ...], ...]
"""Token ids as int32; of a prompt with pictures also the places of each, and the axes of positions."""


class EncodedPrompts:
    """Token ids by prompt, up to a number of bytes.

    A full store keeps what it has and adds nothing, so that later rows are encoded each time they are asked. Dropping
    the least recently used instead would drop every row just before its turn, because an epoch asks all rows in turn.

    >>> encoded = EncodedPrompts()
    >>> prompt = Prompt(id=0, task="sums", text="1+1=")
    >>> encoded.find(prompt)
    >>> encoded.add(prompt, (5, 3, 5, 9))
    >>> encoded.find(Prompt(id=7, task="sums", text="1+1="))
    ((5, 3, 5, 9), None)
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._ids: dict[bytes, _Kept] = {}
        self._tokenizer: Any = None
        self._template: str | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, prompt: Prompt) -> tuple[tuple[int, ...], PictureTokens | None] | None:
        """Return the token ids of a prompt, and which stand for pictures; None where they are not kept."""
        kept = self._ids.get(_digest(prompt))
        if kept is None:
            return None
        if isinstance(kept, bytes):
            return tuple(array("i", kept)), None
        (ids,), *parts = kept
        places, positions = (tuple(tuple(array("i", part)) for part in of) for of in parts)
        return tuple(array("i", ids)), PictureTokens(places, positions or None)

    def add(self, prompt: Prompt, token_ids: tuple[int, ...], picture_tokens: PictureTokens | None = None) -> None:
        """Keep the token ids of a prompt, unless there is no room for them."""
        kept: _Kept = array("i", token_ids).tobytes()
        size = len(kept) + BYTES_PER_PROMPT
        if picture_tokens is not None:
            parts = ((token_ids,), picture_tokens.places, picture_tokens.positions or ())
            kept = tuple(tuple(array("i", part).tobytes() for part in of) for of in parts)
            size = sum(len(part) + BYTES_PER_PROMPT for of in kept for part in of)
        if self._bytes + size <= self._max_bytes:
            self._ids[_digest(prompt)] = kept
            self._bytes += size

    def reset_for(self, tokenizer: Any) -> None:
        """Drop all ids unless this tokenizer, with its present chat template, made them."""
        template = getattr(tokenizer, "chat_template", None)
        if tokenizer is not self._tokenizer or template != self._template:
            self._tokenizer, self._template = tokenizer, template
            self._ids, self._bytes = {}, 0


def tools_of(prompt: Prompt) -> list[Any] | None:
    """Return the tools that a chat offers to the model: objects in the column `tools`. None where there are none."""
    tools = prompt.metadata.get("tools")
    offered = "messages" in prompt.metadata and isinstance(tools, list) and all(isinstance(t, dict) for t in tools)
    return (tools or None) if offered else None


def _digest(prompt: Prompt) -> bytes:
    """Return a digest of what a format makes token ids of: the text, the pictures, and a chat's messages and tools."""
    messages, tools = prompt.metadata.get("messages"), tools_of(prompt)
    source: tuple[Any, ...] = (prompt.identity, None if messages is None else [dict(m) for m in messages])
    if tools is not None:
        source = (*source, tools)
    return hashlib.blake2b(repr(source).encode("utf-8", "surrogatepass"), digest_size=16).digest()
