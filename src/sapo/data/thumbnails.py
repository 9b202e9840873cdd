"""Small copies of pictures for pages that need nothing from outside: data: URIs, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

from sapo.data.picture_files import decode_picture
from sapo.data.pictures import Picture
from sapo.errors import PictureError

SIDE = 64
"""Longest side of a thumbnail in pixels. A smaller picture is kept as it is."""

BUDGET = 2 * 2**20
"""Bytes of all thumbnails of a page."""

_ENDINGS = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
}


class Thumbnails:
    """The thumbnails of a page by hash, as many as fit.

    Args:
        budget: bytes in all.

    >>> Thumbnails(budget=0).uris
    {}
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.uris: dict[str, str] = {}
        self._room = budget
        self._tried: set[str] = set()

    def add(self, sha256: str, find: Callable[[], Picture | None]) -> None:
        """Take in a picture, unless it is there, there is no room left, or it cannot be read any more.

        Args:
            find: returns the picture; called where it is needed.
        """
        if sha256 in self._tried or self._room <= 0:
            return
        self._tried.add(sha256)
        try:
            picture = find()
            uri = None if picture is None else thumbnail(picture)
        except PictureError:
            return
        if uri is not None and len(uri) <= self._room:
            self.uris[sha256] = uri
            self._room -= len(uri)


def thumbnail(picture: Picture, side: int = SIDE) -> str:
    """Return a picture scaled down to `side` pixels as a data: URI: PNG, or JPEG where that is smaller.

    Raises:
        PictureError: its file is missing, or holds another picture by now.
    """
    image = decode_picture(picture)
    image.thumbnail((side, side))
    written = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        written.append((kind, buffer.getvalue()))
    kind, data = min(written, key=lambda made: len(made[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def ending_of(data: bytes) -> str:
    """Return the usual ending of a picture's file, by its first bytes.

    >>> ending_of(b"GIF89a"), ending_of(b"?")
    ('gif', 'bin')
    """
    return next((ending for start, ending in _ENDINGS.items() if data.startswith(start)), "bin")
