"""Tasks of rows: their training and held-out prompts and the order of these; and the task `file`.

Rows are read and checked when the task is made, so that a bad row is reported by its place before anything is computed.
The held-out prompts are rows of their own, or a share of the prompts chosen by a hash of their text. So copies of a
prompt are always on the same side, and the choice depends neither on the seed nor on the order of rows. A benchmark
holds all rows out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from inspect import Signature, signature
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.base import JudgedTask, check_index
from sapo.tasks.rows.columns import Columns
from sapo.tasks.rows.reading import brief, read_rows
from sapo.tasks.verifiers import Verifier, VerifierSpec, load_verifier, needs_answer
from sapo.utils.hashing import falls_in_share, hashed_integer

DEFAULT_HELD_OUT_FRACTION = 0.1


class RowTask(JudgedTask):
    """Training and held-out prompts, with the training prompts in a new seeded order every epoch.

    Args:
        name: name of the task in logs.
        train, held_out: the two sides. A benchmark has no training prompts, and training on it is refused.
        verifier: verifier from `load_verifier`.
        seed: random seed of the order of the rows. The split does not depend on it.
        score_truncated: give the verifier truncated completions too, for a reward that needs no ending.
        prefers_chat: the questions are worded for a chat model.
        finish: function that completes a prompt on demand, where doing so for every row would take too much memory.
    """

    def __init__(
        self,
        *,
        name: str,
        train: list[Prompt],
        held_out: list[Prompt],
        verifier: Verifier,
        seed: int = 0,
        score_truncated: bool = False,
        prefers_chat: bool = False,
        finish: Callable[[Prompt], Prompt] | None = None,
    ) -> None:
        self.name = name
        self.seed = seed
        self.score_truncated = score_truncated
        self.prefers_chat = prefers_chat
        self.verifier = verifier
        self._finish = finish
        self._train = train
        distinct = {prompt.text: prompt for prompt in reversed(held_out)}  # of copies, the first row is kept
        self._held_out = sorted(distinct.values(), key=lambda p: hashed_integer("held_out", seed, p.text))
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def num_train(self) -> int:
        """Return the number of training rows including copies: the length of an epoch, 0 for a benchmark."""
        return len(self._train)

    @property
    def num_held_out(self) -> int:
        """Return the number of distinct held-out prompts."""
        return len(self._held_out)

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of row `index % num_train` in the order of epoch `index // num_train`.

        Raises:
            TaskError: all rows are held out.
        """
        return self._finished(self._train[self.train_row(index)], index)

    def train_row(self, index: int) -> int:
        """Return which of the rows 0..num_train-1 is `train_prompt(index)`.

        Raises:
            TaskError: all rows are held out.
        """
        check_index(index)
        self._refuse_without_training_side()
        epoch, position = divmod(index, len(self._train))
        return self._epoch_order(epoch)[position]

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts in a seeded order, or all of them."""
        return [self._finished(prompt, index) for index, prompt in enumerate(self._held_out[:count])]

    def shots(self, count: int) -> list[tuple[str, str]]:
        """Return `count` distinct training questions with their solutions. They do not depend on the seed.

        Raises:
            TaskError: there are fewer, their rows are chats, or they have no answers.
        """
        self._refuse_without_training_side()
        distinct = {prompt.text: prompt for prompt in reversed(self._train)}
        chosen = sorted(distinct.values(), key=lambda p: hashed_integer("shots", p.text))[:count]
        if len(chosen) < count:
            raise TaskError(f"{self.name}: it has {len(chosen)} distinct training rows; got shots={count}")
        for prompt in chosen:
            if "messages" in prompt.metadata or prompt.answer is None:
                raise TaskError(
                    f"{self.name}: an example needs a question in text and an answer; got {brief(prompt.text)}; write "
                    "the examples in the recipe: shots: [{prompt: ..., answer: ...}]"
                )
        return [(prompt.text, str(prompt.metadata.get("solution") or prompt.answer)) for prompt in chosen]

    def _refuse_without_training_side(self) -> None:
        if not self._train:
            raise TaskError(
                f"{self.name}: all {self.num_held_out} rows are held out for evaluation and none are left to train on; "
                "set held_out_fraction=0.1 to train on nine tenths of them, or held_out_path=FILE to hold out others"
            )

    def _finished(self, prompt: Prompt, index: int) -> Prompt:
        prompt = replace(prompt, id=index)
        return prompt if self._finish is None else self._finish(prompt)

    def _epoch_order(self, epoch: int) -> list[int]:
        # Only the order of the last epoch is kept: it costs a sort, and prompts are sampled epoch by epoch.
        if self._order[0] != epoch:
            rows = range(len(self._train))
            self._order = (epoch, sorted(rows, key=lambda row: hashed_integer("train", self.seed, epoch, row)))
        return self._order[1]


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

    verifier: VerifierSpec = "exact"
    """A name of VERIFIERS or `module:function`, either with options, or a weighted sum of these (tasks/verifiers)."""
    held_out_path: str | Path | None = None
    """A file with the held-out rows."""
    held_out_fraction: float | None = None
    """Share of the distinct prompts to hold out, where no held-out rows are named; 0.1 when None. 1 makes a benchmark:
    all rows are evaluated and none trained on."""
    score_truncated: bool = False
    """Give the verifier truncated completions too, for a reward that needs no ending."""
    seed: int = 0
    """Random seed of the order of the rows. The split does not depend on it."""
    name: str | None = None
    """Name of the task in logs; the name of the file or dataset when None."""


@dataclass(frozen=True)
class FileSettings(RowSettings):
    """Options of the task `file`. Columns that are not named go to `Prompt.metadata`.

    >>> FileSettings("sums.jsonl", prompt_field="question").answer_field
    'answer'
    """

    path: str | Path
    """A .jsonl, .json or .parquet file."""
    _: KW_ONLY
    prompt_field: str = "prompt"
    """Field with the prompt: a string, or a list of chat messages {role, content}. Messages go to
    `Prompt.metadata["messages"]` as they are, and to `Prompt.text` as "role: content" lines."""
    answer_field: str | None = "answer"
    """Field with the answer, a string or a number; None when the verifier needs no answer."""

    def __post_init__(self) -> None:
        if self.held_out_path is not None and self.held_out_fraction is not None:
            raise TaskError(
                "held-out rows come from a file or are a share of the rows, not both; got held_out_path and "
                f"held_out_fraction={self.held_out_fraction!r}; leave one out"
            )
        check_fields(self.prompt_field, self.answer_field, self.verifier)


class FileTask(RowTask):
    """Prompts and answers from a file.

    Args:
        path, options: the fields of `FileSettings`.

    Raises:
        TaskError: an option is wrong, or the file is. The message names the file, and the row where there is one:
            `data.jsonl:3` is its third line, `data.parquet:3` its third row.
    """

    @takes_options_of(FileSettings)
    def __init__(self, path: str | Path, **options: Any) -> None:
        self.settings = settings = FileSettings(path, **options)
        judge = load_verifier(settings.verifier)  # before the rows, so that a wrong name is found first
        name = settings.name if settings.name is not None else Path(path).stem
        answer = () if settings.answer_field is None else (settings.answer_field,)
        columns = Columns(prompt=(settings.prompt_field,), answer=answer)
        train = read_prompts(path, columns, name)
        if settings.held_out_path is not None:
            held_out = read_prompts(settings.held_out_path, columns, name)
            refuse_shared_prompts(path, train, settings.held_out_path, held_out)
        else:
            train, held_out = split_prompts(path, train, settings.held_out_fraction)
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            verifier=judge,
            seed=settings.seed,
            score_truncated=settings.score_truncated,
        )

    @classmethod
    def of(cls, settings: FileSettings) -> FileTask:
        """Make the task of a settings object.

        Raises:
            TaskError: as from the constructor.
        """
        return cls(**vars(settings))


def read_prompts(path: str | Path, columns: Columns, task: str) -> list[Prompt]:
    """Read the prompts of a file, at least one."""
    return refuse_none(path, columns.prompts(read_rows(Path(path)), task))


def refuse_none(where: str | Path, prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts unless there are none.

    Raises:
        TaskError: there are none.
    """
    if not prompts:
        raise TaskError(f"{where}: a task needs at least one row; got none; add rows or name another")
    return prompts


def check_fields(prompt_field: Any, answer_field: Any, verifier: VerifierSpec) -> None:
    """Refuse one column for both question and answer, and a verifier without the answer it needs.

    Raises:
        TaskError: the options are one of these.
    """
    if prompt_field == answer_field:
        raise TaskError(f"prompt_field and answer_field must differ; got {prompt_field!r} for both; change one")
    if answer_field is None and needs_answer(verifier):
        raise TaskError(f"verifier {verifier!r} compares with an answer; got answer_field=None; name the field")


def split_prompts(where: str | Path, rows: list[Prompt], fraction: Any = None) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training and held-out ones by a hash of their text.

    Args:
        where: the place of the rows, for messages.
        fraction: share to hold out; 0.1 when None. 1 holds all out.

    Raises:
        TaskError: the fraction is outside (0, 1], or a side that must have rows has none.
    """
    fraction = DEFAULT_HELD_OUT_FRACTION if fraction is None else fraction
    if isinstance(fraction, bool) or not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
        raise TaskError(
            f"held_out_fraction must be between 0 and 1; got {fraction!r}; the default is 0.1, and 1 holds all rows out"
        )
    if fraction == 1:
        return [], rows
    train = [row for row in rows if not falls_in_share(row.text, fraction)]
    held_out = [row for row in rows if falls_in_share(row.text, fraction)]
    if not train or not held_out:
        raise TaskError(
            f"{where}: both sides of the split must have rows; got {len(train)} training and {len(held_out)} held-out "
            f"rows with held_out_fraction={fraction}; change it, add rows, or set held_out_path"
        )
    return train, held_out


def refuse_shared_prompts(
    train_place: str | Path, train: list[Prompt], held_out_place: str | Path, held_out: list[Prompt]
) -> None:
    """Refuse a prompt that is on both sides.

    Raises:
        TaskError: there is one.
    """
    shared = {row.text for row in train} & {row.text for row in held_out}
    if shared:
        raise TaskError(
            f"{held_out_place}: no held-out prompt may be in the training rows {train_place}; got {len(shared)} "
            f"shared, one is {brief(min(shared))}; remove them from one side, or split by held_out_fraction"
        )
