"""The task `dataset`: rows of the Hugging Face hub or of this machine, with their columns named in the recipe.

    - {name: dataset, dataset: openai/gsm8k, config: main, prompt_field: question, answer_after: "####",
       held_out_split: test, template: "{prompt}\\nPut your final answer within \\\\boxed{}.", verifier: math}

The presets (presets.py) are such options under a name. `path` reads the rows from a file or a directory instead of the
hub. Everything else stays the same, so that a machine without a connection has the same questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.rows.columns import ANSWER, PROMPT, Columns, Names, as_names
from sapo.tasks.rows.hub import Source, read_source
from sapo.tasks.rows.notices import Notices
from sapo.tasks.rows.reading import Row, name_of
from sapo.tasks.rows.settings import RowSettings, check_fields, takes_options_of
from sapo.tasks.rows.task import RowTask, make_prompts, read_prompts, refuse_shared_prompts, split_prompts
from sapo.tasks.verifiers import load_verifier, reference_check

HELD_OUT_SIDES = ("held_out_split", "held_out_path", "held_out_fraction")
"""Options that say which rows are held out. At most one of them may be set."""


@dataclass(frozen=True)
class DatasetSettings(RowSettings):
    """Options of the task `dataset`. Columns that are not named go to `Prompt.metadata`.

    A column is a name or a list of alternatives in order of preference.

    >>> settings = DatasetSettings("openai/gsm8k", config="main", prompt_field="question", answer_after="####")
    >>> settings.split
    'train'
    """

    dataset: str | None = None
    """A hub id, or a path as in `path`."""
    _: KW_ONLY
    path: str | Path | None = None
    """A .jsonl, .json, .csv or .parquet file, or a directory that `datasets` can read, in place of the hub."""
    split: str = "train"
    """Split of the repository or directory whose rows are read. A file has no splits."""
    config: str | None = None
    """Configuration of the repository or directory."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    data_files: Names = None
    """JSON Lines files of the hub repository to read instead of what its card names."""
    prompt_field: Names = PROMPT
    """Column with the question: a string, or a list of chat messages."""
    answer_field: Names = ANSWER
    """Column with the answer; None when the verifier needs no answer."""
    answer_after: str | None = None
    """A mark in the answer column. The answer is what follows its last occurrence."""
    subject_field: Names = None
    """Column by whose values tables are made. A last None among alternatives lets it be missing."""
    drop_fields: Names = None
    """Columns left out."""
    template: str = "{prompt}"
    """Wording around the question, as "{prompt}\\nPut your final answer within \\boxed{}."."""
    held_out_split: str | None = None
    """Split that is held out. At most one of held_out_split, held_out_path and held_out_fraction may be set."""
    prefers_chat: bool = False
    """Whether the wording is for a chat model; a model with a chat template is then asked through it."""
    adapt: Callable[[str, Row], Row] | None = None
    """Function of a preset that makes a row of other columns: see `Columns.adapt`."""
    finish: Callable[[Prompt], Prompt] | None = None
    """Function of a preset that completes a prompt when it is asked for: see `RowTask`."""

    def __post_init__(self) -> None:
        self._refuse_two_held_out_sides()
        if not isinstance(self.template, str) or "{prompt}" not in self.template:
            raise TaskError(
                f"template must hold {{prompt}}, where the question goes; got {self.template!r}; write it there"
            )
        check_fields(self.prompt_field, self.answer_field, self.verifier)

    @property
    def label(self) -> str:
        """Return what logs call the task: its name, or the last part of the id or path."""
        return self.name if self.name is not None else name_of(str(self.path or self.dataset))

    def columns(self) -> Columns:
        """Return which columns make a prompt.

        Raises:
            TaskError: a name of a column is no string.
        """
        return Columns(
            prompt=as_names("prompt_field", self.prompt_field),
            answer=as_names("answer_field", self.answer_field),
            subject=as_names("subject_field", self.subject_field),
            template=self.template,
            answer_after=self.answer_after,
            pictures=self.pictures(),
            skip_bad=self.on_bad_row == "skip",
            drop=_all_names("drop_fields", self.drop_fields),
            adapt=self.adapt,
            # Rows that are completed on demand have no answer yet.
            check=reference_check(self.verifier) if self.finish is None else None,
        )

    def source(self) -> Source:
        """Return where the rows are.

        Raises:
            TaskError: neither a hub id nor a path is given, or held_out_split of a file, which has no splits.
        """
        source = self._source_of(self.split, _all_names("data_files", self.data_files))
        if self.held_out_split is not None and source.is_file:
            raise TaskError(
                f"{source.label}: a file has no splits; got held_out_split={self.held_out_split!r}; set held_out_path "
                "or held_out_fraction"
            )
        return source

    def held_out_source(self) -> Source | str | Path | None:
        """Return where the held-out rows are: another split, a file, or None where they are a share of the rows."""
        if self.held_out_split is None:
            return self.held_out_path
        return self._source_of(self.held_out_split)

    def _source_of(self, split: str, data_files: tuple[str, ...] = ()) -> Source:
        if self.path is None and self.dataset is None:
            raise TaskError(
                "a dataset task needs dataset, a hub id, or path, a file or directory; got neither; add one"
            )
        for option, value in (("split", split), ("config", self.config), ("revision", self.revision)):
            if value is not None and not isinstance(value, str):
                raise TaskError(f"{option} must be a string; got {value!r}; put it in quotes")
        path = self.path
        if path is None and _looks_local(str(self.dataset)):
            path = self.dataset
        if path is not None:
            return Source(path=str(Path(path).expanduser()), split=split, config=self.config)
        return Source(
            dataset=str(self.dataset), split=split, config=self.config, revision=self.revision, data_files=data_files
        )

    def _refuse_two_held_out_sides(self) -> None:
        given = {option: value for option in HELD_OUT_SIDES if (value := getattr(self, option)) is not None}
        if len(given) > 1:
            raise TaskError(
                "held-out rows are a split, a file or a share of the rows, one of them; got "
                f"{' and '.join(f'{option}={value}' for option, value in given.items())}; leave one out"
            )


class DatasetTask(RowTask):
    """Prompts and answers from a dataset.

    Args:
        dataset, options: the fields of `DatasetSettings`.

    Raises:
        TaskError: an option is wrong, or the rows are. The message names the place of a wrong row.
    """

    @takes_options_of(DatasetSettings)
    def __init__(self, dataset: str | None = None, **options: Any) -> None:
        self.settings = settings = DatasetSettings(dataset, **options)
        source, columns = settings.source(), settings.columns()
        judge = load_verifier(settings.verifier)  # before the rows, so that a wrong name is found before a download
        notices = Notices()
        rows = _read(source, settings, columns, notices)
        train, held_out = _two_sides(source, rows, columns, settings, notices)
        super().__init__(
            name=settings.label,
            train=train,
            held_out=held_out,
            verifier=judge,
            seed=settings.seed,
            score_truncated=settings.score_truncated,
            prefers_chat=settings.prefers_chat or notices.prefers_chat,
            finish=settings.finish,
            notices=notices.lines(settings.label),
            limit=settings.limit(),
            places=notices.places,
        )

    @classmethod
    def of(cls, settings: DatasetSettings) -> DatasetTask:
        """Make the task of a settings object.

        Raises:
            TaskError: as from the constructor.
        """
        return cls(**vars(settings))


def _looks_local(dataset: str) -> bool:
    """Return whether `dataset` is a path: it exists, or no hub id can look like it."""
    return Path(dataset).exists() or Source(path=dataset).is_file or dataset.startswith((".", "/", "~"))


def _read(source: Source, settings: DatasetSettings, columns: Columns, notices: Notices) -> list[Prompt]:
    rows = read_source(source, columns.drop)
    return make_prompts(source.label, settings, rows, columns, settings.label, source.directory, notices)


def _two_sides(
    source: Source, rows: list[Prompt], columns: Columns, settings: DatasetSettings, notices: Notices
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the rows to train on and the held-out ones: those of another split or file, or a share of `rows`."""
    other = settings.held_out_source()
    if other is None:
        return split_prompts(source.label, rows, settings.held_out_fraction)
    if isinstance(other, Source):
        held_out, place = _read(other, settings, columns, notices), other.label
    else:
        held_out, place = read_prompts(other, settings, columns, settings.label, notices), str(other)
    refuse_shared_prompts(source.label, rows, place, held_out)
    notices.take_sides(rows, held_out)
    return rows, held_out


def _all_names(option: str, value: Names) -> tuple[str, ...]:
    return tuple(name for name in as_names(option, value) if name is not None)
