"""A task from the user's file: one row of JSON Lines or Parquet per prompt, judged by a named verifier.

Rows are read once and checked at once, so that a bad row is reported by its number before anything is computed. The
held-out side is a second file, or a share of the prompts chosen by a hash of their text: copies of a prompt are always
on the same side, and the choice does not depend on the seed or on the order of rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.tasks.base import JudgedTask, TaskError, check_index, did_you_mean
from sapo.tasks.hashing import falls_in_share, hashed_integer
from sapo.tasks.verifiers import VerifierSpec, load_verifier, needs_answer

DEFAULT_HELD_OUT_FRACTION = 0.1

EXTENSIONS = (".jsonl", ".parquet")


class FileTask(JudgedTask):
    """Prompts and answers from a file, in a new seeded order every epoch.

    Args:
        path: a .jsonl or .parquet file.
        prompt_field: the field with the prompt: a string, or a list of chat messages {role, content}, which goes to
            `Prompt.metadata["messages"]` as it is and to `Prompt.text` as "role: content" lines.
        answer_field: the field with the answer, a string or a number; None when the verifier needs no answer.
        verifier: a name of VERIFIERS, `module:function`, either with options, or a weighted sum (tasks/verifiers).
        held_out_path: a file with the held-out rows, or
        held_out_fraction: the share of distinct prompts of `path` to hold out. Default 0.1.
        seed: the order of the rows, not the split.
        score_truncated: give the verifier completions that did not stop too, for a reward that needs no ending.
        name: what logs call the task. Default: the file's name without its extension.

    All other fields of a row go to `Prompt.metadata`.

    Raises:
        TaskError: naming the file, and the row where there is one: `data.jsonl:3` is its third line, `data.parquet:3`
            its third row.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt_field: str = "prompt",
        answer_field: str | None = "answer",
        verifier: VerifierSpec = "exact",
        held_out_path: str | Path | None = None,
        held_out_fraction: float | None = None,
        score_truncated: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if held_out_path is not None and held_out_fraction is not None:
            raise TaskError(
                "held-out rows come from a file or are a share of the rows, not both; got held_out_path and "
                f"held_out_fraction={held_out_fraction!r}; leave one out"
            )
        if prompt_field == answer_field:
            raise TaskError(f"prompt_field and answer_field must differ; got {prompt_field!r} for both; change one")
        if answer_field is None and needs_answer(verifier):
            raise TaskError(f"verifier {verifier!r} compares with an answer; got answer_field=None; name the field")
        self.name = name if name is not None else Path(path).stem
        self.seed = seed
        self.score_truncated = score_truncated
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.verifier = load_verifier(verifier)
        rows = self._read(Path(path))
        if held_out_path is not None:
            self._train, held_out = rows, self._read(Path(held_out_path))
            _refuse_shared_prompts(path, rows, held_out_path, held_out)
        else:
            fraction = DEFAULT_HELD_OUT_FRACTION if held_out_fraction is None else held_out_fraction
            self._train, held_out = _split(path, rows, fraction)
        distinct = {prompt.text: prompt for prompt in reversed(held_out)}  # of copies, the first row stays
        self._held_out = sorted(distinct.values(), key=lambda p: hashed_integer("held_out", seed, p.text))
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def num_train(self) -> int:
        """Training rows, copies included: the length of an epoch."""
        return len(self._train)

    @property
    def num_held_out(self) -> int:
        """Distinct held-out prompts: the most that `held_out` can give."""
        return len(self._held_out)

    def train_prompt(self, index: int) -> Prompt:
        """Row `index % num_train` of the order of epoch `index // num_train`."""
        return replace(self._train[self.train_row(index)], id=index)

    def train_row(self, index: int) -> int:
        """Which of the rows 0..num_train-1 `train_prompt(index)` asks."""
        check_index(index)
        epoch, position = divmod(index, len(self._train))
        return self._epoch_order(epoch)[position]

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` of the held-out prompts in a seeded order; fewer when the file has no more."""
        return [replace(prompt, id=index) for index, prompt in enumerate(self._held_out[:count])]

    def _epoch_order(self, epoch: int) -> list[int]:
        # Only the last epoch is remembered: an order costs a sort, and prompts are asked for epoch by epoch.
        if self._order[0] != epoch:
            rows = range(len(self._train))
            self._order = (epoch, sorted(rows, key=lambda row: hashed_integer("train", self.seed, epoch, row)))
        return self._order[1]

    def _read(self, path: Path) -> list[Prompt]:
        prompts = [self._prompt(where, row) for where, row in read_rows(path)]
        if not prompts:
            raise TaskError(f"{path}: a task needs at least one row; got an empty file; add rows or name another file")
        return prompts

    def _prompt(self, where: str, row: dict[str, Any]) -> Prompt:
        rest = dict(row)
        question = rest.pop(_present(where, row, "prompt_field", self.prompt_field))
        answer = None
        if self.answer_field is not None:
            field = _present(where, row, "answer_field", self.answer_field)
            answer = _answer_text(where, field, rest.pop(field))
        if isinstance(question, str) and question.strip():
            text = question
        elif isinstance(question, list) and question:
            messages = [_message(where, self.prompt_field, message) for message in question]
            text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        else:
            raise TaskError(
                f"{where}: field {self.prompt_field!r} must be a non-empty string or list of chat messages; "
                f"got {_brief(question)}; fix or remove the row"
            )
        if "messages" in rest:
            raise TaskError(
                f"{where}: a field 'messages' must be the prompt, since that is where chat prompts are kept; got it "
                f"beside prompt_field={self.prompt_field!r}; set prompt_field=messages or rename it"
            )
        if isinstance(question, list):
            rest["messages"] = messages
        return Prompt(id=0, task=self.name, text=text, answer=answer, metadata=rest)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place, `path:number`, for messages.

    Raises:
        TaskError: no such file, an unknown extension, or contents that are not what the extension says.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        hint = did_you_mean(extension, EXTENSIONS)
        raise TaskError(f"{path}: a task's file must end in {' or '.join(EXTENSIONS)}; got {extension!r}{hint}")
    if not path.is_file():
        raise TaskError(f"{path}: there must be a file; got none in {path.absolute().parent}; check the path")
    yield from _read_jsonl(path) if extension == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            # utf-8-sig also takes the byte order mark that some editors write before the first line.
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                # json counts lines within the line it was given, which would contradict the place.
                got = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise TaskError(
                    f"{where}: a line must be one JSON object; got {got}; fix or remove the line"
                ) from error
            if not text.strip():
                continue
            if not isinstance(row, dict):
                raise TaskError(f"{where}: a line must be one JSON object; got {_brief(row)}; write {{...}}")
            yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Imported here because it takes a moment that arithmetic and JSON Lines need not spend.
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{path}: the file must be Parquet; got {reason}; write it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


def _present(where: str, row: dict[str, Any], option: str, field: str) -> str:
    """`field`, when the row has it."""
    if field not in row:
        hint = did_you_mean(field, row)
        raise TaskError(f"{where}: the row has no field {field!r}; it has {list(row)}; set {option} or add it{hint}")
    return field


def _answer_text(where: str, field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise TaskError(f"{where}: field {field!r} must be a string or a finite number; got {_brief(value)}; fix the row")


def _message(where: str, field: str, message: Any) -> dict[str, str]:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise TaskError(
        f"{where}: a chat message in {field!r} must have a role and a content, both strings; got {_brief(message)}; "
        "fix the row"
    )


def _brief(value: Any) -> str:
    """A value for a message, cut so that the message stays one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _split(path: str | Path, rows: list[Prompt], fraction: float) -> tuple[list[Prompt], list[Prompt]]:
    if not (isinstance(fraction, (int, float)) and 0 < fraction < 1):
        raise TaskError(f"held_out_fraction must be between 0 and 1; got {fraction!r}; the default is 0.1")
    train = [row for row in rows if not falls_in_share(row.text, fraction)]
    held_out = [row for row in rows if falls_in_share(row.text, fraction)]
    if not train or not held_out:
        raise TaskError(
            f"{path}: both sides of the split must have rows; got {len(train)} training and {len(held_out)} held-out "
            f"rows with held_out_fraction={fraction}; change it, add rows, or set held_out_path"
        )
    return train, held_out


def _refuse_shared_prompts(
    train_path: str | Path, train: list[Prompt], held_out_path: str | Path, held_out: list[Prompt]
) -> None:
    shared = {row.text for row in train} & {row.text for row in held_out}
    if shared:
        raise TaskError(
            f"{held_out_path}: no held-out prompt may be in the training file {train_path}; got {len(shared)} shared, "
            f"one is {_brief(min(shared))}; remove them from one file, or leave held_out_path out to split by a hash"
        )
