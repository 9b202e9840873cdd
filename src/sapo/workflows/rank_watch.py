"""What is done about a rank that lives no more, or lives and does not get on: the driver's side and the ranks' own.

The signs are those of `sapo.training.heartbeat`. The driver ends ranks that it has started, whose connections then
break: that is answered as any death is. Ranks of torchrun are torchrun's to end, which does so when the driver fails.
A rank that does not hear of the driver ends itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sapo.config import TrainConfig
from sapo.run.directory import FAILURE_FILE
from sapo.training.heartbeat import IDLE, Heartbeat, Progress, read_beats
from sapo.utils.files import write_whole

STUCK_SECONDS = 10.0
"""How long the driver's own call may take to fail once ranks were ended, before the driver ends itself."""


def ranks_directory(run: Path) -> Path:
    """Return where the ranks of a run write their logs and signs of life."""
    return run / "ranks"


def clear_beats(run: Path) -> None:
    """Make the directory of the ranks, without signs of life of an earlier start."""
    directory = ranks_directory(run)
    directory.mkdir(exist_ok=True)
    for file in directory.glob("*.json"):
        file.unlink(missing_ok=True)


def watch_ranks(
    run: Path, train: TrainConfig, progress: Progress, lose: Callable[[str, int | None], bool]
) -> Heartbeat:
    """Give the driver's signs of life, and watch those of the other ranks.

    Args:
        run: its directory.
        progress: of the driver.
        lose: given what happened and the rank it happened to (None: all of them), ends what it can; returns whether
            the driver's own call fails by that.
    """

    def answer(words: str, rank: int | None) -> None:
        phase = progress.phase
        if not lose(words, rank):
            _give_up(run, words)
        threading.Thread(target=give_up_if_stuck, args=(words, phase), daemon=True).start()

    def give_up_if_stuck(words: str, phase: str) -> None:
        if phase != IDLE and not heartbeat.ended.wait(STUCK_SECONDS) and progress.phase == phase:
            _give_up(run, words)

    heartbeat = Heartbeat(
        ranks_directory(run),
        0,
        progress,
        watched=range(1, train.ranks),
        timeout=train.rank_timeout,
        stall_timeout=train.stall_timeout,
        on_lost=lambda rank, words: answer(words, rank),
        on_stall=lambda words: answer(f"{words}; their stacks are in {ranks_directory(run)}", None),
        on_slow=lambda words: print(f"sapo: {words}", file=sys.stderr, flush=True),
    )
    return heartbeat


def watch_driver(directory: Path, rank: int, timeout: float, stall_timeout: float, progress: Progress) -> Heartbeat:
    """Give the signs of life of a rank, and end this process when there are none of the driver.

    Args:
        directory: from `ranks_directory`.
    """

    def end(_: int, words: str) -> None:
        print(f"rank {rank} ends, since {words}", file=sys.stderr, flush=True)
        os._exit(1)

    return Heartbeat(directory, rank, progress, watched=[0], timeout=timeout, stall_timeout=stall_timeout, on_lost=end)


def rank_table(run: Path) -> list[str]:
    """Return the last signs of life of all ranks of a run, as lines of a table; empty without any."""
    rows = [("rank", "host", "process", "phase", "updates", "passes", "last sign of life, s ago")]
    beats = read_beats(ranks_directory(run))
    newest = max((beat.time for beat in beats), default=0.0)
    rows += [
        (str(b.rank), b.host, str(b.pid), b.phase, str(b.updates), str(b.passes), f"{newest - b.time:.0f}")
        for b in beats
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines if beats else []


def _give_up(run: Path, words: str) -> None:
    """End the driver itself: it waits for ranks within a call that nothing else would end."""
    reason = f"{words}; `sapo resume {run}` goes on from the newest checkpoint"
    write_whole(run / FAILURE_FILE, json.dumps({"reason": reason}) + "\n")
    print("\n".join([f"sapo: {reason}", *rank_table(run)]), file=sys.stderr, flush=True)
    os._exit(1)
