"""Tasks of rows: their training and held-out prompts and the order of these; and the task `file`.

Rows are read and checked when the task is made, so that a bad row is reported by its place before anything is computed.
The held-out prompts are rows of their own, or a share of the prompts chosen by a hash of their text and pictures: one
question about a thousand pictures is a thousand prompts. So copies of a prompt, and prompts that differ in blanks or
case alone, are always on the same side, and the choice depends neither on the seed nor on the order of rows. A
benchmark holds all rows out.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Self

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.base import JudgedTask, check_index
from sapo.tasks.rows.columns import ANSWER, PROMPT, Columns
from sapo.tasks.rows.notices import Notices
from sapo.tasks.rows.reading import PlacedRow, brief, name_of, read_rows
from sapo.tasks.rows.settings import PromptLimit, RowSettings, check_fields, takes_options_of
from sapo.tasks.verifiers import Verifier, load_verifier, reference_check
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
        notices: lines about the rows for the user: how many were skipped.
        limit: longest prompt; see `apply_limit`.
        places: place of each question's row by the identity of its prompt, which `apply_limit` names.
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
        notices: Sequence[str] = (),
        limit: PromptLimit | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self._places = {} if limit is None or places is None else places
        self.notices = tuple(notices)
        self.seed = seed
        self.score_truncated = score_truncated
        self.prefers_chat = prefers_chat
        self.verifier = verifier
        self._finish = finish
        self._train = train
        distinct = {prompt.identity: prompt for prompt in reversed(held_out)}  # of copies, the first row is kept
        self.held_out_copies = len(held_out) - len(distinct)
        """Held-out rows left out because they repeat another."""
        self._held_out = _in_order(distinct.values(), seed)
        self._order: tuple[int, list[int]] = (-1, [])
        self._read = self._train, self._held_out  # before any are dropped

    def with_seed(self, seed: int) -> Self:
        """Return the task in the order of another seed. The rows are shared."""
        other = copy.copy(self)
        other.seed, other._order = seed, (-1, [])
        other._held_out = _in_order(self._held_out, seed)
        return other

    def apply_limit(self, count: Callable[[Prompt], int]) -> None:
        """Leave out the rows with longer prompts than the limit, or refuse the first, as the limit says.

        Args:
            count: function that returns the tokens of a prompt, or an upper bound that is within the limit.

        Raises:
            TaskError: one is longer and the limit does not drop them, or nothing is left of a side.
        """
        if self.limit is None:
            return
        sides = []
        for rows in (self._train, self._held_out):
            fitting = []
            for row in rows:
                tokens = count(row)
                if tokens <= self.limit.tokens:
                    fitting.append(row)
                elif not self.limit.drop:
                    place = self._places.get(row.identity)
                    where = self.name if place is None else f"{place}: task {self.name}"
                    raise TaskError(
                        f"{where}: a prompt must have at most {self.limit.tokens} tokens (max_prompt_tokens); got "
                        f"{tokens}: {brief(row.text)}; raise it, or set on_long_prompt=drop to leave such rows out"
                    )
            if rows and not fitting:
                raise TaskError(
                    f"{self.name}: max_prompt_tokens={self.limit.tokens} must leave some rows; got {len(rows)} rows "
                    "with longer prompts and no other; raise it"
                )
            sides.append(fitting)
        dropped = [len(rows) - len(kept) for rows, kept in zip((self._train, self._held_out), sides, strict=True)]
        self._train, self._held_out = sides
        self._order = (-1, [])
        if any(dropped):
            self.notices += (
                f"{self.name}: {dropped[0]} training and {dropped[1]} held-out rows with prompts of more than "
                f"{self.limit.tokens} tokens were dropped, and {len(sides[0])} and {len(sides[1])} are left",
            )

    @property
    def num_train(self) -> int:
        """Return the number of training rows including copies: the length of an epoch, 0 for a benchmark."""
        return len(self._train)

    @property
    def num_held_out(self) -> int:
        """Return the number of distinct held-out prompts."""
        return len(self._held_out)

    def content_digest(self) -> str:
        """Return a hash of all rows, by which a run that is resumed knows them again."""
        digest = hashlib.sha256()
        for prompt in itertools.chain(*self._read):
            # repr for values that JSON does not have: rows from Parquet hold dates and decimals.
            row = json.dumps([prompt.text, prompt.answer, dict(prompt.metadata)], sort_keys=True, default=repr)
            digest.update(row.encode() + b"\n")
        return digest.hexdigest()[:16]

    def picture_digest(self) -> str | None:
        """Return a hash of the pictures of all rows, None without any: a row may name a file that is replaced."""
        shown = [picture.sha256 for prompt in itertools.chain(*self._read) for picture in prompt.pictures]
        return hashlib.sha256(" ".join(shown).encode()).hexdigest()[:16] if shown else None

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
        distinct = {prompt.identity: prompt for prompt in reversed(self._train)}
        chosen = sorted(distinct.values(), key=lambda p: hashed_integer("shots", p.identity))[:count]
        if len(chosen) < count:
            raise TaskError(f"{self.name}: it has {len(chosen)} distinct training rows; got shots={count}")
        for prompt in chosen:
            if "messages" in prompt.metadata or prompt.pictures or prompt.answer is None:
                raise TaskError(
                    f"{self.name}: an example needs a question in text alone and an answer; got {brief(prompt.text)}; "
                    "write the examples in the recipe: shots: [{prompt: ..., answer: ...}]"
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


@dataclass(frozen=True)
class FileSettings(RowSettings):
    """Options of the task `file`. Columns that are not named go to `Prompt.metadata`.

    >>> FileSettings("sums.jsonl", prompt_field="question").answer_field
    'answer'
    """

    path: str | Path
    """A .jsonl, .json, .csv or .parquet file; all but the last may be compressed, as .jsonl.gz."""
    _: KW_ONLY
    prompt_field: str = PROMPT
    """Field with the prompt: a string, or a list of chat messages {role, content}. A dotted name leads into objects.
    Messages go to `Prompt.metadata["messages"]` as they are, and to `Prompt.text` as "role: content" lines."""
    answer_field: str | None = ANSWER
    """Field with the answer, a string or a number, as `reward_model.ground_truth`; None when the verifier needs no
    answer."""

    def __post_init__(self) -> None:
        if self.held_out_path is not None and self.held_out_fraction is not None:
            raise TaskError(
                "held-out rows come from a file or are a share of the rows, not both; got held_out_path and "
                f"held_out_fraction={self.held_out_fraction!r}; leave one out"
            )
        check_fields(self.prompt_field, self.answer_field, self.verifier)


def _in_order(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    """Return held-out prompts in the order of a seed, whatever theirs is."""
    return sorted(prompts, key=lambda prompt: hashed_integer("held_out", seed, prompt.identity))


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
        name = settings.name if settings.name is not None else name_of(path)
        answer = () if settings.answer_field is None else (settings.answer_field,)
        columns = Columns(
            prompt=(settings.prompt_field,),
            answer=answer,
            pictures=settings.pictures(),
            skip_bad=settings.on_bad_row == "skip",
            check=reference_check(settings.verifier),
        )
        notices = Notices()
        train = read_prompts(path, settings, columns, name, notices)
        if settings.held_out_path is not None:
            held_out = read_prompts(settings.held_out_path, settings, columns, name, notices)
            refuse_shared_prompts(path, train, settings.held_out_path, held_out)
            notices.take_sides(train, held_out)
        else:
            train, held_out = split_prompts(path, train, settings.held_out_fraction)
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            verifier=judge,
            seed=settings.seed,
            score_truncated=settings.score_truncated,
            prefers_chat=notices.prefers_chat,
            notices=notices.lines(name),
            limit=settings.limit(),
            places=notices.places,
        )

    @classmethod
    def of(cls, settings: FileSettings) -> FileTask:
        """Make the task of a settings object.

        Raises:
            TaskError: as from the constructor.
        """
        return cls(**vars(settings))


def read_prompts(
    path: str | Path, settings: RowSettings, columns: Columns, task: str, notices: Notices
) -> list[Prompt]:
    """Read the prompts of a file, at least one."""
    return make_prompts(path, settings, read_rows(Path(path)), columns, task, Path(path).parent, notices)


def make_prompts(
    place: str | Path,
    settings: RowSettings,
    rows: Iterator[PlacedRow],
    columns: Columns,
    task: str,
    directory: Path | None,
    notices: Notices,
) -> list[Prompt]:
    """Make the prompts of rows in the layout that the settings name, at least one.

    Raises:
        TaskError: a row is wrong, or there are none.
    """
    rows, columns = settings.laid_out(rows, columns, notices)
    return refuse_none(place, columns.prompts(rows, task, directory, notices))


def refuse_none(where: str | Path, prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts unless there are none.

    Raises:
        TaskError: there are none.
    """
    if not prompts:
        raise TaskError(f"{where}: a task needs at least one row; got none; add rows or name another")
    return prompts


def split_prompts(where: str | Path, rows: list[Prompt], fraction: Any = None) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training and held-out ones by a hash of their text and pictures.

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
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for row in rows:
        sides[falls_in_share(row.likeness, fraction)].append(row)
    train, held_out = sides
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
    of_train = {row.identity for row in train}
    shared = {row.identity: row.text for row in held_out if row.identity in of_train}
    if shared:
        raise TaskError(
            f"{held_out_place}: no held-out prompt may be in the training rows {train_place}; got {len(shared)} "
            f"shared, one is {brief(min(shared.values()))}; remove them from one side, or split by held_out_fraction"
        )
