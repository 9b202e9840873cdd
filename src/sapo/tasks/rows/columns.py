"""Make prompts of rows: which column is the question, which the answer, and how the question is worded.

A row is checked when it is read, so that a bad one is reported by its place before anything is computed. All other
columns go to `Prompt.metadata`, for verifiers and for tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.rows.hub import refuse_images
from sapo.tasks.rows.reading import PlacedRow, Row, brief
from sapo.utils.names import did_you_mean

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

Names = str | Iterable[str | None] | None
"""The name of a column, or alternatives in order of preference. A last None means that the column may be missing."""


@dataclass(frozen=True)
class Columns:
    """The columns that make a prompt.

    >>> columns = Columns(prompt=("question",), answer=("answer",), answer_after="####", template="{prompt} Box it.")
    >>> prompt = columns.prompt_of("sums.jsonl:1", {"question": "2 * 3?", "answer": "2 * 3 = 6 #### 6"}, task="sums")
    >>> prompt.text, prompt.answer, prompt.metadata["solution"]
    ('2 * 3? Box it.', '6', '2 * 3 = 6 #### 6')
    """

    prompt: tuple[str | None, ...] = ("prompt",)
    answer: tuple[str | None, ...] = ("answer",)
    """Columns with the answer; empty where the verifier needs none."""
    subject: tuple[str | None, ...] = ()
    """Column by whose values tables are made. It goes to `metadata["subject"]` as text."""
    template: str = "{prompt}"
    """Wording around the question."""
    answer_after: str | None = None
    """A mark in the answer column. The answer is what follows its last occurrence. The whole column goes to
    `metadata["solution"]`, which few-shot examples show."""
    drop: tuple[str, ...] = ()
    """Columns left out."""
    adapt: Callable[[str, Row], Row] | None = None
    """Function of a place and a row that returns a row of other columns, where naming columns is not enough."""

    def prompts(self, rows: Iterable[PlacedRow], task: str) -> list[Prompt]:
        """Make the prompts of all rows.

        Raises:
            TaskError: a row is wrong; the message has the place of the first.
        """
        return [self.prompt_of(where, row, task) for where, row in rows]

    def prompt_of(self, where: str, row: Row, task: str) -> Prompt:
        """Make the prompt of one row.

        Raises:
            TaskError: a column is missing, has the wrong type, or holds images.
        """
        rest = {key: value for key, value in row.items() if key not in self.drop}
        refuse_images(where, [key for key, value in rest.items() if _is_image(key, value)])
        if self.adapt is not None:
            rest = self.adapt(where, rest)
        subject = self._subject(where, rest)
        field = present(where, rest, "prompt_field", self.prompt)
        answer = self._take_answer(where, rest)
        question = rest.pop(field)
        if "messages" in rest:
            raise TaskError(
                f"{where}: a field 'messages' must be the prompt, where chat prompts are kept; got it "
                f"beside prompt_field={field!r}; set prompt_field=messages or rename it"
            )
        if isinstance(question, list) and question:
            rest["messages"] = messages = [_message(where, field, message) for message in question]
            text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        elif isinstance(question, str) and question.strip():
            text = self.template.replace("{prompt}", question)  # not format(), since both may hold braces of their own
        else:
            raise TaskError(
                f"{where}: field {field!r} must be a non-empty string or list of chat messages; "
                f"got {brief(question)}; fix or remove the row"
            )
        if subject is not None:
            rest["subject"] = subject
        return Prompt(id=0, task=task, text=text, answer=answer, metadata=rest)

    def _take_answer(self, where: str, rest: Row) -> str | None:
        if not self.answer:
            return None
        field = present(where, rest, "answer_field", self.answer)
        answer = _answer_text(where, field, rest.pop(field))
        if self.answer_after is None:
            return answer
        _, mark, tail = answer.rpartition(self.answer_after)
        if not mark:
            raise TaskError(
                f"{where}: field {field!r} must have the answer after {self.answer_after!r}; got {brief(answer)}; "
                "fix the row or leave answer_after out"
            )
        rest["solution"] = answer
        return tail.strip()

    def _subject(self, where: str, rest: Row) -> str | None:
        if not self.subject or (self.subject[-1] is None and not any(name in rest for name in self.subject)):
            return None
        value = rest[present(where, rest, "subject_field", self.subject)]
        return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def present(where: str, row: Row, option: str, names: tuple[str | None, ...]) -> str:
    """Return the first of the names that the row has.

    Raises:
        TaskError: the row has none of them; the message lists those it has and the nearest.
    """
    wanted = [name for name in names if name is not None]
    for name in wanted:
        if name in row:
            return name
    hint = did_you_mean(wanted[0], row)
    missing = " or ".join(repr(name) for name in wanted)
    way_out = "set answer_field (null for rows without an answer)" if option == "answer_field" else f"set {option}"
    raise TaskError(f"{where}: the row has no field {missing}; it has {list(row)}; {way_out} or add it{hint}")


def as_names(option: str, value: Names) -> tuple[str | None, ...]:
    """Return the alternatives of an option that names a column, as a recipe writes it.

    >>> as_names("prompt_field", "problem"), as_names("subject_field", ["problem_type", None]), as_names("x", None)
    (('problem',), ('problem_type', None), ())

    Raises:
        TaskError: the value is neither a name nor a list of names.
    """
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) and name for name in names[:-1]) or not (
        names and (names[-1] is None or isinstance(names[-1], str)) and names[0]
    ):
        raise TaskError(f"{option} must be a column's name or a list of alternatives; got {value!r}; write one name")
    return names


def _answer_text(where: str, field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise TaskError(f"{where}: field {field!r} must be a string or a finite number; got {brief(value)}; fix the row")


def _message(where: str, field: str, message: Any) -> dict[str, str]:
    """Return a chat message with its content as one text. Parts of text are joined, and images refused."""
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
            refuse_images(where, [field] if any("image" in str(part.get("type")) for part in content) else [])
            texts = [part.get("text") for part in content if part.get("type") == "text"]
            if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
                content = "".join(texts)
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise TaskError(
        f"{where}: a chat message in {field!r} must have a role and a content, both strings; got {brief(message)}; "
        "fix the row"
    )


def _is_image(name: str, value: Any) -> bool:
    """Return whether a value is an image: decoded, encoded as Parquet stores it, or a file name in an image column."""
    if isinstance(value, list):
        return any(_is_image(name, part) for part in value)
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"}
    if isinstance(value, str):
        return "image" in name.lower() and value.lower().endswith(IMAGE_SUFFIXES)
    return type(value).__module__.startswith("PIL.")
