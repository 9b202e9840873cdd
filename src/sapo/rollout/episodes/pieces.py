"""Encode what a chat template writes, in pieces: its special tokens, and plain text in between."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sapo.utils.text import first_line


@dataclass(frozen=True)
class Piece:
    """A part of a rendering.

    >>> Piece("<|im_end|>", ours=False).text
    '<|im_end|>'
    """

    text: str
    ours: bool
    """Written by the template; otherwise by an environment, and nothing in it is special."""


class PieceEncoder:
    """Encodes pieces of a rendering by a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the special tokens by their texts."""
        return {text: number for number, (text, _, _) in self.added.items()}

    @cached_property
    def added(self) -> dict[int, tuple[str, bool, bool]]:
        """Return each special token's text, and whether it takes the blanks before and after it along."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        found = {i: (str(t.content), bool(t.lstrip), bool(t.rstrip)) for i, t in added.items() if t.special}
        own = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return {**{i: (str(text), False, False) for i, text in own}, **found}

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Return a pattern that finds special tokens in a text."""
        texts = sorted((text for text, _, _ in self.added.values() if text), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def encode(self, pieces: Iterable[Piece], strip: bool = False) -> tuple[int, ...]:
        """Return the ids of pieces: special tokens in the template's own, plain text in between.

        Text between two special tokens is encoded in one piece, as a whole rendering would be.

        Args:
            strip: the token before takes the blanks behind it along.
        """
        ids: list[int] = []
        run = ""
        for piece in pieces:
            at = 0
            for found in self.specials.finditer(piece.text) if piece.ours else ():
                number = self.ids[found[0]]
                _, left, right = self.added[number]
                run += piece.text[at : found.start()]
                ids += [*self._plain(run.lstrip() if strip else run, left), number]
                run, at, strip = "", found.end(), right
            run += piece.text[at:]
        return (*ids, *self._plain(run.lstrip() if strip else run, False))

    def _plain(self, text: str, strip: bool) -> list[int]:
        text = text.rstrip() if strip else text
        if not text:
            return []
        return list(self._encode(text, split_special_tokens=True))

    def encode_whole(self, text: str) -> tuple[int, ...]:
        """Return the ids of a rendering as transformers encodes it."""
        return self._encode(text)

    def _encode(self, text: str, **options: bool) -> tuple[int, ...]:
        try:
            return tuple(int(i) for i in self.tokenizer.encode(text, add_special_tokens=False, **options))
        except Exception as error:  # a tokenizer of characters that has not all of them
            raise ValueError(f"the tokenizer cannot encode {text!r:.60}: {first_line(error)}") from error
