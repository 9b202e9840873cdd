"""Token data as read-only arrays of one dimension, and many of them end to end in one flat array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapo.errors import CheckpointError

TOKEN_IDS = np.dtype(np.int32)
LOGPROBS = np.dtype(np.float32)

_EMPTY = {dtype: np.zeros(0, dtype) for dtype in (TOKEN_IDS, LOGPROBS)}
for _array in _EMPTY.values():
    _array.flags.writeable = False


def read_only(values: Sequence[float] | NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return token data as a read-only array.

    An array that is read-only already is taken as it is: whoever hands over a view of a larger array promises that
    nobody writes to that one, and keeps it alive. Anything else is copied, so that a buffer which its owner fills again
    changes nothing here, and a small part of a large buffer does not hold on to all of it.

    Args:
        values: one dimension; a sequence of numbers or an array.
        dtype: TOKEN_IDS or LOGPROBS.

    Raises:
        ValueError: more dimensions than one, or token ids that are no whole numbers of 32 bits.

    >>> read_only((2, 0), TOKEN_IDS)
    array([2, 0], dtype=int32)
    """
    if isinstance(values, np.ndarray) and values.dtype == dtype and values.ndim == 1 and not values.flags.writeable:
        return values
    if not len(values):
        return _EMPTY[dtype]
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"token data must have one dimension; got the shape {given.shape}; give each sequence its own")
    with np.errstate(invalid="ignore"):  # ids that are no numbers are named below
        array = np.array(given, dtype)
    if dtype == TOKEN_IDS and not np.array_equal(array, given):
        wrong = given[array != given][0]
        raise ValueError(f"token ids must be whole numbers of 32 bits; got {wrong}; give the tokenizer's ids")
    array.flags.writeable = False
    return array


class FlatArrays:
    """Collects arrays by name and joins those of one name, so that a file of thousands of them has a short header.

    `ArrayReader` gives them back in the same order.

    >>> arrays = FlatArrays()
    >>> for part in ([2, 0], [], [3]):
    ...     arrays.put("token_ids", np.array(part, np.int32))
    >>> {name: array.tolist() for name, array in arrays.joined().items()}
    {'token_ids': [2, 0, 3], 'token_ids.offsets': [0, 2, 2, 3]}
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._places: dict[tuple[str, str], int] = {}

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Append an array to those of its name."""
        self._parts.setdefault(name, []).append(array)

    def put_once(self, name: str, key: str, array: NDArray[Any]) -> int:
        """Append an array unless one of this key is there; return which of its name it is, for `ArrayReader.at`."""
        if (name, key) not in self._places:
            self._places[name, key] = len(self._parts.get(name, ()))
            self.put(name, array)
        return self._places[name, key]

    def joined(self) -> dict[str, NDArray[Any]]:
        """Return one flat array for each name, and its offsets: part i lies from offset i to offset i + 1."""
        found: dict[str, NDArray[Any]] = {}
        for name, parts in self._parts.items():
            found[name] = np.concatenate(parts)
            found[f"{name}.offsets"] = np.cumsum([0, *map(len, parts)])
        return found


class ArrayReader:
    """Gives back the arrays that `FlatArrays` joined, one after the other.

    They are read-only views of the flat arrays. Those stay in memory until the last view is gone: with a resumed run
    until it has trained on all batches that waited, so that nothing is copied and no more is held than was read.

    >>> reader = ArrayReader({"token_ids": np.array([2, 0, 3]), "token_ids.offsets": np.array([0, 2, 3])})
    >>> reader.take("token_ids").tolist(), reader.take("token_ids").tolist()
    ([2, 0], [3])
    """

    def __init__(self, joined: Mapping[str, NDArray[Any]]) -> None:
        self._joined = joined
        self._parts: dict[str, Iterator[NDArray[Any]]] = {}

    def take(self, name: str) -> NDArray[Any]:
        """Return the next array of a name.

        Raises:
            CheckpointError: there are no more of that name.
        """
        if name not in self._parts:
            self._parts[name] = self._split(name)
        part = next(self._parts[name], None)
        if part is None:
            raise CheckpointError(
                f"state.json asks for more token data ({name}) than batches.safetensors holds; resume from an earlier "
                "checkpoint"
            )
        return part

    def at(self, name: str, place: int) -> NDArray[Any]:
        """Return an array of a name by its place, as often as it is asked for.

        Raises:
            CheckpointError: there are not so many.
        """
        offsets = self._joined.get(f"{name}.offsets", np.zeros(1, np.int64))
        if place + 1 >= len(offsets):
            raise CheckpointError(
                f"state.json asks for {name} {place} and batches.safetensors holds {len(offsets) - 1}; resume from an "
                "earlier checkpoint"
            )
        return self._joined[name][int(offsets[place]) : int(offsets[place + 1])]

    def _split(self, name: str) -> Iterator[NDArray[Any]]:
        if name in self._joined:
            flat = self._joined[name].view()
            flat.flags.writeable = False
            offsets = self._joined[f"{name}.offsets"].tolist()
            for start, stop in pairwise(offsets):
                yield flat[start:stop]
