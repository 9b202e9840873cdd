"""The task of a dataset: rows of the Hugging Face hub or of this machine, with their columns named in the recipe.

    - {name: dataset, dataset: openai/gsm8k, config: main, prompt_field: question, answer_after: "####",
       held_out_split: test, template: "{prompt}\\nPut your final answer within \\\\boxed{}.", verifier: math}

The presets (presets.py) are such options under a name. `path` takes the rows from a file or a directory instead of the
hub; everything else stays, so that a machine without a connection asks the same questions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.rows.columns import Columns, Names, as_names
from sapo.tasks.rows.hub import Source, read_source
from sapo.tasks.rows.reading import Row
from sapo.tasks.rows.task import (
    DEFAULT_HELD_OUT_FRACTION,
    RowTask,
    check_fields,
    read_prompts,
    refuse_none,
    refuse_shared_prompts,
    split_prompts,
)
from sapo.tasks.verifiers import VerifierSpec, load_verifier


class DatasetTask(RowTask):
    """Prompts and answers from a dataset.

    Args:
        dataset: a hub id, or a path as below.
        path: a .jsonl, .json or .parquet file, or a directory that `datasets` can read, in place of the hub.
        split, config, revision: which rows of the hub repository or directory. A file has no splits.
        data_files: JSON Lines files of the hub repository to read instead of what its card names.
        prompt_field, answer_field: columns, each a name or a list of alternatives in order of preference. A question
            is a string or a list of chat messages; answer_field is null when the verifier needs no answer.
        answer_after: a mark in the answer column; the answer is what follows its last occurrence.
        subject_field: the column by whose values tables are made; a last null among alternatives lets it be missing.
        image_field: the column with images of questions that cannot be asked without. Refused so far.
        drop_fields: columns left out; all others go to `Prompt.metadata`.
        template: the wording around the question, as in "{prompt}\\nPut your final answer within \\\\boxed{}."
        verifier: what `load_verifier` takes.
        held_out_split: the split that is held out, or
        held_out_path: a file that is held out, or
        held_out_fraction: the share of distinct prompts of `split` to hold out; 1 makes it a benchmark, whose rows
            are all evaluated and none trained on. Default 0.1.
        prefers_chat: whether the wording is for a chat model; a model with a chat template is then asked through it.
        score_truncated: give the verifier completions that did not stop too.
        adapt, finish: functions of a preset's: see `Columns.adapt` and `RowTask`.
        seed: the order of the rows, not the split.
        name: what logs call it. Default: the last part of the id or path.

    Raises:
        TaskError: an option is wrong, or the rows are, with their place.
    """

    def __init__(
        self,
        dataset: str | None = None,
        *,
        path: str | Path | None = None,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        data_files: Names = None,
        prompt_field: Names = "prompt",
        answer_field: Names = "answer",
        answer_after: str | None = None,
        subject_field: Names = None,
        image_field: Names = None,
        drop_fields: Names = None,
        template: str = "{prompt}",
        verifier: VerifierSpec = "exact",
        held_out_split: str | None = None,
        held_out_path: str | Path | None = None,
        held_out_fraction: float | None = None,
        prefers_chat: bool = False,
        score_truncated: bool = False,
        adapt: Callable[[str, Row], Row] | None = None,
        finish: Callable[[Prompt], Prompt] | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        source = _source(dataset, path, split, config, revision, as_names("data_files", data_files))
        _refuse_two_held_out_sides(held_out_split, held_out_path, held_out_fraction)
        if held_out_split is not None and source.is_file:
            raise TaskError(
                f"{source.label}: a file has no splits; got held_out_split={held_out_split!r}; set held_out_path or "
                "held_out_fraction"
            )
        if not isinstance(template, str) or "{prompt}" not in template:
            raise TaskError(f"template must hold {{prompt}}, where the question goes; got {template!r}; write it there")
        name = name if name is not None else Path(str(source.path or source.dataset)).stem
        if image_field is not None:
            raise TaskError(
                f"{name}: its questions need their images (column {as_names('image_field', image_field)[0]!r}), and "
                "prompts are text so far; vision-language models come later; choose a task of text"
            )
        check_fields(prompt_field, answer_field, verifier)
        judge = load_verifier(verifier)  # before the rows, so that a wrong name is found before a download
        columns = Columns(
            prompt=as_names("prompt_field", prompt_field),
            answer=as_names("answer_field", answer_field),
            subject=as_names("subject_field", subject_field),
            template=template,
            answer_after=answer_after,
            drop=_all_names("drop_fields", drop_fields),
            adapt=adapt,
        )
        rows = _read(source, columns, name)
        if held_out_split is not None:
            other: Source | str | Path | None = _source(dataset, path, held_out_split, config, revision, ())
        else:
            other = held_out_path
        train, held_out = _two_sides(source, rows, columns, name, other, held_out_fraction)
        super().__init__(
            name=name,
            train=train,
            held_out=held_out,
            verifier=judge,
            seed=seed,
            score_truncated=score_truncated,
            prefers_chat=prefers_chat,
            finish=finish,
        )


def _source(
    dataset: str | None,
    path: str | Path | None,
    split: str,
    config: str | None,
    revision: str | None,
    data_files: tuple[str | None, ...],
) -> Source:
    if path is None and dataset is None:
        raise TaskError("a dataset task needs dataset, a hub id, or path, a file or directory; got neither; add one")
    if path is None and dataset is not None and _looks_local(dataset):
        path = dataset
    for option, value in (("split", split), ("config", config), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise TaskError(f"{option} must be a string; got {value!r}; put it in quotes")
    if path is not None:
        return Source(path=str(Path(path).expanduser()), split=split, config=config)
    files = tuple(name for name in data_files if name is not None)
    return Source(dataset=str(dataset), split=split, config=config, revision=revision, data_files=files)


def _looks_local(dataset: str) -> bool:
    """Whether `dataset` is a path: it is there, or no hub id can look like it."""
    return Path(dataset).exists() or Source(path=dataset).is_file or dataset.startswith((".", "/", "~"))


def _read(source: Source, columns: Columns, name: str) -> list[Prompt]:
    return refuse_none(source.label, columns.prompts(read_source(source, columns.drop), name))


def _two_sides(
    source: Source,
    rows: list[Prompt],
    columns: Columns,
    name: str,
    other: Source | str | Path | None,
    fraction: float | None,
) -> tuple[list[Prompt], list[Prompt]]:
    """The rows to train on, and those held out: the rows of `other`, a split or a file, or a share of `rows` itself."""
    if other is None:
        return split_prompts(source.label, rows, DEFAULT_HELD_OUT_FRACTION if fraction is None else fraction)
    if isinstance(other, Source):
        held_out, place = _read(other, columns, name), other.label
    else:
        held_out, place = read_prompts(other, columns, name), str(other)
    refuse_shared_prompts(source.label, rows, place, held_out)
    return rows, held_out


def _all_names(option: str, value: Names) -> tuple[str, ...]:
    return tuple(name for name in as_names(option, value) if name is not None)


def _refuse_two_held_out_sides(split: str | None, path: str | Path | None, fraction: float | None) -> None:
    options = {"held_out_split": split, "held_out_path": path, "held_out_fraction": fraction}
    given = {option: value for option, value in options.items() if value is not None}
    if len(given) > 1:
        raise TaskError(
            "held-out rows are a split, a file or a share of the rows, one of them; got "
            f"{' and '.join(f'{option}={value}' for option, value in given.items())}; leave one out"
        )
