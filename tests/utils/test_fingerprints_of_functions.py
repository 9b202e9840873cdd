"""Fingerprints of functions: what tells two of one name apart, and what does not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest

from sapo.utils.fingerprints import fingerprint_function


class Judge:
    def __init__(self, bar: float) -> None:
        self.bar = bar

    def score(self, completion: str) -> bool:
        return len(completion) > self.bar

    def __call__(self, completion: str) -> bool:
        return self.score(completion)


def made(code: str, name: str = "f") -> Any:
    space: dict[str, Any] = {}
    exec(code, space)
    return space[name]


def above(bar: float) -> Any:
    return lambda completion: len(completion) > bar


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda c: 0.25, lambda c: 0.75),
        (lambda c: c.upper(), lambda c: c.lower()),
        (lambda c, bar=1: len(c) > bar, lambda c, bar=2: len(c) > bar),
        (above(1), above(2)),
        (Judge(1).score, Judge(2).score),
        (Judge(1), Judge(2)),
        (functools.partial(above, 1), functools.partial(above, 2)),
        (made("bar = 1\nf = lambda c: bar"), made("bar = 2\nf = lambda c: bar")),
        (made("def g(c): return 1\nf = lambda c: g(c)"), made("def g(c): return 2\nf = lambda c: g(c)")),
        (made("f = lambda c: [x + 1 for x in c]"), made("f = lambda c: [x + 2 for x in c]")),
    ],
)
def test_functions_that_do_another_thing_have_other_fingerprints(one: Any, other: Any) -> None:
    assert fingerprint_function(one) != fingerprint_function(other)


def test_equal_functions_have_one_fingerprint_and_one_that_calls_itself_has_one() -> None:
    assert fingerprint_function(above(1)) == fingerprint_function(above(1))
    assert fingerprint_function(Judge(1).score) == fingerprint_function(Judge(1).score)
    loop = "def f(c): return f(c[1:]) if c else 0"
    assert fingerprint_function(made(loop)) == fingerprint_function(made(loop))


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    # The order of a set of texts is another in every process.
    code = (
        "from sapo.utils.fingerprints import fingerprint_function as f; print(f(lambda c: c in {'a', 'b', 'c', 'd'}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
