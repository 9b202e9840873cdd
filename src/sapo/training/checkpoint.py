"""Checkpoints: everything a bitwise resume needs, written aside and renamed, proven whole before it is used.

checkpoints/step-000100/             after 100 whole steps
checkpoints/step-000100-update-2/    in the middle of the 101st step, after two of its updates
    model.safetensors, config.json, tokenizer.json ...   an ordinary Hugging Face directory
    optimizer.safetensors            moments, step counts, float32 masters; a file of each rank where several train
    state.json                       step, update in the step, prompts, texts and scores of batches, counters
    batches.safetensors              token data of those batches: flat arrays with their offsets
    manifest.json                    size and SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sapo.errors import CheckpointError
from sapo.model.policy import Policy
from sapo.utils.files import open_to_readers, remove, replace_directory
from sapo.utils.reading import is_whole, read_json
from sapo.utils.text import first_line

MANIFEST = "manifest.json"
# What every checkpoint consists of beside the optimizer's state, of a model or an adapter.
_PARTS = (
    r"(adapter_)?config\.json",
    r"(model|adapter_model)([-.].+)?\.(safetensors|bin)",
    r"state\.json",
)
_NAME = re.compile(r"step-(\d{6,})(?:-update-(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    >>> Checkpoint(Path("runs/x/checkpoints/step-000100-update-2"), step=100, update=2).label
    'step 100, update 2'
    """

    path: Path
    step: int
    update: int

    @property
    def label(self) -> str:
        """Return the step and the update as a person reads them."""
        return f"step {self.step}" + (f", update {self.update}" if self.update else "")

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            CheckpointError: naming the file that is missing, cut short or changed.
        """
        for name, expected in self._manifest().items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if (size := file.stat().st_size) != expected["size"]:
                raise CheckpointError(f"{file} holds {size} bytes where {expected['size']} were written")
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is not what was written: its SHA-256 differs")

    def _manifest(self) -> dict[str, dict[str, Any]]:
        """Read the manifest: every file that makes a checkpoint has to be in it, or nothing would be proven."""
        try:
            manifest = read_json(self.path / MANIFEST, "sizes and SHA-256 of a checkpoint's files", CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} has no readable {MANIFEST}: {error}") from error
        for name, expected in manifest.items():
            known = (
                isinstance(expected, dict) and is_whole(expected.get("size")) and type(expected.get("sha256")) is str
            )
            if not known or Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(
                    f"{self.path / MANIFEST} must give size and SHA-256 of every file; got {name!r}: {expected!r:.60}"
                )
        for pattern in _PARTS:
            if not any(re.fullmatch(pattern, name) for name in manifest):
                raise CheckpointError(
                    f"{self.path / MANIFEST} must name all files of a checkpoint; got none of {pattern}"
                )
        return manifest

    @property
    def proves_optimizer(self) -> bool:
        """Return whether the manifest names the state of an optimizer, without which nothing can be resumed."""
        return any(re.fullmatch(r"optimizer([-.].+)?\.safetensors", name) for name in self._manifest())

    def state(self) -> dict[str, Any]:
        """Read the run's state, as it was given to `save_checkpoint`.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_json(self.path / "state.json", "the state of a run", CheckpointError)

    def batches(self) -> dict[str, np.ndarray]:
        """Read the token data that was given to `save_checkpoint`; a checkpoint of an earlier version has none."""
        file = self.path / "batches.safetensors"
        try:
            return safetensors.numpy.load_file(file) if file.exists() else {}
        except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} must be the token data of batches; got {first_line(error)}") from error


def save_checkpoint(
    directory: Path,
    step: int,
    update: int,
    *,
    policy: Policy,
    save_optimizer: Callable[[Path], object],
    state: dict[str, Any],
    batches: Mapping[str, np.ndarray],
) -> Checkpoint:
    """Write a checkpoint aside, then rename it: a reader sees all of it or nothing.

    Args:
        directory: the run's checkpoints/.
        step: whole steps done; `update`: updates done in the step after them.
        save_optimizer: writes the optimizer's state into a directory; see `Trainers.save_optimizer`.
        state, batches: the run's state, as `RunState.serialise` gives it.
    """
    name = f"step-{step:06d}" + (f"-update-{update}" if update else "")
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".writing-{name}"
    remove(aside)
    aside.mkdir()
    try:
        policy.save(aside)
        save_optimizer(aside)
        (aside / "state.json").write_text(json.dumps(state))
        safetensors.numpy.save_file(dict(batches), aside / "batches.safetensors")
        open_to_readers(aside)
        manifest = {
            str(f.relative_to(aside)): {"size": f.stat().st_size, "sha256": _sha256(f)}
            for f in sorted(aside.rglob("*"))
            if f.is_file()
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except Exception:  # a full disk, say: what was begun is of no use
        shutil.rmtree(aside, ignore_errors=True)
        raise
    final = directory / name
    replace_directory(aside, final, directory / f".replaced-{name}")  # after a resume the same state is written again
    return Checkpoint(final, step, update)


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """List the checkpoints of a run, newest first, whole or not."""
    found = [
        Checkpoint(path, int(match[1]), int(match[2] or 0))
        for path in directory.glob("step-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, key=lambda c: (c.step, c.update), reverse=True)


def set_broken_aside(directory: Path, newest: Checkpoint | None) -> None:
    """Rename checkpoints newer than the one in use to broken-*, so that none is counted or tried again."""
    for checkpoint in list_checkpoints(directory):
        if newest is not None and checkpoint.path == newest.path:
            return
        target = directory / f"broken-{checkpoint.path.name}"
        remove(target)
        checkpoint.path.rename(target)


def newest_whole(
    directory: Path,
    on_broken: Callable[[CheckpointError], None],
    check: Callable[[Checkpoint], object] = lambda _: None,
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, None without one.

    Args:
        on_broken: called for each newer one that is not.
        check: called with one that its manifest proves; it may refuse it by a CheckpointError.
    """
    for checkpoint in list_checkpoints(directory):
        try:
            checkpoint.verify()
            check(checkpoint)
        except CheckpointError as error:
            on_broken(error)
        else:
            return checkpoint
    return None


def prune(directory: Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Delete all but the newest checkpoints and those of the steps named, and what an interrupted write left behind."""
    for checkpoint in list_checkpoints(directory)[keep:]:
        if checkpoint.update or checkpoint.step not in kept_steps:
            shutil.rmtree(checkpoint.path)
    for pattern in (".writing-*", ".replaced-*"):
        for leftover in directory.glob(pattern):
            remove(leftover)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
