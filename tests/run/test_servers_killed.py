"""Runs whose vLLM servers are killed: each ends as one that nothing has hit, bit for bit.

The servers are fake ones that draw each request on its own (support/fake_vllm). vLLM's own server rounds by the
composition of its batches: a run that has lost a server draws the same noise there, and not always the same bits.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import processes
from support.processes import PATIENCE, Process, finish
from support.runs import fingerprint, write_recipe
from support.servers import gone, kill, servers_of, with_fake

STEPS = 8

pytestmark = pytest.mark.scale


def start(directory: Path, *arguments: str, **knobs: Any) -> Process:
    """Start a command with fake servers; the recipe is made when it is not there yet."""
    if not (directory / "recipe.yaml").exists():
        made = {"rollout__engine": "vllm", "rollout__servers": 2, "train__steps": STEPS, "train__max_restarts": 20}
        write_recipe(directory, **made)
    environment = with_fake(dict(os.environ), **knobs)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "FAKE_VLLM"):
            patch.setenv(name, environment[name])
        return processes.start(*arguments, cwd=directory)


def train(directory: Path, *changes: str, **knobs: Any) -> Process:
    return start(directory, "train", "recipe.yaml", *changes, **knobs)


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_until(process: Process, moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not moment():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run writes that nothing has hit, on one server."""
    directory = tmp_path_factory.mktemp("whole")
    finish(train(directory, "rollout.servers=1"))
    return fingerprint(directory / "run", STEPS)


@pytest.mark.parametrize("seed", [0, 1])
def test_five_kills_of_servers_change_nothing(tmp_path: Path, whole: dict[str, Any], seed: int) -> None:
    """At seeded lines of metrics.jsonl and seeded fractions of a second after them: ten kills in two runs."""
    draw = random.Random(seed)
    moments = sorted((draw.randrange(1, 30), draw.random(), draw.random()) for _ in range(5))
    process = train(tmp_path)
    started = []
    for line, delay, which in moments:
        wait_until(process, lambda line=line: lines(tmp_path / "run") >= line and bool(servers_of(process.pid)))
        time.sleep(delay / 2)
        servers = servers_of(process.pid)
        started += servers
        assert servers
        kill(servers[int(which * len(servers))])
    output = finish(process)
    assert output.count("is lost: ") >= 5, output
    assert "was ended by SIGKILL" in output
    assert fingerprint(tmp_path / "run", STEPS) == whole
    assert gone(started)
    # Said on the terminal, and in no metric: the run is the one that nothing has hit.
    assert "server" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_server_that_dies_within_an_answer_or_within_a_transfer(tmp_path: Path, whole: dict[str, Any]) -> None:
    output = finish(train(tmp_path, **{"s0#0": {"die_at": 21}, "s1#0": {"transfer": "die"}, "s0#1": {"fail": [3]}}))
    assert "server 0" in output
    assert "server 1" in output
    assert output.count("it is started again") == 2
    assert fingerprint(tmp_path / "run", STEPS) == whole


def test_with_no_server_left_the_run_ends_with_one_line_and_resumes(tmp_path: Path, whole: dict[str, Any]) -> None:
    process = train(tmp_path, "train.max_restarts=0")
    wait_until(process, lambda: lines(tmp_path / "run") >= 14)
    servers = servers_of(process.pid)
    assert len(servers) == 2
    for server in servers:
        kill(server)
    output = finish(process, code=1)
    assert "Traceback" not in output
    [said] = [line for line in output.splitlines() if "no vLLM server is left to draw" in line]
    assert "was ended by SIGKILL; " in said
    assert "engines/0" in said
    assert "train.max_restarts=0 is used up; `sapo resume " in said
    assert json.loads((tmp_path / "run" / "failure.json").read_text())
    finish(start(tmp_path, "resume", "run", "rollout.servers=1"))
    assert fingerprint(tmp_path / "run", STEPS) == whole


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_servers_end_with_their_run(tmp_path: Path, whole: dict[str, Any], number: int) -> None:
    process = train(tmp_path)
    wait_until(process, lambda: lines(tmp_path / "run") >= 14)
    servers = servers_of(process.pid)
    assert len(servers) == 2
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert gone(servers)
    finish(start(tmp_path, "resume", "run"))
    assert fingerprint(tmp_path / "run", STEPS) == whole


def test_a_server_that_does_not_come_up_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    output = finish(train(tmp_path, s1={"start_fails": True}), code=1)
    [said] = [line for line in output.splitlines() if "has not come up" in line]
    assert "server 1 " in said
    assert "ended with code 1; " in said
    assert "engines/01.log ends with: ValueError: no room for the cache" in said
    log = (tmp_path / "run" / "engines" / "00.log").read_text()
    pid = int(log.split()[2]) if log.startswith("fake server") else 0
    assert not pid or not Path(f"/proc/{pid}").exists()


def test_servers_that_draw_beside_the_updates_give_the_run_of_those_that_are_waited_for(tmp_path: Path) -> None:
    changes = ["rollout.servers=1", "rollout.staleness=1"]
    for where in ("driver", "thread"):
        (tmp_path / where).mkdir()
        finish(train(tmp_path / where, *changes, f"rollout.run_in={where}"))
    beside, waited = (fingerprint(tmp_path / where / "run", STEPS) for where in ("thread", "driver"))
    assert beside == waited
