"""Layouts of rows: which columns are the question and the answer in the files of other projects.

| layout | question | answer, the first that is there |
|---|---|---|
| verl | prompt | reward_model.ground_truth |
| trl | prompt, problem | solution, ground_truth, answer, completion |
| swift | messages, or query with system and history | solution, ground_truth, answer, the last turn or response |
| openai | messages | reference_answer, ground_truth, answer, the last turn |
| openrlhf | input, prompt, context_messages | label, answer, ground_truth, output |
| verifiers | prompt, question | answer, info.answer |
| alpaca | instruction and input, with system and history | output |
| sharegpt | conversations, with system | solution, ground_truth, answer, the last turn |

Where the answer is an assistant's turn at the end of a conversation, that turn is not in the prompt. All columns but
the question's stay in the metadata, for reward functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.rows.reading import Row, brief

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_call": "tool_call",
    "tool_call": "tool_call",
}
"""Names that sharegpt and swift give to the sides of a conversation."""


@dataclass(frozen=True)
class Reading:
    """What a layout finds in a row.

    >>> row = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
    >>> reading = LAYOUTS["alpaca"].read("a.jsonl:1", row)
    >>> reading.question, reading.answer
    ('Add.\\n3 and 4', '7')
    """

    question: Any
    """A text or a list of messages."""
    question_from: str
    """The column, or columns, for messages."""
    answer: Any = None
    """None where the row has none."""
    answer_from: str = ""


@dataclass(frozen=True)
class Layout:
    """How a project lays out its rows."""

    name: str
    find: Callable[[str, Row], Reading | None]
    """Function of a place and a row; None where the row has no question of this layout."""
    answers: tuple[str, ...]
    """Columns of the answer in order of preference, which may be dotted."""
    marks: Callable[[Row], bool]
    """Whether `auto` takes a row for one of this layout."""
    prefers_chat: bool = False
    """Whether the project asks a question in plain text through the chat template."""

    def read(self, where: str, row: Row) -> Reading:
        """Find question and answer in a row.

        Raises:
            TaskError: it has no question of this layout, or a malformed one.
        """
        reading = self.find(where, row)
        if reading is None:
            raise TaskError(
                f"{where}: the row has no question in the layout {self.name}; it has {list(row)}; set another layout, "
                "or prompt_field and answer_field"
            )
        for name in self.answers:
            answer = value_at(row, name)
            if not is_empty(answer):
                if isinstance(answer, list) and _are_messages(answer):
                    answer = _text_of(answer[-1].get("content"))
                return Reading(reading.question, reading.question_from, answer, name)
        return reading


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column, or of a dotted path into objects; None where there is none.

    A column whose own name has the dots goes first. An object may be written as JSON.

    >>> value_at({"info": '{"answer": "7"}'}, "info.answer"), value_at({"info.answer": "8"}, "info.answer")
    ('7', '8')
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _first(row: Row, *names: str) -> Reading | None:
    """Return a reading of the first of the columns that holds a question."""
    name = next((name for name in names if not is_empty(row.get(name))), None)
    if name is None:
        return None
    value = row[name]
    return Reading(_turns(value) if _are_messages(value) else value, name)


def _of_conversation(where: str, row: Row, name: str) -> Reading | None:
    """Return a reading of a conversation, whose last turn is the answer where it is the assistant's."""
    turns: Any = row.get(name)
    if is_empty(turns):
        return None
    if not _are_messages(turns):
        raise TaskError(
            f"{where}: field {name!r} must be a list of messages; got {brief(turns)}; fix or remove the row"
        )
    messages = _turns(turns)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if messages[-1]["role"] != "assistant":
        return Reading(messages, name)
    *asked, last = messages
    if not asked:
        raise TaskError(
            f"{where}: field {name!r} must ask before the assistant answers; got {brief(turns)}; fix the row"
        )
    content = _text_of(last.get("content"))
    if not content:
        raise TaskError(
            f"{where}: the last turn of {name!r} is the answer and must be a text; got {brief(last)}; fix or remove "
            "the row, or end the conversation with the user's turn"
        )
    return Reading(asked, name, content, f"the last turn of {name}")


def _of_conversations(where: str, row: Row) -> Reading | None:
    return _of_conversation(where, row, "conversation" if "conversations" not in row else "conversations")


def _of_query(where: str, row: Row) -> Reading | None:
    if "query" not in row:
        return _of_conversation(where, row, "messages")
    return _of_parts(where, row, "query", str(row["query"] or ""), "response")


def _of_instruction(where: str, row: Row) -> Reading | None:
    if is_empty(row.get("instruction")):
        return None
    parts = [str(row[name]) for name in ("instruction", "input") if not is_empty(row.get(name))]
    return _of_parts(where, row, "instruction" + " and input" * (len(parts) > 1), "\n".join(parts), "output")


def _of_parts(where: str, row: Row, source: str, question: str, answer: str) -> Reading:
    """Return a reading of a question with the columns system and history, as messages where there are such."""
    found = row.get(answer)
    given = (None, "") if is_empty(found) else (found, answer)
    system, history = row.get("system"), row.get("history")
    if is_empty(system) and is_empty(history):
        return Reading(question, source, *given)
    messages = [] if is_empty(system) else [{"role": "system", "content": system}]
    for pair in history or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TaskError(f"{where}: field 'history' must be a list of pairs; got {brief(history)}; fix the row")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Reading([*messages, {"role": "user", "content": question}], source, *given)


def _text_of(content: Any) -> str | None:
    """Return the text of a turn, None where it is no text alone."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def is_empty(value: Any) -> bool:
    """Return whether a column holds nothing that could be an answer."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _turns(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with a role and a content, whatever the project calls these."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if "from" in turn and "value" in turn:
            messages.append(_turn(turn["from"], turn["value"]))
        elif "human" in turn and "assistant" in turn:
            messages.append(_turn("user", turn["human"]))
            messages += [] if turn["assistant"] is None else [_turn("assistant", turn["assistant"])]
        else:
            side = turn.get("role")
            called = isinstance(side, str) and _ROLES.get(side) == "tool_call"
            messages.append(_turn(side, turn.get("content")) if called or side == "tool_response" else dict(turn))
    return messages


def _turn(side: Any, content: Any) -> dict[str, Any]:
    role = _ROLES.get(side, side) if isinstance(side, str) else side
    if role != "tool_call":
        return {"role": role, "content": content}
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return {"role": "assistant", "content": content}
    calls = call if isinstance(call, list) else [call]
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}


# -------------------------------------------------------------------------------------------------------- the layouts


def _has(*names: str) -> Callable[[Row], bool]:
    """Return whether a row has one of the columns with a value."""
    return lambda row: any(not is_empty(value_at(row, name)) for name in names)


_has_messages = _has("messages")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "verl",
            lambda where, row: _first(row, "prompt"),
            ("reward_model.ground_truth",),
            lambda row: "prompt" in row and _has("reward_model.ground_truth")(row),
        ),
        Layout(
            "trl",
            lambda where, row: _first(row, "prompt", "problem"),
            ("solution", "ground_truth", "answer", "completion"),
            lambda row: (
                ("prompt" in row and _has("solution", "ground_truth", "completion")(row) and "answer" not in row)
                or ("problem" in row and _has("solution", "ground_truth", "answer")(row))
            ),
        ),
        Layout(
            "swift",
            _of_query,
            ("solution", "ground_truth", "answer"),
            lambda row: (
                ("query" in row and _has("response", "solution")(row)) or (_has_messages(row) and _has("solution")(row))
            ),
            prefers_chat=True,
        ),
        Layout(
            "openai",
            lambda where, row: _of_conversation(where, row, "messages"),
            ("reference_answer", "ground_truth", "answer"),
            lambda row: _has_messages(row) and not _has("solution")(row),
        ),
        Layout(
            "openrlhf",
            lambda where, row: _first(row, "input", "prompt", "context_messages"),
            ("label", "answer", "ground_truth", "output"),
            lambda row: (
                ("input" in row and "instruction" not in row and _has("label", "answer", "output")(row))
                or ("prompt" in row and _has("label")(row) and "answer" not in row)
                or ("context_messages" in row and _has("label")(row))
            ),
        ),
        Layout(
            "verifiers",
            lambda where, row: _first(row, "prompt", "question"),
            ("answer", "info.answer"),
            lambda row: (
                ("question" in row and _has("answer", "info.answer")(row))
                or ("prompt" in row and "answer" not in row and _has("info.answer")(row))
            ),
            prefers_chat=True,
        ),
        Layout(
            "alpaca",
            _of_instruction,
            (),
            lambda row: "instruction" in row and _has("output")(row),
            prefers_chat=True,
        ),
        Layout(
            "sharegpt",
            _of_conversations,
            ("solution", "ground_truth", "answer"),
            _has("conversations", "conversation"),
        ),
    )
}
"""Layouts by name."""
