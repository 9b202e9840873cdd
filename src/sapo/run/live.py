"""What a run is doing at this moment, in live.json: the step, its phase, and a few completions as they are scored.

For who watches (`sapo watch`). Nothing else reads it, no resume needs it, and it goes when the run ends. It is written
as it is, without waiting for the disk, some ten times a step; where it cannot be written the run goes on without.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from sapo.data import Group
from sapo.data.transcripts import HISTORY, Said, transcript

LIVE_FILE = "live.json"
MOST_SAMPLES = 4
MOST_CHARACTERS = 1500
"""Characters of a prompt or a completion."""


class LiveFile:
    """Writes RUN/live.json.

    Args:
        directory: of the run.
        show: spells token ids out, for the transcripts of episodes; None shows their last turns.
    """

    def __init__(self, directory: Path, show: Callable[[Sequence[int]], str] | None = None) -> None:
        self._show = show
        self._file = directory / LIVE_FILE
        self._aside = directory / f".{LIVE_FILE}.writing"
        process = psutil.Process()
        self._state: dict[str, Any] = {
            **{"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()},
            **{"step": 0, "phase": "starting", "samples": []},
        }

    def begin_step(self, step: int) -> None:
        """Note that a step begins, 1-based."""
        self._write(step=step, update=None, updates=None)

    def begin_phase(self, phase: str) -> None:
        """Note that a phase begins."""
        self._write(phase=phase)

    def begin_update(self, update: int, updates: int) -> None:
        """Note that one of a step's updates begins, 1-based."""
        self._write(update=update, updates=updates)

    def show(self, groups: Sequence[Group]) -> None:
        """Show the first completions of the first groups of a step, which have been scored."""
        samples = [_sample(group, self._show) for group in groups[:MOST_SAMPLES] if group.completions]
        self._write(samples=samples, sampled_in=self._state["step"])

    def remove(self) -> None:
        """Take the file away: the run has ended."""
        for file in (self._file, self._aside):
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _write(self, **changes: Any) -> None:
        self._state |= {**changes, "since": time.time()}
        with suppress(OSError):
            self._aside.write_text(json.dumps(self._state), encoding="utf-8")
            self._aside.replace(self._file)


def _sample(group: Group, show: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    first = group.completions[0]
    said = () if show is None else transcript(first, len(group.prompt.token_ids), show)
    return {
        "task": group.prompt.task,
        "prompt": group.prompt.text[:MOST_CHARACTERS],
        "text": first.text[:MOST_CHARACTERS],
        "cut": len(first.text) > MOST_CHARACTERS,
        "tokens": len(first),
        "reward": first.score.reward,
        "rewards": [c.score.reward for c in group.completions],
        "status": first.score.status.value,
        **({"transcript": _within(said)} if said else {}),
    }


def _within(said: Sequence[Said]) -> list[list[str]]:
    """Return what of a transcript fits into MOST_CHARACTERS, and say where more was left out."""
    kept, left = [], MOST_CHARACTERS
    for who, text in said:
        if text[:left]:
            kept.append([who, text[:left]])
        if len(text) > left:
            kept.append([HISTORY, "the rest is not shown"])
            break
        left -= len(text)
    return kept
