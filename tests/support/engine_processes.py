"""Engines in processes of their own, as runs start them, and how tests kill them and their drivers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import sapo
from support.processes import last_line
from support.runs import REWARD


def enter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory, from which the reward functions of `write_recipe` can be imported."""
    (directory / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.chdir(directory)


def engines(driver: int) -> list[psutil.Process]:
    """The engine processes of a run."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "sapo.rollout.remote.process" in child.cmdline():
                    found.append(child)
    return found


def assert_gone(processes: list[psutil.Process], seconds: float = 60.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, f"left behind: {alive}"


def after_step(run: Path, step: int, delay: float) -> Callable[[], bool]:
    """Return what tells whether a line of a step, or of a later one, was written so many seconds ago."""
    since: list[float] = []

    def moment() -> bool:
        if not since and last_line(run).get("step", 0) >= step:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > delay

    return moment


def noting_engines(driver: int, seen: list[psutil.Process], moment: Callable[[], bool]) -> Callable[[], bool]:
    """Return a moment that notes the engines of a driver while it is waited for."""

    def noting() -> bool:
        seen[:] = seen or engines(driver)
        return moment()

    return noting


class Killer:
    """A listener that kills the engines of this process at some of the run's updates, and keeps the warnings.

    Args:
        moments: seconds to wait after an update, by its number from 1.
    """

    def __init__(self, moments: dict[int, float]) -> None:
        self.moments = moments
        self.updates = 0
        self.killed = 0
        self.warnings: list[str] = []
        self.timers: list[threading.Timer] = []

    def started(self, config: sapo.RunConfig) -> None: ...

    def record(self, record: dict) -> None:
        if record["kind"] != "update":
            return
        self.updates += 1
        if self.updates in self.moments:
            self.timers.append(threading.Timer(self.moments[self.updates], self.kill))
            self.timers[-1].start()

    def kill(self) -> None:
        for engine in engines(os.getpid()):
            with suppress(psutil.NoSuchProcess):
                engine.kill()
                self.killed += 1

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def checkpoint(self, checkpoint: object) -> None: ...

    def resumed(self, checkpoint: object) -> None: ...
