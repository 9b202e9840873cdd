"""What an environment may say, and how its failures read, wherever it is played."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from sapo.utils.text import name_error

MAX_DETAIL = 500
"""Limit of the characters of a failure."""

MAX_OBSERVATION = 2**22
"""Limit of the characters of an observation, which is four million: the encoding of a gigabyte would hold up all
episodes, and no model could read it."""

WHILE_OPEN = "ask was called while the model's turn was open; await one before the next"


class EpisodeError(Exception):
    """An environment failed elsewhere; the text says how, and the place where this is raised says nothing."""


def check_observation(observation: Any) -> None:
    """Refuse what no model can be shown.

    Raises:
        TypeError: it is neither text nor messages.
        ValueError: it is too long.

    >>> check_observation("1942;"), check_observation([{"role": "tool", "content": "1942"}])
    (None, None)
    """
    messages = isinstance(observation, Sequence) and all(isinstance(m, Mapping) for m in observation)
    if not isinstance(observation, str) and not messages:
        raise TypeError(
            f"an observation must be text or a list of messages; got {type(observation).__name__}; decode it"
        )
    if (length := _count_characters(observation)) > MAX_OBSERVATION:
        raise ValueError(f"an observation must have at most {MAX_OBSERVATION} characters; got {length}; shorten it")


def _count_characters(observation: Any) -> int:
    """Count the characters of all texts in an observation, those in lists of parts too."""
    length, waiting, seen = 0, [observation], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            length += len(part)
        elif isinstance(part, Mapping | list | tuple) and id(part) not in seen:  # it may hold itself
            seen.add(id(part))
            waiting += part.values() if isinstance(part, Mapping) else part
    return length


def describe_failure(error: BaseException, *files: str) -> str:
    """Return what was raised, and where in the environment's code.

    Args:
        error: as it was caught.
        files: of ours, whose lines are not named.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in files]
    where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    return f"{name_error(error)[: MAX_DETAIL - 100]}{where}"
