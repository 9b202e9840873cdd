"""Signals that ask a command to save and stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapo.cli.terminal import STOPPING, stop_signals
from support.processes import finish, last_line, start
from support.runs import write_recipe


@pytest.fixture(autouse=True)
def none_ignored() -> Iterator[None]:
    """Signals as a shell leaves them to a command: one that is started in the background may ignore some."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING, ids=lambda n: signal.Signals(n).name)
def test_a_signal_asks_for_a_stop_and_the_handlers_of_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.received == number
        if number not in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)  # a shell and the kernel each send one
            os.kill(os.getpid(), signal.SIGTERM)  # a cluster warns before it ends a job
    assert signal.getsignal(number) == before


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once_and_a_closed_terminal_does_not_end_the_saving() -> None:
    program = """
import os, signal, sys
from sapo.cli.terminal import stop_signals
with stop_signals() as stop:
    if sys.argv[1] == "closed":
        os.close(2)
        os.open("/dev/full", os.O_WRONLY)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.kill(os.getpid(), signal.SIGHUP)
        print("saved", file=sys.stderr)
        os._exit(7 if stop() else 1)
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGINT)
"""
    for word, code in (("closed", 7), ("twice", 130)):
        ended = subprocess.run([sys.executable, "-c", program, word], capture_output=True, timeout=60)
        assert ended.returncode == code, ended.stderr


@pytest.mark.scale
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGUSR1"])
def test_a_run_is_saved_and_says_how_to_go_on(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    run = tmp_path / "run"
    process = start("train", str(write_recipe(tmp_path, train__steps=200, checkpoint__every=0)), cwd=tmp_path)
    while last_line(run).get("step", 0) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    output = finish(process, code=128 + number)
    assert f"next: sapo resume {run}" in output
    assert "Traceback" not in output
    assert list((run / "checkpoints").glob("step-*"))
