"""An evaluation on disk: stored chunk by chunk while it is under way, so that a killed one can be resumed.

evals/NAME/config.json        what was asked: model, problems, sampling; an evaluation of anything else is refused here
           progress.jsonl     while it is under way: the problems done and, after each chunk of them, its line and the
           clock completions.jsonl  when it is done: one line per problem with all its completions (`records.Answered`)
           results.json       the figures, see docs/evaluation.md index.html         the completions, to be read

A chunk is done when the line that closes it is on the disk; what a kill left behind after the last such line is cut off
and drawn again. completions.jsonl, results.json and index.html are each written aside and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sapo.errors import ConfigError
from sapo.evaluation.figures import Clock
from sapo.evaluation.records import Answered
from sapo.utils.files import lock_directory, unwritable, write_whole
from sapo.utils.reading import check_kinds, interpreting, is_whole, read_json


class EvaluationStore:
    """The files of one evaluation, under a lock, so that no two processes write them. A `ProgressStore`.

    Args:
        path: the directory; made where there is none.
        asked: what names the evaluation, a JSON value: whatever changes a completion or its judgement.
        machine: where it is made; an evaluation that is resumed elsewhere keeps the machine it was begun on.

    Raises:
        ConfigError: the directory holds another evaluation, or something else, or another process writes it.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.path = path
        self.answered: list[Answered] = []
        self.clock = Clock()
        self._progress: IO[bytes] | None = None
        differs = difference(path, asked)
        if differs is not None:
            raise ConfigError(f"{path} holds {differs}; name another directory with --out")
        if path.is_dir():
            check_kinds(path, _FILES, ())
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(path)
        except OSError as error:
            raise unwritable(path, "--out", error) from error
        if not (path / "config.json").exists():
            write_whole(path / "config.json", json.dumps({"asked": asked, "machine": machine}, indent=1) + "\n")
        try:
            self.machine = _machine_of(path / "config.json")
            with interpreting(path, "the directory of an evaluation", way_out="name another with --out"):
                self._recover()
        except BaseException:
            self._lock.close()
            raise

    @property
    def finished(self) -> bool:
        """Tell whether completions.jsonl holds all problems."""
        return (self.path / "completions.jsonl").exists()

    def keep(self, chunk: Sequence[Answered], clock: Clock) -> None:
        """Append a chunk and flush it: it is on the disk when this returns."""
        if self._progress is None:
            self._progress = (self.path / "progress.jsonl").open("ab")
        closing = {"chunk": len(chunk), "timing": {"generate": clock.generate, "score": clock.score}}
        lines = [*(_line(problem.to_json()) for problem in chunk), _line(closing)]
        self._progress.write("".join(lines).encode())
        self._progress.flush()
        os.fsync(self._progress.fileno())
        self.answered += chunk
        self.clock += clock

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json, then completions.jsonl, and delete progress.jsonl."""
        write_whole(self.path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        if not self.finished:
            write_whole(self.path / "completions.jsonl", "".join(_line(p.to_json()) for p in self.answered))
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        (self.path / "progress.jsonl").unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and release the lock."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        self._lock.close()

    def __enter__(self) -> EvaluationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self) -> None:
        if self.finished:
            self.answered = read_completions(self.path)
            file = self.path / "results.json"
            results = read_json(file, "the results of an evaluation", way_out="evaluate again with another --out")
            with interpreting(file, "the results of an evaluation", way_out="evaluate again with another --out"):
                timing = results["timing"]
                self.clock = Clock(float(timing["generate_seconds"]), float(timing["score_seconds"]))
            return
        file = self.path / "progress.jsonl"
        if not file.exists():
            return
        chunk: list[Answered] = []
        whole = position = 0
        for line in file.read_bytes().splitlines(keepends=True):
            position += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                break  # a kill cut the line; nothing after it was flushed
            if "chunk" not in record:
                chunk.append(Answered.from_json(record))
                continue
            self.answered += chunk
            self.clock += Clock(record["timing"]["generate"], record["timing"]["score"])
            chunk, whole = [], position
        os.truncate(file, whole)


def difference(path: Path, asked: Mapping[str, Any]) -> str | None:
    """Describe what a directory holds in place of the evaluation asked for; None when it holds that one, or nothing
    yet.

    The words follow "PATH holds".
    """
    if not path.exists():
        return None
    if not path.is_dir():
        return "no evaluation: it is a file"
    config = path / "config.json"
    if not config.exists():
        strangers = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        return f"no evaluation but {strangers[0]}" if strangers else None
    try:
        there = read_json(config, "the question of an evaluation")["asked"]
    except (ConfigError, KeyError):
        return "a config.json that is not of an evaluation"
    here = json.loads(json.dumps(asked))
    for key, (a, b) in differing(there, here):
        return f"another evaluation, with {key}={a} where this one has {b}"
    return None


def read_completions(directory: Path) -> list[Answered]:
    """Read completions.jsonl of a finished evaluation.

    Raises:
        ConfigError: there is none, or it is not what an evaluation writes.
    """
    file = directory / "completions.jsonl"
    if not file.is_file():
        raise ConfigError(f"{directory} has no completions.jsonl: it is no finished evaluation")
    with interpreting(file, "the completions of an evaluation"):
        return [Answered.from_json(json.loads(line)) for line in file.read_bytes().splitlines()]


def differing(there: Any, here: Any, prefix: str = "") -> list[tuple[str, tuple[str, str]]]:
    """List where two JSON values differ: the dotted key, and both values in brief.

    >>> differing({"task": {"name": "add4"}}, {"task": {"name": "add2"}})
    [('task.name', ('"add4"', '"add2"'))]
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            found
            for key in dict.fromkeys((*here, *there))
            for found in differing(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if there == here else [(prefix, (_brief(there), _brief(here)))]


_FILES = ("config.json", "progress.jsonl", "completions.jsonl", "results.json", "index.html", ".lock")


def _machine_of(file: Path) -> dict[str, Any]:
    machine = read_json(file, "the question of an evaluation").get("machine")
    if not isinstance(machine, dict) or not is_whole(machine.get("threads"), 1):
        raise ConfigError(f"{file} must say on which machine the evaluation was begun; it does not; name another --out")
    return machine


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
