"""Make prompts of rows: which column is the question, which the answer, and how the question is worded.

A row is checked when it is read, so that a bad one is reported by its place before anything is computed. All other
columns go to `Prompt.metadata`, for verifiers and for tables. pictures.py finds what a question shows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.rows.layouts import Layout, Reading, value_at
from sapo.tasks.rows.notices import Notices
from sapo.tasks.rows.pictures import PartReader, PictureColumns, check_markers
from sapo.tasks.rows.reading import PlacedRow, Row, brief
from sapo.utils.names import did_you_mean

_OF_TOOLS = ("tool_calls", "tool_call_id", "name")
"""Fields of a message that say which tools it calls, or which it answers for."""

_NO_FLOAT = 10**308
"""An integer that most readers of JSON, which keep numbers as doubles, make infinite."""

_TAGGED = re.compile(r"\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)
"""A whole answer in tags, as data sets of the R1 line have it."""


class DefaultName(str):
    """The name of a column that nobody has set, so that a layout may find another.

    >>> DefaultName("answer") == "answer"
    True
    """


PROMPT, ANSWER = DefaultName("prompt"), DefaultName("answer")

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
    """Columns with the answer; empty where the verifier needs none. Both may be dotted paths into objects."""
    layout: Layout | None = None
    """Layout of another project, which finds question and answer in place of `prompt` and `answer`."""
    layout_answer: bool = True
    """Whether the answer is the layout's; otherwise it is in the columns of `answer`."""
    needs_answer: bool = True
    """Whether a row of a layout must have an answer."""
    check: Callable[[Prompt], None] | None = None
    """Function that raises a ValueError where the verifier cannot read the answer of a prompt."""
    subject: tuple[str | None, ...] = ()
    """Column by whose values tables are made. It goes to `metadata["subject"]` as text."""
    template: str = "{prompt}"
    """Wording around the question."""
    answer_after: str | None = None
    """A mark in the answer column. The answer is what follows its last occurrence. The whole column goes to
    `metadata["solution"]`, which few-shot examples show."""
    pictures: PictureColumns = field(default_factory=PictureColumns)
    skip_bad: bool = False
    """Leave bad rows out and count them, instead of refusing the first."""
    drop: tuple[str, ...] = ()
    """Columns left out."""
    adapt: Callable[[str, Row], Row] | None = None
    """Function of a place and a row that returns a row of other columns, where naming columns is not enough."""

    def prompts(
        self, rows: Iterable[PlacedRow], task: str, directory: Path | None = None, notices: Notices | None = None
    ) -> list[Prompt]:
        """Make the prompts of all rows.

        Args:
            directory: where relative paths of pictures begin.
            notices: given what is left out, and what looks like a mistake.

        Raises:
            TaskError: a row is wrong; the message has the place of the first. With `skip_bad`, all are.
        """
        notices = Notices() if notices is None else notices
        made, bad = [], list[TaskError]()
        for where, row in rows:
            try:
                prompt = self.prompt_of(where, row, task, directory, notices.pictures.append)
                made.append(self._checked(where, prompt))
                notices.take(where, prompt, self.pictures.marker)
            except TaskError as error:
                if not self.skip_bad:
                    raise
                bad.append(error)
        if bad and not made:
            raise bad[0]
        notices.skipped += [str(error) for error in bad]
        return made

    def prompt_of(
        self,
        where: str,
        row: Row,
        task: str,
        directory: Path | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Prompt:
        """Make the prompt of one row.

        Raises:
            TaskError: a column is missing, has the wrong type, or holds a picture that cannot be used.
        """
        rest = {key: value for key, value in row.items() if key not in self.drop}
        column, sources = self.pictures.take(where, rest)
        if self.adapt is not None:
            rest = self.adapt(where, rest)
        subject = self._subject(where, rest)
        if self.layout is not None:
            field, question, answer = self._laid_out(where, rest, self.layout.read(where, rest))
        else:
            field = present(where, rest, "prompt_field", self.prompt)
            answer = self._take_answer(where, rest)
            question = rest.pop(field) if field in rest else value_at(rest, field)
            if "messages" in rest:
                raise TaskError(
                    f"{where}: a field 'messages' must be the prompt, where chat prompts are kept; got it "
                    f"beside prompt_field={field!r}; set prompt_field=messages or rename it"
                )
        if isinstance(question, list) and question:
            parts = PartReader(where, field, sources)
            messages = self._chat(where, field, question, parts)
            if parts.has_parts:
                column, sources = column or field, parts.all_sources()
            check_markers(where, field, [m["content"] for m in messages], None if column is None else len(sources))
            rest["messages"] = messages
            if not _is_nothing(rest.get("tools")):
                rest["tools"] = self._tools(where, rest["tools"])
            text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        elif isinstance(question, str) and question.strip():
            question = self._marked(where, field, question, sources)
            text = self.template.replace("{prompt}", question)  # not format(), since both may hold braces of their own
            check_markers(where, field, [text], None if column is None else len(sources))
        else:
            raise TaskError(
                f"{where}: field {field!r} must be a non-empty string or list of chat messages; "
                f"got {brief(question)}; fix or remove the row"
            )
        if subject is not None:
            rest["subject"] = subject
        shown = self.pictures.open(where, column or field, sources, directory, warn)
        return Prompt(id=0, task=task, text=text, answer=answer, metadata=rest, pictures=shown)

    def _chat(self, where: str, field: str, question: list[Any], parts: PartReader) -> list[dict[str, Any]]:
        """Return the messages of a chat, with the wording of `template`."""
        messages = [_message(where, field, message, parts) for message in question]
        self._word(where, field, messages)
        if parts.has_parts:
            return messages
        return [{**m, "content": self._marked(where, field, m["content"], parts.sources)} for m in messages]

    def _marked(self, where: str, column: str, text: str, sources: list[Any]) -> str:
        return self.pictures.in_text(where, column, text, len(sources))

    def _tools(self, where: str, value: Any) -> Any:
        """Return the tools of a chat as its template takes them: a list of objects.

        Raises:
            TaskError: they are neither such a list nor JSON of one, in a layout where the column has that meaning.
        """
        tools = value
        if isinstance(value, str):
            try:
                tools = json.loads(value)
            except (ValueError, RecursionError):
                tools = None
        tools = [tools] if isinstance(tools, dict) else tools
        if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
            return [_without_nulls(tool) for tool in tools]
        if self.layout is None:
            return value
        raise TaskError(
            f"{where}: field 'tools' must be a list of objects, or JSON of one; got {brief(value)}; fix the row"
        )

    def _word(self, where: str, column: str, messages: list[dict[str, Any]]) -> None:
        """Put the wording of `template` around the last of the user's messages, which is the question of a chat."""
        if self.template == "{prompt}":
            return
        last = next((message for message in reversed(messages) if message["role"] == "user"), None)
        if last is None:
            raise TaskError(
                f"{where}: template words the user's message, and field {column!r} has none; leave template out, or "
                "fix the row"
            )
        last["content"] = self.template.replace("{prompt}", last["content"])

    def _checked(self, where: str, prompt: Prompt) -> Prompt:
        if self.check is not None:
            try:
                self.check(prompt)
            except ValueError as error:
                raise TaskError(f"{where}: {error}") from error
        return prompt

    def _laid_out(self, where: str, rest: Row, reading: Reading) -> tuple[str, Any, str | None]:
        """Return the column, the question and the answer of a row of another project's layout."""
        assert self.layout is not None
        rest.pop("messages", None)  # the conversation with its answer
        if not self.layout_answer:
            answer = self._take_answer(where, rest, keep=True)
        elif reading.answer is not None:
            found = reading.answer
            if isinstance(found, dict | list) and not self.needs_answer:
                found = json.dumps(found, default=str)
            answer = self._after_mark(where, reading.answer_from, _answer_text(where, reading.answer_from, found), rest)
        elif self.needs_answer:
            names = " or ".join(self.layout.answers) or "output"
            raise TaskError(
                f"{where}: the row has no answer in the layout {self.layout.name}, as {names}; it has {list(rest)}; "
                "set answer_field or fix the row"
            )
        else:
            answer = None
        rest.pop(reading.question_from, None)
        question = reading.question
        if isinstance(question, str) and not _is_nothing(rest.get("tools")):
            question = [{"role": "user", "content": question}]  # tools are shown by a chat template alone
        return reading.question_from, question, answer

    def _take_answer(self, where: str, rest: Row, keep: bool = False) -> str | None:
        if not self.answer:
            return None
        field = present(where, rest, "answer_field", self.answer)
        answer = _answer_text(where, field, rest.pop(field) if field in rest and not keep else value_at(rest, field))
        return self._after_mark(where, field, answer, rest)

    def _after_mark(self, where: str, field: str, answer: str, rest: Row) -> str:
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
        if name in row or ("." in name and value_at(row, name) is not None):
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
        tagged = _TAGGED.fullmatch(value)
        return tagged[1] if tagged else value
    if isinstance(value, int) and abs(value) >= _NO_FLOAT:
        raise TaskError(
            f"{where}: field {field!r} must be a string or a number of at most 308 digits, as most readers of JSON "
            f"have it; got an integer of {len(str(abs(value)))} digits; put it in quotes"
        )
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise TaskError(f"{where}: field {field!r} must be a string or a finite number; got {brief(value)}; fix the row")


def _message(where: str, field: str, message: Any, parts: PartReader) -> dict[str, Any]:
    """Return a chat message with its content as one text, and its calls of tools.

    Parts of a content are joined, pictures among them as markers.
    """
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
            content = parts.text(content)
        kept = {name: _without_nulls(message[name]) for name in _OF_TOOLS if message.get(name)}
        if content is None and "tool_calls" in kept:
            content = ""
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content, **kept}
    raise TaskError(
        f"{where}: a chat message in {field!r} must have a role and a content, both strings; got {brief(message)}; "
        "fix the row"
    )


def _is_nothing(value: Any) -> bool:
    return value is None or value in ("", [], "[]")


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null: Parquet gives every object the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
