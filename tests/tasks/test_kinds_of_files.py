"""Rows are the same in every kind of file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapo.errors import TaskError
from sapo.tasks import FileTask, make_task
from support.layouts import EIGHT

SUMS = [(f"{i}+{i + 1}=", str(2 * i + 1)) for i in range(40)]


def rows_in(layout: str) -> list[dict[str, Any]]:
    return [EIGHT[layout](question, answer) for question, answer in SUMS]


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return text.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.csv": lambda rows: as_csv(rows).encode(),
    "marked.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows).encode(),
    "wide.csv": lambda rows: as_csv(rows).encode("utf-16"),
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows).encode()),
    "rows.jsonl.gz": lambda rows: gzip.compress(as_lines(rows).encode()),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "wide.jsonl": lambda rows: as_lines(rows).encode("utf-16"),
    "big_endian.jsonl": lambda rows: b"\xfe\xff" + as_lines(rows).encode("utf-16-be"),
    "wide.json": lambda rows: json.dumps(rows).encode("utf-16"),
    "wide.jsonl.gz": lambda rows: gzip.compress(as_lines(rows).encode("utf-16")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = [
        {"prompt": 'a "quoted", long\nquestion', "solution": "é"},
        {"prompt": "日本 \N{GRINNING FACE}", "solution": "4"},
    ]
    chats = [{"messages": [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "ü"}], "id": "1"}]
    path = tmp_path / name
    for given, expected in (
        (rows, {(row["prompt"], row["solution"]) for row in rows}),
        (chats, {("user: 2+2=", "ü")}),
    ):
        path.write_bytes(WRITERS[name](given))
        for kind in ("file", "dataset"):
            task = make_task(kind, seed=0, path=str(path), held_out_fraction=1)
            assert {(prompt.text, prompt.answer) for prompt in task.held_out(9)} == expected
            assert task.name == name.partition(".")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,answer\na,1\nb\n", ":3: a row must have 2 cells, one for each column; got 1: ['b']"),
        ("prompt,answer\na,1\n\nb,2,3\n", ":4: a row must have 2 cells"),
        ('prompt,answer\n"two\nlines",1\nb\n', ":4: a row must have 2 cells"),
        ("", ":1: the first line of a .csv must name the columns, each differently; got []"),
        ("prompt,prompt\na,1\n", ":1: the first line of a .csv must name the columns, each differently"),
        ('prompt,answer\n"a,1\n', "the file must be CSV"),
        ("prompt,answer\n", "at least one row"),
    ],
)
def test_a_broken_csv_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(TaskError) as refusal:
        FileTask(path)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(str(path))


def test_a_cut_gzip_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(rows_in("trl")).encode())[:-20])
    with pytest.raises(TaskError, match=r"rows\.jsonl\.gz: the file must be compressed by gzip; got"):
        FileTask(path)
