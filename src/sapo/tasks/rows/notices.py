"""Notices about rows: what was left out, and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sapo.data import Prompt
from sapo.tasks.rows.reading import brief


@dataclass
class Notices:
    """What a reader of rows says of them, apart from refusing them."""

    skipped: list[str] = field(default_factory=list)
    """Why each row that was left out is bad."""
    pictures: list[str] = field(default_factory=list)
    """Pictures that look like mistakes."""
    marked: list[str] = field(default_factory=list)
    """Places of rows whose text has the marker of a picture and which have none, unless markers are text."""
    continued: int = 0
    """Chats that end with the assistant's turn, which the completion goes on from."""
    layouts: list[str] = field(default_factory=list)
    """How files were read, where their columns are not those that the recipe names."""
    prefers_chat: bool = False
    """Whether the layout's project asks questions in plain text through the chat template."""
    disagreeing: list[str] = field(default_factory=list)
    """Questions that rows answer differently, each with two places."""
    alike: list[str] = field(default_factory=list)
    """Held-out questions that differ from a training one in blanks and case alone."""
    places: dict[str, str] = field(default_factory=dict)
    """Place of the first row of each question, for a refusal after reading."""
    _answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Place and answer of each question so far."""

    def take(self, where: str, prompt: Prompt, marker: str | None = None) -> None:
        """Compare the answer of a row with those of rows with the same question.

        Args:
            marker: stands for a picture in a question; None where markers are text.
        """
        self.places.setdefault(prompt.identity, where)
        if marker is not None and marker in prompt.text and not prompt.pictures:
            self.marked.append(where)
        messages = prompt.metadata.get("messages")
        self.continued += bool(messages and messages[-1]["role"] == "assistant")
        if prompt.answer is None:
            return
        first, answer = self._answers.setdefault(prompt.identity, (where, prompt.answer))
        if answer != prompt.answer and answer.split() != prompt.answer.split():
            self.disagreeing.append(f"{first} has {brief(answer)} and {where} {brief(prompt.answer)}")

    def take_sides(self, train: Iterable[Prompt], held_out: Iterable[Prompt]) -> None:
        """Compare held-out rows of their own with the training rows."""
        known = {prompt.likeness for prompt in train}
        self.alike += [prompt.text for prompt in held_out if prompt.likeness in known]

    def lines(self, task: str) -> tuple[str, ...]:
        """Return one line of each kind, with the first as an example."""
        found = list(self.layouts)
        if self.skipped:
            found.append(f"{task}: {len(self.skipped)} bad rows were skipped; the first: {self.skipped[0]}")
        if self.pictures:
            found.append(f"{task}: {len(self.pictures)} pictures look like mistakes; the first: {self.pictures[0]}")
        if self.marked:
            found.append(
                f"{task}: {len(self.marked)} rows have the marker of a picture and no picture, so the model reads the "
                f"marker as text; the first: {self.marked[0]}; name their column in image_field, or set "
                "picture_marker=null"
            )
        if self.disagreeing:
            rows = f"{len(self.disagreeing)} rows answer a question otherwise than a row before"
            found.append(f"{task}: {rows}; the first: {self.disagreeing[0]}")
        if self.alike:
            found.append(
                f"{task}: {len(self.alike)} held-out questions are training questions but for blanks and case; the "
                f"first: {brief(self.alike[0])}"
            )
        if self.continued:
            found.append(
                f"{task}: {self.continued} chats end with the assistant's turn, which completions go on from; "
                "layout=openai, without prompt_field, takes the last turn of a column messages as the answer"
            )
        return tuple(found)
