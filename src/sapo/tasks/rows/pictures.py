"""Pictures of rows: those of a column, and those within the parts of chat messages.

A picture is a path relative to the rows' file, a data: URI, encoded bytes, {bytes, path} as Parquet stores it, or a
decoded Pillow image. Every one is decoded once when its row is read, so that a bad one is reported by row and column.
Nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sapo.data.picture_files import PictureRules, open_picture, picture_of
from sapo.data.pictures import PICTURE_MARKER, Picture
from sapo.errors import TaskError
from sapo.tasks.rows.reading import Row, brief

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

PART_TYPES = ("image", "image_url", "input_image")
"""Types of the parts of a message that are pictures: transformers' and TRL's, and OpenAI's two."""

SOURCE_KEYS = ("image", "image_url", "path", "url", "base64")
"""Keys under which such a part holds its picture. Without any, it is the next of the row's column."""

LONGEST_PATH = 4096
"""Characters. A longer text is no path, and would fill the message."""


@dataclass(frozen=True)
class PictureColumns:
    """Where the pictures of rows are, and what stands for them in a question.

    >>> PictureColumns(names=("photo",), marker="<img>").in_text("a.jsonl:1", "q", "See <img>.", 1)
    'See <image>.'
    """

    names: tuple[str | None, ...] = ("images", "image", None)
    """Columns in order of preference: one picture or a list of them. Empty: no column holds any."""
    marker: str | None = PICTURE_MARKER
    """Stands in a question for a picture; None: what looks like one is text, and pictures come before the question."""
    rules: PictureRules = field(default_factory=PictureRules)

    def take(self, where: str, row: Row) -> tuple[str | None, list[Any]]:
        """Take the sources of pictures out of a row; return the column that was there, None for none, and them.

        Raises:
            TaskError: none of the columns is there, and one must be; or another column holds pictures.
        """
        wanted = [name for name in self.names if name is not None]
        found = {name: row.pop(name) for name in wanted if name in row}
        if not found and wanted and None not in self.names:
            raise TaskError(
                f"{where}: the row has no field {' or '.join(map(repr, wanted))}; it has {list(row)}; set image_field, "
                "with null last where it may be missing"
            )
        others = [name for name, value in row.items() if holds_pictures(name, value)]
        if others:
            raise TaskError(
                f"{where}: pictures must be in the field that image_field names; got some in {', '.join(others)}; set "
                f"image_field={others[0]}, or drop_fields=[{','.join(others)}] to ask without them"
            )
        column = next((name for name, value in found.items() if not _is_none(value)), next(iter(found), None))
        return column, [] if column is None else _listed(found[column])

    def in_text(self, where: str, column: str, text: str, pictures: int) -> str:
        """Return a text with its markers as `PICTURE_MARKER`.

        Raises:
            TaskError: it has `PICTURE_MARKER` itself as text, which would be shown as a picture.
        """
        if not pictures or self.marker == PICTURE_MARKER:
            return text
        if PICTURE_MARKER in text:
            raise TaskError(
                f"{where}: field {column!r} must not hold {PICTURE_MARKER} as text; got it with picture_marker="
                f"{self.marker!r}; set picture_marker={PICTURE_MARKER!r} if it stands for a picture, or reword the row"
            )
        return text if self.marker is None else text.replace(self.marker, PICTURE_MARKER)

    def open(
        self,
        where: str,
        column: str,
        sources: Sequence[Any],
        directory: Path | None,
        warn: Callable[[str], None],
    ) -> tuple[Picture, ...]:
        """Return the pictures of sources.

        Args:
            where, column: the row's place, and the field that holds the pictures.
            directory: where relative paths begin.
            warn: called with a line about a picture that looks like a mistake.

        Raises:
            PictureError, TaskError: one cannot be used.
        """
        if not sources:
            return ()
        rules = replace(self.rules, directory=directory)
        shown = []
        for number, source in enumerate(sources, start=1):
            place = (
                f"{where}: picture {number} of field {column!r}" if len(sources) > 1 else f"{where}: field {column!r}"
            )
            shown.append(open_picture(_data_of(place, source), place, rules, warn))
        return tuple(shown)


class PartReader:
    """Turns the parts of chat messages into texts with markers, and collects the pictures that they hold.

    Args:
        sources: of the row's column, for parts that hold no picture themselves.
    """

    def __init__(self, where: str, column: str, sources: Sequence[Any]) -> None:
        self.where, self.column = where, column
        self.sources = list(sources)
        self.shown: list[Any] = []
        self.has_parts = False

    def text(self, parts: Iterable[dict[str, Any]]) -> str | None:
        """Return the text of a message's parts, None where one is neither text nor a picture."""
        written = []
        for part in parts:
            kind = part.get("type")
            if kind in PART_TYPES:
                self.shown.append(self._source(part))
                self.has_parts = True
                written.append(PICTURE_MARKER)
            elif kind in ("text", "input_text") and isinstance(part.get("text"), str):
                written.append(part["text"])
            else:
                return None
        return "".join(written)

    def all_sources(self) -> list[Any]:
        """Return what the row shows, in order.

        Raises:
            TaskError: the column has another number of pictures than there are parts for them.
        """
        expected = sum(part is _NEXT for part in self.shown)
        if expected != len(self.sources):
            raise TaskError(
                f"{self.where}: field {self.column!r} must have one part for each picture of the row's own field; got "
                f"{len(self.sources)} pictures and {expected} parts that hold none themselves; correct the row"
            )
        rest = iter(self.sources)
        return [next(rest) if part is _NEXT else part for part in self.shown]

    def _source(self, part: dict[str, Any]) -> Any:
        for key in SOURCE_KEYS:
            value = part.get(key)
            if key == "image_url" and isinstance(value, dict):
                value = value.get("url")
            if not _is_none(value):
                return f"data:image/*;base64,{value}" if key == "base64" else value
        return _NEXT


_NEXT = object()
"""A part that shows the next picture of the row's column."""


def check_markers(where: str, column: str, texts: Iterable[str], pictures: int | None) -> None:
    """Refuse a question with another number of markers than pictures, unless it has none.

    Args:
        pictures: of the row; None where the row has no column of pictures, so that a marker is text.

    Raises:
        TaskError: the numbers differ.
    """
    markers = sum(text.count(PICTURE_MARKER) for text in texts)
    if pictures is not None and markers not in (0, pictures):
        raise TaskError(
            f"{where}: field {column!r} must have as many markers {PICTURE_MARKER} as the row has pictures, or none; "
            f"got {markers} markers and {pictures} pictures; correct the row, or set picture_marker=null where "
            "markers are text"
        )


def holds_pictures(name: str, value: Any) -> bool:
    """Return whether a value is a picture: decoded, encoded as Parquet stores it, or a file name in an image column."""
    if isinstance(value, list):
        return any(holds_pictures(name, part) for part in value)
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"}
    if isinstance(value, str):
        return "image" in name.lower() and value.lower().endswith(IMAGE_SUFFIXES)
    return type(value).__module__.startswith("PIL.")


def _listed(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if not _is_none(v)]


def _is_none(value: Any) -> bool:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] is None and not value["path"]
    return value is None or value in ("", b"", [])


def _data_of(place: str, source: Any) -> bytes | str:
    """Return encoded bytes, or a path."""
    if isinstance(source, dict):
        source = next((source[k] for k in ("bytes", "path", "url") if not _is_none(source.get(k))), source)
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if type(source).__module__.startswith("PIL."):
        data = picture_of(source).data
        assert data is not None
        return data
    if isinstance(source, str) and source.startswith("data:"):
        return _of_data_uri(place, source)
    if isinstance(source, str) and len(source) <= LONGEST_PATH:
        return source
    raise TaskError(
        f"{place}: a picture must be a path, a data: URI, encoded bytes or {{bytes, path}}; got {brief(source)}; "
        "correct the row"
    )


def _of_data_uri(place: str, uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    try:
        if not (comma and head.endswith(";base64")):
            raise ValueError("no ;base64, in it")
        return base64.b64decode("".join(body.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        raise TaskError(
            f"{place}: a data: URI must be data:image/...;base64,... with base64 behind the comma; got {brief(uri)}: "
            f"{error}; encode the picture again"
        ) from error
