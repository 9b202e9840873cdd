"""The optimizer's state on disk: one safetensors file, or one of each rank with an index.

optimizer.safetensors                    one process
optimizer-00001-of-00002.safetensors     two ranks: each writes the rows that it keeps
optimizer-00002-of-00002.safetensors
optimizer.index.json                     tensor -> shape, and which rows of it are in which file

Either can be read by any number of ranks: each reads the rows that it keeps.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from sapo.errors import CheckpointError
from sapo.model.sharding import is_first_replica, own_part, own_rows, shard_from_rows
from sapo.utils.reading import interpreting, is_whole, read_json
from sapo.utils.text import first_line

SINGLE = "optimizer.safetensors"
INDEX = "optimizer.index.json"


@dataclass(frozen=True)
class Written:
    """What one rank wrote of the optimizer's state.

    >>> Written("optimizer-00002-of-00002.safetensors", {"exp_avg/head": [8, 16]}, {"exp_avg/head": [16, 4]}).rows
    {'exp_avg/head': [8, 16]}
    """

    file: str
    rows: Mapping[str, list[int]]
    """First row and one past the last, of each tensor in the file; of a scalar [0, 0]."""
    shapes: Mapping[str, list[int]]
    """Of the whole tensors."""


def write_own_rows(directory: Path, tensors: Mapping[str, Tensor], rank: int, size: int) -> Written:
    """Write what this rank keeps of the state, in a file of its own.

    Args:
        tensors: of `PolicyOptimizer.state_tensors(gather=False)`. What is not sharded is the same on every rank, and
            rank 0 writes it.
    """
    file = SINGLE if size == 1 else f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"
    own: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            writes, bounds = is_first_replica(tensor), own_rows(tensor)
        else:
            writes, bounds = rank == 0, (0, tensor.shape[0] if tensor.dim() else 0)
        if writes:
            own[name], rows[name] = own_part(tensor).detach().cpu().contiguous(), list(bounds)
    save_file(own, directory / file)
    return Written(file, rows, {name: list(tensors[name].shape) for name in own})


def write_index(directory: Path, written: Collection[Written]) -> None:
    """Write which rows are in which file."""
    index: dict[str, dict[str, Any]] = {}
    for of_rank in written:
        for name, (start, stop) in of_rank.rows.items():
            entry = index.setdefault(name, {"shape": of_rank.shapes[name], "parts": []})
            entry["parts"].append({"file": of_rank.file, "rows": [start, stop]})
    (directory / INDEX).write_text(json.dumps(index, indent=1))


class OptimizerFiles:
    """Reads the optimizer's state from a checkpoint, whoever wrote it.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index: dict[str, dict[str, Any]]
        if (directory / INDEX).exists():
            self._index = _read_index(directory / INDEX)
            return
        with _opened(directory / SINGLE) as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        self._index = {
            name: {"shape": shape, "parts": [{"file": SINGLE, "rows": [0, shape[0] if shape else 0]}]}
            for name, shape in shapes.items()
        }

    def read(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state by name; of a tensor as large as a sharded parameter, the rows that this rank keeps.

        Args:
            parameters: by the name that state has in it: `KEY/NAME` is of parameter NAME.
        """
        found: dict[str, Tensor] = {}
        for name, entry in self._index.items():
            parameter = parameters.get(name.partition("/")[2])
            if isinstance(parameter, DTensor) and list(parameter.shape) == entry["shape"]:
                found[name] = shard_from_rows(parameter, self._rows(name, own_rows(parameter)))
            else:
                found[name] = self._rows(name, None)
        return found

    def _rows(self, name: str, wanted: tuple[int, int] | None) -> Tensor:
        """Read rows of a tensor from the files that have them; all of it where none are named."""
        shape, parts = self._index[name]["shape"], self._index[name]["parts"]
        if not shape:
            return self._read(parts[0]["file"], name, slice(None))
        start, stop = wanted or (0, shape[0])
        pieces: list[Tensor] = []
        for part in sorted(parts, key=lambda p: p["rows"][0]):
            first, end = part["rows"]
            low, high = max(start, first), min(stop, end)
            # A rank that keeps no rows is given the empty beginning of the first part, which has dtype and width.
            if low < high or (start == stop and not pieces):
                low = max(low, first)
                pieces.append(self._read(part["file"], name, slice(low - first, max(high, low) - first)))
        rows = torch.cat(pieces)
        if len(rows) != stop - start:
            raise CheckpointError(
                f"{self._directory / INDEX} must say where all rows of {name} are; rows {start} to {stop} are not all "
                "there; resume from another checkpoint"
            )
        return rows

    def _read(self, file: str, name: str, rows: slice) -> Tensor:
        with _opened(self._directory / file) as opened:
            tensor = opened.get_slice(name)
            # A number is copied, as rows are where they are joined: what is mapped changes with its file.
            read: Tensor = tensor[rows] if tensor.get_shape() else opened.get_tensor(name).clone()
        return read


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file of tensors.

    Raises:
        CheckpointError: it is none, or lacks a tensor that it should have.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} must be the state of an optimizer; got {first_line(error)}; resume from another checkpoint"
        ) from error


def _read_index(file: Path) -> dict[str, dict[str, Any]]:
    what, way_out = "an index of the optimizer's state", "resume from another checkpoint"
    index = read_json(file, what, CheckpointError, way_out)
    with interpreting(file, what, CheckpointError, way_out):
        for entry in index.values():
            shape, parts = entry["shape"], [(part["file"], *part["rows"]) for part in entry["parts"]]
            if not all(map(is_whole, shape)) or not parts or not all(is_whole(i) for part in parts for i in part[1:]):
                raise ValueError(f"an entry {entry!r:.60}")
    return index
