"""Values of numpy between a program and its tests, where the sandbox's interpreter has numpy."""

from __future__ import annotations

import builtins
import json
from typing import Any

import numpy as np
import pytest

from sapo.tasks.verifiers.code_wire import decode, encode


def crossed(value: Any) -> Any:
    def refuse(other: Any) -> Any:
        raise AssertionError(f"{other!r} does not cross")

    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.uint8(255), 255),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.complex128(1 + 2j), 1 + 2j),
        ([np.int64(1), {"a": np.float64(2.0)}], [1, {"a": 2.0}]),
    ],
)
def test_a_number_of_numpy_is_python_s(value: Any, plain: Any) -> None:
    assert crossed(value) == plain
    assert type(crossed(value)) is type(plain)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.array([0.1, -0.0, np.inf, 1e300]),
        np.array([[True], [False]]),
        np.array(["a", "bc"]),
        np.array(5.0),
        np.array([1, 2], dtype=np.uint8),
    ],
)
def test_an_array_stays_an_array(array: np.ndarray) -> None:
    got = crossed(array)
    assert np.array_equal(got, array)
    if array.ndim:
        assert (type(got), got.dtype, got.shape) == (np.ndarray, array.dtype, array.shape)


@pytest.mark.parametrize("shape", [(0,), (0, 1), (2, 0)])
def test_an_array_without_elements_is_a_list_that_equals_nothing_else(shape: tuple[int, ...]) -> None:
    got = crossed(np.empty(shape))
    assert type(got) is list
    assert got != [1, 2, 3]


def test_an_array_that_a_program_forges_without_elements_is_a_list() -> None:
    """`(got == expected).all()` of an empty array is true whatever is expected."""
    forged = type("Forged", (), {"__module__": "numpy", "dtype": "float64", "size": 1, "tolist": lambda self: []})
    assert crossed(forged()) == []
    assert type(crossed(forged())) is list


def test_without_numpy_an_array_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = encode(np.arange(3), lambda _: None)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "numpy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert decode(sent, lambda _: None) == [0, 1, 2]
