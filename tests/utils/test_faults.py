"""A programming error of this package is told from what another's code raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sapo.utils.faults import is_bug_of_ours
from sapo.utils.text import first_line, visible


def caught(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def test_a_mistake_in_a_line_of_this_package_is_ours() -> None:
    assert is_bug_of_ours(caught(lambda: visible(None)))  # type: ignore[arg-type]


def test_what_others_raise_and_what_is_refused_is_not() -> None:
    assert not is_bug_of_ours(caught(lambda: None.missing))  # type: ignore[attr-defined]
    assert not is_bug_of_ours(caught(lambda: torch.nn.Linear(2, 2)(None)))
    assert not is_bug_of_ours(caught(lambda: torch.ones(2) @ torch.ones(3)))
    assert first_line(caught(lambda: 1 / 0)) == "division by zero"
    assert not is_bug_of_ours(caught(lambda: 1 / 0))
