"""Read the rows of a dataset with the `datasets` library: a split of a hub repository or directory (extra `tasks`).

Where the hub does not answer within HUB_TIMEOUT_SECONDS, the library's cache is used. Where that has nothing, the
message names `path=` as the way to work without a connection. Code of a repository is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.rows.reading import PlacedRow, is_rows_file, read_rows
from sapo.utils.names import did_you_mean

# Long enough for a slow connection. The libraries' own retries would take about half a minute.
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Source:
    """One side of a dataset: a hub repository, file or directory, and the split, configuration and files to read.

    >>> Source(path="sums.jsonl").label, Source(dataset="openai/gsm8k", config="main", split="test").label
    ('sums.jsonl', 'openai/gsm8k[test]')
    """

    dataset: str | None = None
    path: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    """JSON Lines files of the repository to read as one split, instead of what its card names."""

    @property
    def is_file(self) -> bool:
        """Return whether the source is one file of rows, which has no splits."""
        return self.path is not None and is_rows_file(self.path) and not Path(self.path).is_dir()

    @property
    def directory(self) -> Path | None:
        """Return where paths in its rows begin: beside a file, in a directory; None for the hub."""
        if self.path is None:
            return None
        return Path(self.path).parent if self.is_file else Path(self.path)

    @property
    def label(self) -> str:
        """Return the name of the source in messages."""
        place = self.path if self.path is not None else self.dataset
        return str(place) if self.is_file else f"{place}[{self.split}]"


def read_source(source: Source, drop: Iterable[str] = ()) -> Iterator[PlacedRow]:
    """Read the rows of a source with their places, without the columns of `drop`.

    Raises:
        TaskError: the file, directory, hub id, configuration or split is wrong; the library is missing.
    """
    dropped = set(drop)
    if source.path is not None and not Path(source.path).is_dir():
        if not source.is_file and not Path(source.path).exists():
            raise TaskError(f"{source.path}: there must be a file or a directory; got none; check the path")
        for where, row in read_rows(Path(source.path)):
            yield where, {key: value for key, value in row.items() if key not in dropped}
        return
    dataset = _load_directory(source) if source.path is not None else _load_from_hub(source)
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in dropped])
    dataset = _undecoded(dataset)
    for number, row in enumerate(dataset, start=1):
        yield f"{source.label}:{number}", row


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"a dataset is read by the library datasets; got {error}; add it: pip install 'sapo-rl[tasks]'"
        ) from error
    return datasets


def _load_directory(source: Source) -> Any:
    """Load a split of a directory that save_to_disk wrote, or of one with data files like a hub repository."""
    datasets, path = _library(), Path(str(source.path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise TaskError(f"{path}: loading the saved dataset failed: {_reason(error)}; save it again") from error
        if not isinstance(saved, datasets.DatasetDict):
            return saved  # one dataset, which has no splits
        if source.split not in saved:
            hint = did_you_mean(source.split, saved)
            raise TaskError(f"{path}: it has the splits {', '.join(saved)}; got split={source.split!r}{hint}")
        return saved[source.split]
    try:
        configs = datasets.get_dataset_config_names(str(path))
    except Exception as error:
        raise TaskError(f"{path}: the directory must hold data files: {_reason(error)}; check the path") from error
    # A preset names the hub's configuration. In a directory with only one, its name does not matter.
    config = source.config if source.config in configs or len(configs) > 1 else None
    return _load(datasets, replace(source, config=config), str(path), way_out="check the directory, config and split")


def _load_from_hub(source: Source) -> Any:
    datasets, name = _library(), str(source.dataset)
    with _without_waiting(datasets) as reachable:
        if reachable:
            return _load(datasets, source, name, way_out="check the id, config, split and revision")
        try:
            return _load(datasets, source, name, way_out="the hub cannot be reached, and this is from the cache")
        except TaskError as error:
            if not isinstance(error.__cause__, ConnectionError):
                raise
            raise TaskError(
                f"{name}: the Hugging Face hub cannot be reached and the dataset is not in the cache; set path= to a "
                "file or directory with its rows, or connect (HF_HUB_OFFLINE must not be set)"
            ) from error


def _load(datasets: ModuleType, source: Source, name: str, way_out: str) -> Any:
    if source.data_files:
        urls = [f"hf://datasets/{name}@{source.revision or 'main'}/{file}" for file in source.data_files]
        arguments: dict[str, Any] = {"path": "json", "data_files": {source.split: urls}}
    else:
        arguments = {"path": name, "name": source.config, "revision": source.revision}
    try:
        # num_proc stays unset: worker processes of the library would import the caller's main module again.
        return datasets.load_dataset(**arguments, split=source.split)
    # Any exception: the library raises those of five others, and all of them mean that the rows cannot be read.
    except Exception as error:
        # For a file that cannot be parsed, the library says only that it failed. The cause has the reason.
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise TaskError(f"{source.label}: loading failed: {_reason(told or error)}; {way_out}") from error


@contextmanager
def _without_waiting(datasets: ModuleType) -> Iterator[bool]:
    """Yield whether the hub answers. Where it does not, the library uses only its cache inside the block."""
    import huggingface_hub

    if _hub_answers(huggingface_hub):
        yield True
        return
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _hub_answers(huggingface_hub: ModuleType) -> bool:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    # Through the library's own session, which has the proxies and certificates. Any response counts.
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:
        return False
    return True


def _undecoded(dataset: Any) -> Any:
    """Return a dataset whose images come as {bytes, path}: they are decoded by us, and kept as they are encoded."""
    features = copy.deepcopy(dataset.features)
    found = [part for feature in features.values() for part in _image_features(feature)]
    for feature in found:
        feature.decode = False
    return dataset.cast(features) if found else dataset


def _image_features(feature: Any) -> Iterator[Any]:
    """Yield the images of a feature of the library, also those in lists and fields."""
    if type(feature).__name__ == "Image":
        yield feature
    elif isinstance(feature, dict):
        for part in feature.values():
            yield from _image_features(part)
    elif isinstance(feature, (list, tuple)):
        for part in feature:
            yield from _image_features(part)
    elif hasattr(feature, "feature"):
        yield from _image_features(feature.feature)


def _reason(error: BaseException) -> str:
    """Return the beginning of an exception's message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
