"""Options of every task whose rows a recipe names: how they are laid out, judged, limited, split and ordered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import Signature, signature
from pathlib import Path
from typing import Any, Literal

from sapo.data.picture_files import PictureRules
from sapo.data.pictures import PICTURE_MARKER
from sapo.errors import TaskError
from sapo.tasks.rows.columns import Columns, DefaultName, Names, as_names
from sapo.tasks.rows.layout_choice import AUTO, check_layout, choose_layout, first_disagreement
from sapo.tasks.rows.notices import Notices
from sapo.tasks.rows.pictures import PictureColumns
from sapo.tasks.rows.reading import PlacedRow
from sapo.tasks.verifiers import VerifierSpec, needs_answer

LAYOUT_SAMPLE = 64
"""Rows at the beginning of a file that are looked at to say what layout it has."""


@dataclass(frozen=True)
class PromptLimit:
    """The longest prompt that a task takes.

    >>> PromptLimit(1024, drop=True).tokens
    1024
    """

    tokens: int
    drop: bool
    """Leave longer ones out and count them, instead of refusing the first."""


def takes_options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a constructor of `**options` the signature of a settings object, by which a recipe's options are checked."""

    def with_signature(constructor: Callable[..., None]) -> Callable[..., None]:
        itself = next(iter(signature(constructor).parameters.values()))
        parameters = [itself, *signature(settings).parameters.values()]
        constructor.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return constructor

    return with_signature


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Options of every task whose rows a recipe names: how they are judged, split and ordered."""

    layout: str | None = None
    """Project whose files have these columns: verl, trl, swift, openai, openrlhf, verifiers, alpaca or sharegpt. auto
    finds it in the first row, and says which of the first rows look like another; so does null, where neither
    prompt_field nor answer_field is set."""
    verifier: VerifierSpec = "exact"
    """A name of VERIFIERS or `module:function`, either with options, or a weighted sum of these (tasks/verifiers)."""
    held_out_path: str | Path | None = None
    """A file with the held-out rows."""
    held_out_fraction: float | None = None
    """Share of the distinct prompts to hold out, where no held-out rows are named; 0.1 when None. 1 makes a benchmark:
    all rows are evaluated and none trained on."""
    score_truncated: bool = False
    """Give the verifier truncated completions too, for a reward that needs no ending."""
    image_field: Names = ("images", "image", None)
    """Column with a picture or a list of pictures: paths beside the file, data: URIs, bytes. None: none."""
    picture_marker: str | None = PICTURE_MARKER
    """Stands in a question for a picture. Without any, pictures come before the question. None: markers are text."""
    allow_paths: bool = False
    """Take pictures of absolute paths, and of paths that leave the directory of the rows."""
    frame: int | None = None
    """Frame of an animation to show; None refuses animations."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that cannot be used: the task is refused with its place, or it is left out and counted."""
    max_prompt_tokens: int | None = None
    """Tokens of the longest prompt, as the model sees it; null for no limit."""
    on_long_prompt: Literal["refuse", "drop"] = "refuse"
    """What becomes of a row whose prompt is longer: it is refused, or left out and counted."""
    seed: int = 0
    """Random seed of the order of the rows. The split does not depend on it."""
    name: str | None = None
    """Name of the task in logs; the name of the file or dataset when None."""

    def limit(self) -> PromptLimit | None:
        """Return the limit of prompts, None where there is none.

        Raises:
            TaskError: an option is wrong.
        """
        if self.on_long_prompt not in ("refuse", "drop"):
            raise TaskError(f"on_long_prompt must be refuse or drop; got {self.on_long_prompt!r}; choose one of these")
        if self.max_prompt_tokens is None:
            return None
        if self.max_prompt_tokens < 1:
            raise TaskError(f"max_prompt_tokens must be 1 or more, or null; got {self.max_prompt_tokens}")
        return PromptLimit(self.max_prompt_tokens, drop=self.on_long_prompt == "drop")

    def laid_out(
        self, rows: Iterator[PlacedRow], columns: Columns, notices: Notices
    ) -> tuple[Iterator[PlacedRow], Columns]:
        """Return rows with the columns to read them by: another project's where the first row has its layout.

        Raises:
            TaskError: there is no such layout, or the first row fits several.
        """
        check_layout(self.layout)
        own_question, own_answer = (
            not (names and isinstance(names[0], DefaultName)) for names in (columns.prompt, columns.answer)
        )
        if own_question and self.layout is not None:
            raise TaskError(
                f"a layout finds the question itself; got layout={self.layout} with prompt_field={columns.prompt[0]}; "
                "leave one of them out"
            )
        if own_question or (own_answer and self.layout is None):
            return rows, columns
        sample = list(itertools.islice(rows, LAYOUT_SAMPLE))
        if not sample:
            return rows, columns
        first = sample[0]
        needed = needs_answer(self.verifier)
        layout = choose_layout(self.layout, *first, needs_answer=needed)
        if self.layout in (None, AUTO):
            other = first_disagreement(layout, sample[1:], needs_answer=needed)
            if other is not None:
                notices.layouts.append(f"{other}; set layout, or prompt_field and answer_field")
        rows = itertools.chain(sample, rows)
        where = first[0].rpartition(":")[0]
        if layout is None:
            if self.layout == AUTO:
                notices.layouts.append(f"{where}: no other layout, with the columns prompt and answer")
            return rows, columns
        reading = layout.read(*first)
        notices.prefers_chat |= layout.prefers_chat  # held-out rows may have a layout of their own
        answer = columns.answer[0] if own_answer and columns.answer else reading.answer_from
        notices.layouts.append(
            f"{where}: layout {layout.name}, with the question in {reading.question_from} and "
            + (f"the answer in {answer}" if answer else "no answer")
        )
        return rows, replace(columns, layout=layout, layout_answer=not own_answer, needs_answer=needed)

    def pictures(self) -> PictureColumns:
        """Return where the pictures of rows are.

        Raises:
            TaskError: an option is wrong.
        """
        if self.on_bad_row not in ("refuse", "skip"):
            raise TaskError(f"on_bad_row must be refuse or skip; got {self.on_bad_row!r}; choose one of these")
        if self.picture_marker is not None and not (isinstance(self.picture_marker, str) and self.picture_marker):
            raise TaskError(
                f"picture_marker must be a text or null; got {self.picture_marker!r}; <image> is the default"
            )
        if self.frame is not None and (not isinstance(self.frame, int) or isinstance(self.frame, bool)):
            raise TaskError(f"frame must be a whole number or null; got {self.frame!r}; 0 is the first")
        return PictureColumns(
            names=as_names("image_field", self.image_field),
            marker=self.picture_marker,
            rules=PictureRules(allow_paths=bool(self.allow_paths), frame=self.frame),
        )


def check_fields(prompt_field: Any, answer_field: Any, verifier: VerifierSpec) -> None:
    """Refuse one column for both question and answer, and a verifier without the answer it needs.

    Raises:
        TaskError: the options are one of these.
    """
    if prompt_field == answer_field:
        raise TaskError(f"prompt_field and answer_field must differ; got {prompt_field!r} for both; change one")
    if answer_field is None and needs_answer(verifier):
        raise TaskError(f"verifier {verifier!r} compares with an answer; got answer_field=None; name the field")
