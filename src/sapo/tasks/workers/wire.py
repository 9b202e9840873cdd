"""What the pool and its worker processes share: jobs, frames, and what an answer may be."""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt, Score

HEADER = struct.Struct("!4sI")
"""Opens each frame: MARK and the number of bytes that follow."""

MARK = b"sapo"
"""Begins each frame. What a user's code writes to a socket that it found does not begin so, and is noticed."""

MAX_ANSWER = 2**20
"""Limit of the bytes of a worker's frame, for each completion that it judged."""

MAX_DETAIL = 500
"""Limit of the characters of a reason, since an exception may quote the whole completion."""


MAX_ANSWER_TEXT = 10_000
"""Limit of the characters of the answer that a verifier read, which is compared with others and logged."""


def score_to_json(score: Score) -> dict[str, Any]:
    """Return a checked score as a worker writes it, its texts cut.

    >>> score_to_json(Score(1.0, answer="42"))["answer"]
    '42'
    """
    return {
        "reward": score.reward,
        "status": str(score.status),
        "detail": str(score.detail)[:MAX_DETAIL],
        "answer": None if score.answer is None else str(score.answer)[:MAX_ANSWER_TEXT],
        "figures": {str(name): float(value) for name, value in score.figures.items()},
        **({"turn_rewards": list(score.turn_rewards)} if score.turn_rewards else {}),
    }


def score_from_json(written: Any) -> Score:
    """Return a score that a worker wrote, which may be anything: the numbers in it are not checked yet.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    return Score(
        reward=written["reward"],
        status=written["status"],
        detail=str(written["detail"]),
        answer=None if written["answer"] is None else str(written["answer"]),
        figures={str(name): value for name, value in dict(written["figures"]).items()},
        turn_rewards=tuple(written.get("turn_rewards", ())),
    )


def framed(data: bytes) -> bytes:
    """Return the frame of some bytes.

    >>> framed(b"ab")
    b'sapo\\x00\\x00\\x00\\x02ab'
    """
    return HEADER.pack(MARK, len(data)) + data


def read_frame(stream: Any) -> bytes | None:
    """Read the parent's next frame; None where it has closed the socket."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    mark, length = HEADER.unpack(header)
    assert mark == MARK, "the parent writes nothing but frames"
    frame: bytes = stream.read(length)
    return frame if len(frame) == length else None


class NonsenseError(Exception):
    """A worker wrote what is no answer."""


def next_answer(incoming: bytearray, limit: int) -> dict[str, Any] | None:
    """Take the first complete frame, of at most `limit` bytes, out of the buffer, and return its answer.

    Raises:
        NonsenseError: what the buffer begins with is no frame of a worker.
    """
    if not MARK.startswith(incoming[: len(MARK)]):
        raise NonsenseError
    if len(incoming) < HEADER.size:
        return None
    _, length = HEADER.unpack_from(incoming)
    if length > limit:
        raise NonsenseError
    if len(incoming) < HEADER.size + length:
        return None
    try:
        answer = json.loads(bytes(incoming[HEADER.size : HEADER.size + length]))
    except (ValueError, RecursionError) as error:
        raise NonsenseError from error
    if not isinstance(answer, dict):
        raise NonsenseError
    del incoming[: HEADER.size + length]
    return answer


@dataclass(frozen=True)
class Home:
    """Where a worker finds modules: its current directory and sys.path.

    >>> Home("/tmp", ("/usr/lib/python3.13",)).directory
    '/tmp'
    """

    directory: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> Home:
        """Return the directory and path of this process."""
        return cls(os.getcwd(), tuple(map(str, sys.path)))


@dataclass(frozen=True)
class Job:
    """One completion to be scored by one verifier.

    >>> Job("hash_answer", "#2", Prompt(id=0, task="t", text="1+1", answer="2"), deadline=10.0).deadline
    10.0
    """

    spec: Any
    """A verifier as `sapo.tasks.load_verifier` takes it, or a verifier object of plain values."""
    text: str | tuple[str, ...] | None
    """Text of the completion, or of several that are judged in one call; None only loads the verifier."""
    prompt: Prompt
    deadline: float
    """Seconds for scoring, after the verifier is loaded."""
    home: Home | None = None
    """Where the user's modules are found; None for a verifier of ours."""
