"""Runs on a Ray cluster of two nodes: the ranks that they place there, and what dies of them.

What has to be equal bit for bit is compared with an uninterrupted run whose ranks are processes of one machine.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from support.processes import PATIENCE, finish, last_line, start
from support.ray_cases import TwoNodes, free_port, needs_ray, of_ray, rank_in, two_nodes
from support.runs import fingerprint, write_recipe

pytestmark = [needs_ray, pytest.mark.scale]

STEPS = 12
SEED = 20261130


def recipe_in(directory: Path, **changes: Any) -> str:
    return str(
        write_recipe(
            directory,
            **{
                "train__steps": STEPS,
                "rollout__max_new_tokens": 24,
                "eval__every": 4,
                "checkpoint__every": 3,
                "checkpoint__keep": 10,
                **changes,
            },
        )
    )


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes(ray_client_server_port=free_port()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """uninterrupted(n): the run of n ranks as processes of one machine; each is made once."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            directory = tmp_path_factory.mktemp("whole")
            finish(start("train", recipe_in(directory), f"train.ranks={ranks}", cwd=directory))
            made[ranks] = directory / "run"
        return made[ranks]

    return run


def same(run: Path, other: Path) -> bool:
    """Whether metrics, completions, weights and optimizer of two runs are equal bit for bit."""
    return fingerprint(run, STEPS) == fingerprint(other, STEPS)


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def on(address: str, trainers: int, *more: str) -> list[str]:
    return ["cluster.kind=ray", f"cluster.address={address}", f"cluster.trainers={trainers}", *more]


def when(run: Path, driver: subprocess.Popen, step: int, delay: float = 0.0) -> bool:
    """Wait until a step is in the log, and some seconds more; False where the run has ended before."""
    deadline = time.monotonic() + PATIENCE
    while last_line(run).get("step", -1) < step:
        if driver.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    time.sleep(delay)
    return driver.poll() is None


def log_of(run: Path, number: int = 1, kind: str = "ranks") -> str:
    return (run / kind / f"{number:02d}.log").read_text()


def test_two_trainers_and_an_engine_are_two_ranks_of_one_machine_to_the_bit(
    nodes: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    file = recipe_in(tmp_path)
    output = finish(start("train", file, *on(nodes.address, 2, "cluster.engines=1"), cwd=tmp_path))
    assert same(tmp_path / "run", uninterrupted(2))
    for log in (log_of(tmp_path / "run"), log_of(tmp_path / "run", 0, "engines")):
        assert rank_in(log)[0] == os.uname().nodename
    assert "ray" not in output.lower(), output
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["train"]["ranks"], written["cluster"]["trainers"]) == (2, None)


def test_two_engines_share_the_prompts_and_draw_the_same_completions(
    nodes: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    """Completions are equal; log-probabilities are to rounding, since each draws another batch."""
    finish(start("train", recipe_in(tmp_path), *on(nodes.address, 1, "cluster.engines=2"), cwd=tmp_path))
    for file in sorted((uninterrupted(1) / "rollouts").iterdir()):
        assert texts(tmp_path / "run" / "rollouts" / file.name) == texts(file), file.name
    assert {log_of(tmp_path / "run", n, "engines").count(" on node ") for n in (0, 1)} == {1}


@pytest.mark.parametrize("number", range(2))
def test_a_run_survives_the_death_of_an_engine_and_of_a_rank(
    number: int, nodes: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    """Both at seeded moments, first the engine, which is started again alone, then the rank, with which all are."""
    generator, run = random.Random(SEED + number), tmp_path / "run"
    moments = sorted(generator.sample(range(1, STEPS - 1), 2))
    driver = start("train", recipe_in(tmp_path), *on(nodes.address, 2, "cluster.engines=1"), cwd=tmp_path)
    killed = []
    for step, kind in zip(moments, ("engines", "ranks"), strict=True):
        assert when(run, driver, step, generator.uniform(0.0, 0.1)), (step, kind)
        killed.append(rank_in(log_of(run, int(kind == "ranks"), kind))[1])
        os.kill(killed[-1], signal.SIGKILL)
    output = " ".join(finish(driver).split())
    node = os.uname().nodename
    assert f"engine 0 (process {killed[0]} on node {node}) died; " in output
    assert "it is started again (1 of at most 3 times)" in output
    assert f"rank 1 (process {killed[1]} on node {node}) died; " in output
    assert "all ranks are started again (1 of at most 3 times)" in output
    assert same(run, uninterrupted(2)), moments


def test_a_run_survives_the_death_of_a_node(
    nodes: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    """Two ranks beside the driver, one on each node; then one node dies, and another joins."""
    driver = start("train", recipe_in(tmp_path), *on(nodes.address, 3, "cluster.wait_seconds=60"), cwd=tmp_path)
    assert when(tmp_path / "run", driver, 5)
    ranks = [psutil.Process(rank_in(log_of(tmp_path / "run", rank))[1]) for rank in (1, 2)]
    driver.send_signal(signal.SIGSTOP)  # or so short a run would end before its ranks notice
    nodes.kill_node()
    deadline = time.monotonic() + 60
    while all(rank.is_running() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    nodes.add_node()
    driver.send_signal(signal.SIGCONT)
    output = " ".join(finish(driver).split())
    assert "all ranks are started again (1 of at most 3 times)" in output
    assert same(tmp_path / "run", uninterrupted(3))
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, f"left behind: {alive}"


def test_a_driver_outside_the_cluster_trains_through_its_client_server(
    nodes: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    finish(start("train", recipe_in(tmp_path), *on(nodes.client, 2, "cluster.engines=1"), cwd=tmp_path))
    assert same(tmp_path / "run", uninterrupted(2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_of_one_machine_ends_with_its_run(
    number: signal.Signals, tmp_path: Path, uninterrupted: Callable[[int], Path]
) -> None:
    """A Ctrl-C goes to all processes of the terminal; the cluster's must not end before the run has its checkpoint."""
    driver = start("train", recipe_in(tmp_path), *on("local", 2), cwd=tmp_path, new_session=True)
    assert when(tmp_path / "run", driver, 2)
    started = of_ray(session=driver.pid)
    assert len(started) > 3
    mine = [process for process in started if "HostedProcess" in process.name()]
    assert mine
    os.killpg(driver.pid, number) if number == signal.SIGINT else driver.kill()
    output = finish(driver, code=130 if number == signal.SIGINT else -9)
    for processes, seconds in ((mine, 60), (started, PATIENCE)):  # agents of Ray first report to a head that is gone
        _, alive = psutil.wait_procs(processes, timeout=seconds)
        assert not alive, f"left behind: {alive}"
    assert number == signal.SIGKILL or "next: sapo resume" in output, output
    finish(start("resume", "run", "cluster.kind=none", cwd=tmp_path))
    assert same(tmp_path / "run", uninterrupted(2))


@pytest.fixture
def with_jobs() -> Iterator[TwoNodes]:
    """A cluster with a dashboard, which takes jobs."""
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    with two_nodes(include_dashboard=True, **ports) as cluster:
        yield cluster


def test_a_job_trains(with_jobs: TwoNodes, tmp_path: Path, uninterrupted: Callable[[int], Path]) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    command = [sys.executable, "-m", "sapo", "train", recipe_in(tmp_path), *on("auto", 2)]
    # Where the verifier of the test is. With --working-dir the agents of two nodes would unpack it to the same place of
    # this one machine, each over the other's.
    command = ["sh", "-c", f"cd {tmp_path} && exec {shlex.join(command)}"]
    submit = [ray, "job", "submit", "--address", f"http://{with_jobs.cluster.webui_url}", "--"]
    for _ in range(20):  # the cluster may take a while to have an agent that starts jobs
        done = subprocess.run([*submit, *command], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out mean reward" in done.stdout
    assert same(tmp_path / "run", uninterrupted(2))
