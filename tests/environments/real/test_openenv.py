"""The adapter against OpenEnv 0.10 itself: its clients, and a server of its own on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sapo.data import Prompt, Status
from sapo.environments.wrapping import SamePrompt
from sapo.tasks import make_task
from support.asking import play
from support.real_cases import SECONDS, assert_each_costs_its_own_episode, drive, needs_real, train_a_step
from support.servers import free_port

pytestmark = needs_real

SESSIONS = 16
"""What the server of tests/support/real_openenv.py allows at once."""

CLIENT = {"name": "openenv:support.real_openenv:LengthsClient", "show": "support.real_openenv:told"}
TYPED = {**CLIENT, "action": "support.real_openenv:to_action"}
PLAIN = {"name": "openenv:openenv.core:GenericEnvClient", "action": "support.real_openenv:to_json"}
SYNCHRONOUS = {**TYPED, "name": "openenv:support.real_openenv:synchronous"}


@contextmanager
def serving() -> Iterator[str]:
    """Start a server as a process; give its address, and end it."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-m", "support.real_openenv", str(port)], env=environment)
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not answer"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as address:
        yield address


def task(spec: dict[str, str], url: str) -> Any:
    return make_task("same_prompt", seed=0, text="Reach 7.", environment={**spec, "url": url})


@pytest.mark.parametrize(
    ("spec", "first"),
    [(TYPED, "seed 5"), (PLAIN, "{'told': 'seed 5'}"), (SYNCHRONOUS, "seed 5")],
    ids=["typed", "without_types", "synchronous"],
)
def test_every_client_of_openenv_is_stepped_within_one_session(spec: dict[str, str], first: str, url: str) -> None:
    """More episodes than sessions, one after the other: each gives its session back."""
    prompt = Prompt(0, "same_prompt", "?", metadata={"seed": 5})
    for _ in range(SESSIONS + 2 if spec is TYPED else 2):
        score, shown = play(task(spec, url), prompt, "12ab", "345")
        assert (score.reward, shown[0]) == (1.5, first)  # by hand: two digits of four, three of three
        assert "0.5" not in shown[1], "the reward is not for the model"


def test_a_step_is_trained(url: str, tmp_path: Path) -> None:
    spec = {"name": "same_prompt", "label": "openenv", "text": "Reach 7.", "environment": {**TYPED, "url": url}}
    rows = train_a_step(tmp_path, [spec])
    assert len(rows) == 8
    assert all(len(row["observations"]) == 2 for row in rows)
    assert len({row["reward"] for row in rows}) > 1


def test_more_episodes_than_sessions_cost_those_that_found_none(url: str) -> None:
    played = drive(task(TYPED, url), [{"seed": 5}] * (SESSIONS + 3))
    failed = [one.score for one in played if one.score.status is Status.ENVIRONMENT_ERROR]
    assert len(failed) == 3
    assert all("CAPACITY_REACHED" in score.detail for score in failed)


def test_a_failure_costs_its_own_episode_and_moves_no_other_by_a_bit(url: str) -> None:
    failures = {
        90: "the last step has no reward, or NaN",
        91: "Server error: 'board'",
        92: f"no answer within {SECONDS:g} s",
        93: "ConnectionClosed",  # the server ends the session
    }
    bad = {str(seed): ({"seed": seed}, detail) for seed, detail in failures.items()}
    assert_each_costs_its_own_episode(task(TYPED, url), {"seed": 5}, bad)


def test_a_server_that_crashes_costs_the_episodes_that_it_has_and_those_of_no_other_server(url: str) -> None:
    with serving() as frail:
        both = [task(TYPED, url), task(TYPED, frail)]
        mixed = Mixed(both)
        alone = drive(mixed, [{"seed": 5, "server": place % 2} for place in range(6)])
        assert {one.score.status for one in alone} == {Status.SCORED}
        played = drive(mixed, [{"seed": 94 if place == 3 else 5, "server": place % 2} for place in range(6)])
    assert played[::2] == alone[::2]
    assert {one.score.status for one in played[1::2]} == {Status.ENVIRONMENT_ERROR}
    assert all("ConnectionClosed" in one.score.detail for one in played[1::2])


class Mixed(SamePrompt):
    """Environments side by side in one call of the driver: the column `server` says which."""

    def __init__(self, tasks: list[Any]) -> None:
        super().__init__("Reach 7.")
        self.tasks = tasks

    async def play(self, prompt: Prompt, ask: Any) -> Any:
        return await self.tasks[prompt.metadata["server"]].play(prompt, ask)
