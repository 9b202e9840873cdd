"""Pictures of prompts as they are kept: encoded bytes or a file, named by a hash of its content.

A picture is never kept decoded beyond the pass that needs it: a JPEG of 138 kB becomes 58 MB of patches.
`sapo.data.picture_files` reads, checks and decodes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sapo.errors import PictureError
from sapo.utils.hashing import content_hash

PICTURE_MARKER = "<image>"
"""Stands in a question where a picture is shown. Without any, the pictures come before the question."""


@dataclass(frozen=True)
class Picture:
    """One picture, which is equal to every other of the same content, wherever it lies.

    >>> dot = Picture("ab12", size=(1, 1), data=b"...")
    >>> dot == Picture("ab12", size=(1, 1), path="dot.png"), dot.size
    (True, (1, 1))
    """

    sha256: str
    """Hash of the encoded bytes, in hexadecimal."""
    size: tuple[int, int] = field(compare=False)
    """Width and height in pixels, as a person sees it: turned upright."""
    data: bytes | None = field(default=None, compare=False, repr=False)
    """The encoded bytes; None for a picture that stays in its file."""
    path: str | None = field(default=None, compare=False)
    """The file."""

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            PictureError: its file is missing, or holds another picture by now.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None, "a picture has bytes or a file"
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise PictureError(
                f"the picture {self.path} cannot be read: {error.strerror}; put the file back where it was"
            ) from error
        if content_hash(data) != self.sha256:
            raise PictureError(
                f"the picture {self.path} has changed since its row was read (SHA-256 {self.sha256[:16]} then, "
                f"{content_hash(data)[:16]} now); put the old file back"
            )
        return data


@dataclass(frozen=True)
class PictureTokens:
    """The tokens of an encoded prompt that stand for its pictures.

    A prompt of five tokens whose second to fourth are a picture of 1 x 3 tokens, with the positions that a model with
    multimodal rotary embedding gives them:

    >>> tokens = PictureTokens(places=((1, 2, 3),), positions=((0, 1, 1, 1, 4), (0, 1, 1, 1, 4), (0, 1, 2, 3, 4)))
    >>> tokens.next_position
    5
    """

    places: tuple[tuple[int, ...], ...]
    """Which of the prompt's tokens stand for each picture, ascending. The encoding alone tells: a response may hold the
    same token id, and there it stands for nothing."""
    positions: tuple[tuple[int, ...], ...] | None = None
    """Three positions of every token of the prompt (time, height, width); None where a token's position is its
    place."""

    @property
    def next_position(self) -> int | None:
        """Return the position of a response's first token; None where that is the length of the prompt."""
        return None if self.positions is None else max(map(max, self.positions)) + 1

    @property
    def num_tokens(self) -> int:
        """Count the tokens that stand for pictures."""
        return sum(map(len, self.places))
