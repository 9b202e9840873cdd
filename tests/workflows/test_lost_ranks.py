"""A process that is stopped and not dead (SIGSTOP) is noticed, ended and answered like one that died.

On a machine that is lost, files stop changing in the same way. Timeouts are seconds here where a user has a minute.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench.processes import processes_of

from sapo.training.heartbeat import read_beats
from support.processes import PATIENCE, Process, finish, last_line, start
from support.runs import fingerprint, write_recipe

pytestmark = pytest.mark.scale

STEPS = 8
TIMEOUT = 6.0
"""Seconds: many times what a thread waits for its turn on a busy machine."""


def recipe_in(directory: Path, **changes: Any) -> str:
    settings = {
        "train__steps": STEPS,
        "train__ranks": 2,
        "train__rank_timeout": TIMEOUT,
        "rollout__max_new_tokens": 24,
        "eval__every": 0,
        "checkpoint__every": 3,
        "checkpoint__keep": 10,
    }
    return str(write_recipe(directory, **{**settings, **changes}))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("whole")
    finish(start("train", recipe_in(directory), cwd=directory))
    return fingerprint(directory / "run", STEPS)


def wait_for(moment: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := moment()):
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)
    return found


def at_step(run: Path, step: int) -> None:
    wait_for(lambda: last_line(run).get("step", 0) >= step)


def has_ended(process: psutil.Process) -> bool:
    """Whether it has, its parent's answer apart: a driver that is stopped takes no note of its children."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def rank_of(driver: Process) -> psutil.Process:
    return wait_for(lambda: processes_of(driver.pid))[0]


@pytest.mark.parametrize("step", [0, 4], ids=["while it is imported", "in mid-run"])
def test_a_rank_that_is_stopped_is_ended_and_the_run_ends_as_one_that_was_not_interrupted(
    step: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    driver = start("train", recipe_in(tmp_path), cwd=tmp_path)
    at_step(tmp_path / "run", step)
    rank = rank_of(driver)
    rank.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    psutil.wait_procs([rank], timeout=PATIENCE)
    assert time.monotonic() - stopped < 20 * TIMEOUT, "nobody noticed"
    output = " ".join(finish(driver).split())
    assert "gave no sign of life for" in output, output
    assert "all ranks are started again (1 of at most 3 times)" in output
    if step:
        assert f"rank 1 (process {rank.pid} on " in output
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted
    (beats,) = [b for b in read_beats(tmp_path / "run" / "ranks") if b.rank == 1]
    assert beats.pid != rank.pid, "of the rank that was started in its place"


def test_a_rank_whose_driver_is_stopped_ends_by_itself_and_the_run_can_be_resumed(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    driver = start("train", recipe_in(tmp_path), cwd=tmp_path)
    at_step(tmp_path / "run", 4)
    rank = rank_of(driver)
    driver.send_signal(signal.SIGSTOP)
    wait_for(lambda: has_ended(rank), 20 * TIMEOUT)
    log = (tmp_path / "run" / "ranks" / "01.log").read_text()
    assert f"rank 1 ends, since rank 0 (process {driver.pid} on " in log
    driver.kill()
    driver.communicate()
    finish(start("resume", "run", cwd=tmp_path))
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


def test_a_driver_that_was_stopped_and_goes_on_starts_its_ranks_again(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    driver = start("train", recipe_in(tmp_path), cwd=tmp_path)
    at_step(tmp_path / "run", 4)
    rank = rank_of(driver)
    driver.send_signal(signal.SIGSTOP)
    wait_for(lambda: has_ended(rank), 20 * TIMEOUT)
    driver.send_signal(signal.SIGCONT)
    assert "all ranks are started again" in " ".join(finish(driver).split())
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


HANGING = '''
import os, time
from pathlib import Path

from sapo.training.optimizer import PolicyOptimizer

collect = PolicyOptimizer.collect_gradients


def hang(self):
    """Hang once, in the third update, on the rank that is not the driver: it lives, and its heart beats."""
    self.calls = getattr(self, "calls", 0) + 1
    once = Path(os.environ["HANG_ONCE"])
    if self.calls == 5 and "SAPO_RANK_OF_PORT" in os.environ and not once.exists():
        once.touch()
        time.sleep(1000)
    collect(self)


PolicyOptimizer.collect_gradients = hang
'''


def run_at_start(code: str, of: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes whose command names `of` run code before anything else."""
    (directory / "changed").mkdir()
    (directory / "changed" / "sitecustomize.py").write_text(
        f"import sys\nif any({of!r} in a for a in sys.orig_argv):\n    import changes_of_a_test\n"
    )
    (directory / "changed" / "changes_of_a_test.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{directory / 'changed'}:{os.environ.get('PYTHONPATH', '')}")


def test_ranks_that_live_and_do_not_get_on_write_their_stacks_and_are_started_again(
    tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at_start(HANGING, "sapo.workflows.training_group", tmp_path, monkeypatch)
    monkeypatch.setenv("HANG_ONCE", str(tmp_path / "hung"))
    file = recipe_in(tmp_path, train__stall_timeout=3 * TIMEOUT)
    output = " ".join(finish(start("train", file, cwd=tmp_path)).split())
    assert (tmp_path / "hung").exists()
    assert "no rank made a pass for" in output, output
    assert "all ranks are started again (1 of at most 3 times)" in output
    ranks = tmp_path / "run" / "ranks"
    assert "in hang" in (ranks / "01.log").read_text()
    assert "stacks of rank 0" in (ranks / "00.log").read_text()
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


FAILING = """
import os

from sapo.training.trainer import Trainer


def fail(self, *args):
    raise OSError(28, "No space left on device")


if "SAPO_RANK_OF_PORT" not in os.environ and os.environ.get("RANK", "0") == "0":
    Trainer.{method} = fail
"""


@pytest.mark.parametrize("torchrun", [None, 2], ids=["alone", "by torchrun"])
@pytest.mark.parametrize("method", ["update", "save_optimizer"], ids=["in a collective", "with an answer to take"])
def test_a_run_ends_at_once_when_its_driver_alone_fails_while_the_ranks_wait(
    method: str, torchrun: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_at_start(FAILING.format(method=method), "sapo", tmp_path, monkeypatch)
    recipe = recipe_in(tmp_path, train__rank_timeout=2 * PATIENCE)  # all ranks live: no missing sign of life ends this
    process = start("train", recipe, cwd=tmp_path, torchrun=torchrun, anew=True)
    ranks = wait_for(lambda: [b.pid for b in read_beats(tmp_path / "run" / "ranks") if b.rank == 1])
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    assert "No space left on device" in output
    assert not any(psutil.pid_exists(pid) for pid in ranks)


def test_the_last_signs_of_life_of_all_ranks_are_told_when_the_run_fails(tmp_path: Path) -> None:
    driver = start("train", recipe_in(tmp_path, train__max_restarts=0), cwd=tmp_path)
    at_step(tmp_path / "run", 2)
    rank = rank_of(driver)
    rank.kill()
    lines = finish(driver, code=1).splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split()[:3] == ["sapo:", "rank", "host"]]
    rows = [line.split() for line in lines[head + 1 : head + 3]]
    assert [row[1] for row in rows] == ["0", "1"]
    assert [row[3] for row in rows] == [str(driver.pid), str(rank.pid)]


def test_a_rank_of_torchrun_that_is_stopped_ends_the_run_which_is_resumed(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    agent = start("train", recipe_in(tmp_path), cwd=tmp_path, torchrun=2)
    at_step(tmp_path / "run", 4)
    beats = {beat.rank: beat for beat in read_beats(tmp_path / "run" / "ranks")}
    assert beats.keys() == {0, 1}
    psutil.Process(beats[1].pid).send_signal(signal.SIGSTOP)
    output, _ = agent.communicate(timeout=PATIENCE)
    assert agent.returncode
    assert "gave no sign of life for" in output, output
    assert "gave no sign of life" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]
    assert not any(psutil.pid_exists(beat.pid) for beat in beats.values())
    finish(start("resume", "run", cwd=tmp_path, torchrun=2))
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


@pytest.mark.parametrize("victim", [0, 1], ids=["the driver", "another rank"])
def test_torchrun_ends_the_run_when_a_process_is_killed_and_the_run_is_resumed(
    victim: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    agent = start("train", recipe_in(tmp_path), cwd=tmp_path, torchrun=2)
    at_step(tmp_path / "run", 4)
    beats = {beat.rank: beat for beat in read_beats(tmp_path / "run" / "ranks")}
    psutil.Process(beats[victim].pid).kill()
    agent.communicate(timeout=PATIENCE)
    assert agent.returncode
    assert not any(psutil.pid_exists(beat.pid) for beat in beats.values())
    finish(start("resume", "run", cwd=tmp_path, torchrun=2))
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted
