"""Read the rows of a file: JSON Lines, a JSON list of objects, or Parquet. Each comes with its place for messages.

columns.py makes prompts of the rows. hub.py reads directories and the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapo.errors import TaskError
from sapo.utils.names import did_you_mean

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

EXTENSIONS = (".jsonl", ".json", ".parquet")


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """Read the rows of a file, each with its place, `path:number`. The number counts lines, objects or rows.

    Raises:
        TaskError: the file is missing, its extension is unknown, or its contents do not fit the extension.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        hint = did_you_mean(extension, EXTENSIONS)
        known = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        raise TaskError(f"{path}: a task's file must end in {known}; got {extension!r}{hint}")
    if not path.is_file():
        raise TaskError(f"{path}: there must be a file; got none in {path.absolute().parent}; check the path")
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[extension]
    yield from read(path)


def brief(value: Any) -> str:
    """Return a value as text for a message, cut so that the message stays on one line.

    >>> brief("x" * 100)[-5:]
    'xx...'
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_jsonl(path: Path) -> Iterator[PlacedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            # utf-8-sig also takes the byte order mark that some editors write before the first line.
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                # The line number that json reports is within this line, and would contradict the place.
                got = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise TaskError(
                    f"{where}: a line must be one JSON object; got {got}; fix or remove the line"
                ) from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise TaskError(f"{where}: a line must be one JSON object; got {brief(row)}; write {{...}}")
            yield where, row


def _read_json(path: Path) -> Iterator[PlacedRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TaskError(
            f"{path}: a .json file must be one list of objects; got {error}; one object per line is .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise TaskError(f"{path}: a .json file must be one list of objects; got {brief(rows)}; write [{{...}}, ...]")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: every item of the list must be an object; got {brief(row)}; fix it")
        yield f"{path}:{number}", row


def _read_parquet(path: Path) -> Iterator[PlacedRow]:
    # Imported here because it is slow, and other tasks do not need it.
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{path}: the file must be Parquet; got {reason}; write it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row
