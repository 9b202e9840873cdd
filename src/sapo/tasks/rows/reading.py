"""Read the rows of a file: JSON Lines, a JSON list of objects, CSV or Parquet. Each comes with its place for messages.

All but Parquet may be compressed (.gz), and may be in UTF-16 where they begin with a byte order mark. layouts.py says
what the columns mean, and columns.py makes prompts of them. hub.py reads directories and the hub.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

from sapo.errors import TaskError
from sapo.utils.names import did_you_mean

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = ".gz"

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def extension_of(path: str | Path) -> str:
    """Return the extension that says what a file of rows holds, without `.gz`.

    >>> extension_of("sums.jsonl.gz"), extension_of("sums.CSV"), extension_of("sums")
    ('.jsonl', '.csv', '')
    """
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() == PACKED else path
    return path.suffix.lower()


def is_rows_file(path: str | Path) -> bool:
    """Return whether a file of this name has rows."""
    return extension_of(path) in EXTENSIONS


def name_of(path: str | Path) -> str:
    """Return the name of a file without its extension and without `.gz`.

    >>> name_of("data/sums.jsonl.gz"), name_of("openai/gsm8k")
    ('sums', 'gsm8k')
    """
    path = Path(path)
    return (path.with_suffix("") if path.suffix.lower() == PACKED else path).stem


def read_rows(path: Path) -> Iterator[PlacedRow]:
    """Read the rows of a file, each with its place, `path:number`. The number counts lines, objects or rows.

    Raises:
        TaskError: the file is missing, its extension is unknown, or its contents do not fit the extension.
    """
    extension = extension_of(path)
    if extension not in EXTENSIONS:
        hint = did_you_mean(extension, EXTENSIONS)
        known = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        raise TaskError(f"{path}: a task's file must end in {known}; got {extension!r}{hint}")
    if not path.is_file():
        raise TaskError(f"{path}: there must be a file; got none in {path.absolute().parent}; check the path")
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[extension]
    try:
        yield from read(path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TaskError(f"{path}: the file must be compressed by gzip; got {error}; compress it again") from error


def brief(value: Any) -> str:
    """Return a value as text for a message, cut so that the message stays on one line.

    >>> brief("x" * 100)[-5:]
    'xx...'
    """
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == PACKED else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """Return the lines of a file by number: bytes in UTF-8, or texts of a file in UTF-16."""
    with closing(_open(path)) as file:
        mark = file.read(2)
        file.seek(0)
        if mark in _UTF16_MARKS:
            yield from enumerate(io.TextIOWrapper(file, encoding="utf-16"), start=1)
            return
        yield from enumerate(file, start=1)


def _text(path: Path) -> str:
    with closing(_open(path)) as file:
        data = file.read()
    # utf-8-sig also takes the byte order mark that some editors write at the beginning.
    return data.decode("utf-16" if data[:2] in _UTF16_MARKS else "utf-8-sig")


def _read_jsonl(path: Path) -> Iterator[PlacedRow]:
    lines = _lines(path)
    number = 0
    while True:
        where = f"{path}:{number + 1}"
        try:
            number, line = next(lines, (0, b""))
            if not number:
                return
            if isinstance(line, bytes):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            line = line.strip()
            row = json.loads(line) if line else None
        except (ValueError, RecursionError) as error:
            # The line number that json reports is within this line, and would contradict the place.
            got = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise TaskError(f"{where}: a line must be one JSON object; got {got}; fix or remove the line") from error
        if not line:
            continue
        if not isinstance(row, dict):
            raise TaskError(f"{where}: a line must be one JSON object; got {brief(row)}; write {{...}}")
        yield where, row


def _read_json(path: Path) -> Iterator[PlacedRow]:
    try:
        rows = json.loads(_text(path))
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


def _read_csv(path: Path) -> Iterator[PlacedRow]:
    """Read rows below a line of column names. The number in a place is that of a row's first line."""
    csv.field_size_limit(2**31 - 1)
    try:
        rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        names = next(rows, [])
        if not names or len(set(names)) < len(names) or "" in names:
            raise TaskError(
                f"{path}:1: the first line of a .csv must name the columns, each differently; got {brief(names)}"
            )
        begin = rows.line_num + 1
        for cells in rows:
            where, begin = f"{path}:{begin}", rows.line_num + 1
            if not cells:
                continue
            if len(cells) != len(names):
                raise TaskError(
                    f"{where}: a row must have {len(names)} cells, one for each column; got {len(cells)}: "
                    f"{brief(cells)}; put cells with commas in quotes"
                )
            yield where, {name: _cell(text) for name, text in zip(names, cells, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: the file must be CSV; got {error}; write it again") from error


def _cell(text: str) -> Any:
    """Return a cell: its text, or the list of objects that it spells, as chat messages are written into a CSV."""
    if text.startswith("[{") and text.endswith("}]"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


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
