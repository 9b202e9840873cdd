"""Rows given in Python as the settings of a task. They are written to the cache, by the hash of their content."""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sapo.errors import TaskError
from sapo.model.sources import cache_directory
from sapo.tasks.rows.reading import is_rows_file
from sapo.tasks.verifiers import needs_answer
from sapo.utils.files import write_whole

HELD_OUT_NAMES = ("test", "validation", "eval", "held_out")
"""Names of the split to evaluate on, in the order in which they are looked for."""


def rows_settings(rows: Any, options: Mapping[str, Any], *, all_held_out: bool = False) -> dict[str, Any]:
    """Return the settings of a task whose prompts are rows that were given.

    Args:
        rows: a list of dicts, a datasets.Dataset, a pandas DataFrame; a mapping of splits, of which `train` is trained
            on and one of HELD_OUT_NAMES evaluated; a file; or a hub id.
        options: further options of the task.
        all_held_out: hold all rows out, as for an evaluation.

    Raises:
        TaskError: they are none of these, or a value is of a kind that a file of rows cannot hold.
    """
    sides: dict[str, Any]
    if isinstance(rows, str | Path):
        local = is_rows_file(rows)
        sides = {"name": "file", "path": str(rows)} if local else {"name": "dataset", "dataset": str(rows)}
    elif isinstance(rows, Mapping):
        held_out = next((name for name in HELD_OUT_NAMES if name in rows), None)
        if "train" not in rows and held_out is None:
            raise TaskError(
                f"rows by splits must have train, and may have one of {', '.join(HELD_OUT_NAMES)}; got "
                f"{', '.join(map(str, rows))}; give a list of rows, or name the splits so"
            )
        sides = {"name": "file", "path": str(write_rows(rows[held_out if "train" not in rows else "train"]))}
        if held_out is not None and "train" in rows:
            sides["path" if all_held_out else "held_out_path"] = str(write_rows(rows[held_out]))
    else:
        sides = {"name": "file", "path": str(write_rows(rows))}
    if not isinstance(rows, str | Path):
        sides |= {"label": "rows", **_columns(Path(sides["path"]), options)}
    if all_held_out and "held_out_path" not in options:
        sides["held_out_fraction"] = 1.0
    return {**sides, **options}


def _columns(file: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Name the columns of rows that have a prompt, so that no layout is looked for."""
    with file.open(encoding="utf-8") as stream:
        first = json.loads(stream.readline())
    chosen = {"layout", "prompt_field", "answer_field"} & set(options)
    if chosen or "prompt" not in first or ("answer" not in first and needs_answer(options.get("verifier", "exact"))):
        return {}
    return {"prompt_field": "prompt", "answer_field": "answer" if "answer" in first else None}


def write_rows(rows: Any) -> Path:
    """Write rows to the cache as JSON Lines, once, and return the file; its name is the hash of its content.

    Raises:
        TaskError: they are no rows, or a value is of a kind that JSON cannot hold.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in map(_row, _numbered(rows))]
    if not lines:
        raise TaskError("rows must have at least one row; got none; add rows")
    text = "\n".join(lines) + "\n"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    file = cache_directory() / "rows" / f"rows-{digest}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    return file


def _numbered(rows: Any) -> Iterable[tuple[int, Any]]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TaskError(
            "rows must be a list of dicts, a datasets.Dataset, a pandas DataFrame, a file or a hub id; got a "
            f"{type(rows).__name__}"
        )
    return enumerate(rows, start=1)


def _row(numbered: tuple[int, Any]) -> dict[str, Any]:
    number, row = numbered
    if not isinstance(row, Mapping):
        raise TaskError(f"row {number}: a row must be a dict of columns; got a {type(row).__name__}; write {{...}}")
    return {str(name): _value(value, f"row {number}, column {name!r}") for name, value in row.items()}


def _value(value: Any, where: str) -> Any:
    """Return a value as JSON can hold it: pictures as data URIs, missing numbers as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:  # a picture of datasets
            return _data_uri(value["bytes"])
        return {str(k): _value(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_value(v, where) for v in value]
    if isinstance(value, bytes):
        return _data_uri(value)
    if isinstance(value, Path | decimal.Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "save") and hasattr(value, "convert"):  # a picture of PIL
        stream = io.BytesIO()
        value.save(stream, "PNG")
        return _data_uri(stream.getvalue())
    if hasattr(value, "tolist"):  # of numpy and torch
        return _value(value.tolist(), where)
    if type(value).__name__ in ("NaTType", "NAType"):  # of pandas
        return None
    raise TaskError(
        f"{where}: a value must be text, a number, a list, a dict or a picture; got a {type(value).__name__}; leave "
        "the column out, or make text of it"
    )


def _data_uri(data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
