"""The run directory: what a run leaves behind, and what it needs to be taken up again.

runs/NAME/config.yaml       the resolved recipe with versions, seed and commit; it can be run again as it is
          inputs.json       fingerprints of what it was started from; see inputs.py
          metrics.jsonl     one line per update, step, evaluation, self-check, warning ...; the clock only in "timing"
          summary.json      start, end, tokens, seconds by phase
          failure.json      of a run that stopped itself: why; gone when it is resumed
          live.json         while it goes on: what it is doing; see live.py
          rollouts/         step-000010.jsonl: one line per completion
          pictures/         SHA256.png, .jpg ...: what the prompts of rollouts/ show, each picture once
          rolled-back/      what rollbacks took out of metrics.jsonl and rollouts/
          checkpoints/      see training/checkpoint.py
          engines/          NN.log: what engines in processes of their own print
          profile/          with profile=true: see profiling.py
          tensorboard/      and wandb/: see loggers/
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.data import Picture
from sapo.data.thumbnails import ending_of
from sapo.errors import ConfigError
from sapo.run.inputs import InputRecord
from sapo.utils.files import aside_of, lock_directory, write_whole
from sapo.utils.reading import check_kinds, read_yaml

FAILURE_FILE = "failure.json"
_FILES = ("config.yaml", "inputs.json", "metrics.jsonl", "summary.json", FAILURE_FILE, ".lock")
_DIRECTORIES = ("rollouts", "rolled-back", "checkpoints", "profile", "tensorboard", "wandb", "ranks")


def _never_began(path: Path) -> bool:
    """Tell whether a directory is empty, or what a run left that was killed before it had config.yaml whole.

    There is nothing to lose in it. `create` makes the directory, locks it, and writes inputs.json before config.yaml.
    """
    try:
        entries = {entry.name for entry in path.iterdir()}
    except OSError:  # a file, or not to be read
        return False
    left = {".lock", "inputs.json", aside_of(path / "inputs.json").name, aside_of(path / "config.yaml").name}
    return not entries or (".lock" in entries and entries <= left)


class RunDirectory:
    """The files of one run. Made by `create` or `open`; holds a lock, so that no two processes write one run.

    Args:
        path: an existing directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: str | None = None
        """Name of the run (`InputRecord.run`), which its checkpoints carry."""
        self._lock = lock_directory(path)
        self._metrics: IO[str] | None = None

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a path that `create` would, before any work is done.

        Raises:
            ConfigError: something of that name exists, or it lies where no directory can be made.
        """
        if path.exists() and not _never_began(path):
            way_out = f"`sapo resume {path}` continues it; run_dir=NAME starts another"
            raise ConfigError(f"the run directory {path} exists already; {way_out}")
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            rule = "is not a directory" if not parent.is_dir() else "may not be written to"
            raise ConfigError(f"the run directory {path} cannot be made: {parent} {rule}; choose another run_dir")

    @classmethod
    def create(cls, config: RunConfig, inputs: InputRecord | None = None) -> RunDirectory:
        """Make the directory of a new run.

        Args:
            inputs: what it is started from, for a resume to compare with.

        Raises:
            ConfigError: when something of that name exists.
        """
        assert config.run_dir is not None
        path = Path(config.run_dir)
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        if not _never_began(path):  # begun by another process before the lock was ours
            cls.check_free(path)
        if inputs is not None:
            directory.run = inputs.run
            inputs.write(path)  # first: a directory without config.yaml is no run yet
        directory.write_config(config)
        return directory

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunDirectory, RunConfig]:
        """Open the directory of a run that was started before.

        Raises:
            ConfigError: when it is not one, or another process is writing it.
        """
        path = Path(path)
        if not path.is_dir():
            raise ConfigError(f"no run directory at {path}; `sapo train RECIPE` starts a run")
        config = cls.read_config(path)
        check_kinds(path, _FILES, _DIRECTORIES)
        return cls(path), config

    @staticmethod
    def read_config(path: Path) -> RunConfig:
        """Read the recipe of a run, without the lock: the run may be going on.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{path} has no config.yaml: it is not a run, or was stopped before it began; `sapo train` begins it"
            )
        return parse_recipe(read_yaml(path / "config.yaml"), recorded=True)

    @property
    def checkpoints(self) -> Path:
        """Return where checkpoints are kept."""
        return self.path / "checkpoints"

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml, aside and renamed."""
        text = yaml.safe_dump(config.resolved_settings(), sort_keys=False, allow_unicode=True)
        header = f"# sapo resume {self.path}                          continues this run\n"
        header += f"# sapo train {self.path}/config.yaml run_dir=NAME   repeats it\n"
        write_whole(self.path / "config.yaml", header + text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, aside and renamed."""
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def write_failure(self, reason: str) -> None:
        """Write failure.json: the run has stopped itself."""
        write_whole(self.path / FAILURE_FILE, json.dumps({"reason": reason}) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        try:
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError:
            opened, self._metrics = self._metrics, None
            with suppress(OSError):  # it would try to write the same line once more
                opened.close()
            raise

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl, flushed to the disk: what a checkpoint remembers."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def rewind(self, size: int, step: int) -> None:
        """Rewind to a checkpoint: cut metrics.jsonl to what it remembers and rollouts/ to its step.

        failure.json goes: the run is under way.

        Raises:
            ConfigError: when metrics.jsonl is shorter than that.
        """
        self._rewind_metrics(size)
        (self.path / FAILURE_FILE).unlink(missing_ok=True)
        for file in self._rollouts_after(step):
            file.unlink()

    def _rewind_metrics(self, size: int) -> None:
        file = self.path / "metrics.jsonl"
        present = file.stat().st_size if file.exists() else 0
        if present < size:
            raise ConfigError(
                f"{file} must hold what the run wrote before its checkpoint, {size} bytes; got {present}: it was "
                f"changed; put it back, or `sapo export {self.path} NEW` takes the model"
            )
        if file.exists():
            os.truncate(file, size)

    def take_back(self, size: int, step: int, rollback: int) -> None:
        """Roll back to a checkpoint: move what came after to rolled-back/, as metrics-K.jsonl and rollouts-K/."""
        self.close_metrics()
        file = self.path / "metrics.jsonl"
        after = file.read_bytes()[size:].decode("utf-8")
        aside = self.path / "rolled-back"
        aside.mkdir(exist_ok=True)
        write_whole(aside / f"metrics-{rollback}.jsonl", after)
        self._rewind_metrics(size)
        completions = aside / f"rollouts-{rollback}"
        shutil.rmtree(completions, ignore_errors=True)  # of the same rollback, cut short by a kill
        for file in self._rollouts_after(step):
            completions.mkdir(exist_ok=True)
            file.rename(completions / file.name)

    def _rollouts_after(self, step: int) -> list[Path]:
        steps = {f: f.stem.removeprefix("step-") for f in (self.path / "rollouts").glob("step-*.jsonl")}
        return [f for f, number in steps.items() if number.isdecimal() and int(number) > step]

    def write_rollouts(self, step: int, records: Iterable[Mapping[str, Any]]) -> Path:
        """Write rollouts/step-NNNNNN.jsonl, one completion a line."""
        file = self.path / "rollouts" / f"step-{step:06d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        write_whole(file, "".join(json.dumps(r, allow_nan=False) + "\n" for r in records))
        return file

    def keep_pictures(self, pictures: Iterable[Picture]) -> None:
        """Write pictures/SHA256.ENDING, each picture once in a run.

        Raises:
            PictureError: the file of a picture has gone, or holds another picture by now.
        """
        kept = self.path / "pictures"
        for picture in {picture.sha256: picture for picture in pictures}.values():
            if not any(kept.glob(f"{picture.sha256}.*")):
                data = picture.read()
                kept.mkdir(exist_ok=True)
                write_whole(kept / f"{picture.sha256}.{ending_of(data)}", data)

    def close_metrics(self) -> None:
        """Close metrics.jsonl; the next line opens it again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def close(self) -> None:
        """Close the files and give the lock back."""
        self.close_metrics()
        self._lock.close()
