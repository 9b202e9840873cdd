"""Signs of life as files: who writes them, and what is told of a rank whose file does not change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapo.training.heartbeat import IDLE, Beat, Heartbeat, Progress, beat_file, read_beat, read_beats

TIMEOUT = 0.8
"""Seconds; a thread is given its turn many times within it."""
PATIENCE = 60.0


def beating(directory: Path, rank: int, progress: Progress | None = None, **options: Any) -> Heartbeat:
    told = {"watched": [], "timeout": TIMEOUT, "stall_timeout": 1000.0, "on_lost": lambda *_: None}
    return Heartbeat(directory, rank, progress or Progress(), **{**told, **options})


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_writes_where_it_is_while_its_main_thread_is_busy(tmp_path: Path) -> None:
    progress = Progress()
    heartbeat = beating(tmp_path, 1, progress)
    with progress.during("update"):
        progress.passed()
        progress.updates = 3
        wait_for(lambda: (b := read_beat(beat_file(tmp_path, 1))) and b.phase == "update" and b.passes == 1)
        first = read_beat(beat_file(tmp_path, 1))
        wait_for(lambda: read_beat(beat_file(tmp_path, 1)) != first)
    heartbeat.close()
    (beat,) = read_beats(tmp_path)
    assert (beat.rank, beat.updates) == (1, 3)
    assert f"rank 1 (process {beat.pid} on {beat.host}) in update, after 3 updates and 1 passes" == first.words
    assert sorted(file.name for file in tmp_path.iterdir()) == ["01.json"], "nothing half-written is left"


def test_a_rank_that_falls_silent_is_told_once_with_where_it_was(tmp_path: Path) -> None:
    lost: list[tuple[int, str]] = []
    other = beating(tmp_path, 1)
    driver = beating(tmp_path, 0, watched=[1], on_lost=lambda rank, words: lost.append((rank, words)))
    time.sleep(2 * TIMEOUT)
    assert not lost, "it beats"
    other.close()
    wait_for(lambda: lost)
    time.sleep(2 * TIMEOUT)
    driver.close()
    ((rank, words),) = lost
    assert rank == 1
    assert words.startswith("rank 1 (process ")
    assert f"{IDLE}, after 0 updates and 0 passes, gave no sign of life for" in words


def test_what_an_earlier_start_has_left_is_no_sign_of_life(tmp_path: Path) -> None:
    beating(tmp_path, 1).close()
    lost: list[str] = []
    driver = beating(tmp_path, 0, watched=[1], timeout=0.2, on_lost=lambda _, words: lost.append(words))
    wait_for(lambda: lost)
    driver.close()
    assert lost[0].startswith("rank 1, which was not heard of before, gave no sign of life")


def test_a_call_without_passes_is_told_then_its_stacks_are_written(tmp_path: Path) -> None:
    progress, slow, stalls = Progress(), [], []
    other = beating(tmp_path, 1)
    driver = beating(
        tmp_path, 0, progress, watched=[1], stall_timeout=3 * TIMEOUT, on_slow=slow.append, on_stall=stalls.append
    )
    held = threading.Event()
    thread = threading.Thread(target=waits_in_a_collective, args=(progress, held))
    thread.start()
    wait_for(lambda: stalls)
    held.set()
    thread.join()
    driver.close()
    other.close()
    assert slow
    assert len(stalls) == 1
    assert "no rank made a pass for" in stalls[0]
    assert "rank 0 " in stalls[0]
    assert "rank 1 " in stalls[0]
    assert "in waits_in_a_collective" in (tmp_path / "00.log").read_text()


def waits_in_a_collective(progress: Progress, held: threading.Event) -> None:
    with progress.during("update"):
        held.wait(PATIENCE)


def test_passes_and_idleness_are_no_stall(tmp_path: Path) -> None:
    progress, stalls = Progress(), []
    driver = beating(tmp_path, 0, progress, stall_timeout=TIMEOUT, on_stall=stalls.append)
    time.sleep(4 * TIMEOUT)
    with progress.during("update"):
        for _ in range(16):
            time.sleep(TIMEOUT / 4)
            progress.passed()
    driver.close()
    assert not stalls


def test_a_file_that_is_no_sign_of_life_is_none(tmp_path: Path) -> None:
    (tmp_path / "01.json").write_text('{"rank": 1}')
    (tmp_path / "02.json").write_text("{")
    assert read_beats(tmp_path) == []
    assert Beat(0, "h", 1, IDLE, 0, 0, 1, 0.0).words == f"rank 0 (process 1 on h) {IDLE}, after 0 updates and 0 passes"
