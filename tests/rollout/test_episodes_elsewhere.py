"""Environments in processes of their own: the same bits as in this one, and each failure costs its episode alone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import getitem
from pathlib import Path
from typing import Any

import psutil
import pytest

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt, Score, Status
from sapo.environments import Answer, Messages, Turn, toolkit
from sapo.errors import Interrupted, TaskError
from sapo.model.policy import Policy
from sapo.rollout.episodes.driver import EpisodeDriver, host_for
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.tasks import make_task
from sapo.tasks.episodes import pool
from sapo.tasks.episodes.elsewhere import Elsewhere
from sapo.tasks.episodes.line import PlayError
from sapo.tasks.episodes.origin import is_of_others, origin_of
from sapo.tasks.episodes.pool import close_hosts, host_of
from support.faulty_games import Faulty, MadeBy
from support.trainer_cases import make_policy

PATH = os.pathsep.join(sys.path)
NAME = "support.faulty_games:Faulty"
SECONDS = 4.0  # in which good episodes reply on a machine with much other work


@pytest.fixture(scope="module")
def policy() -> Policy:
    import torch

    return make_policy(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _without_hosts() -> Iterator[None]:
    yield
    close_hosts()


class OneByOne(LocalEngine):
    """Draws each request on its own, so that no sum depends on the batch."""

    def generate(self, requests, params, should_stop=lambda: False, experts=None):
        return [c for request in requests for c in super(OneByOne, self).generate([request], params, should_stop)]


def drive(
    policy: Policy,
    plays: list[str],
    directory: Path = Path(),
    should_stop=lambda: False,
    samples: int = 1,
    task=None,
    **turns: object,
) -> list[tuple[Completion, ...]]:
    """Play one prompt for each name of a function of faulty_games."""
    task = task or make_task(NAME, seed=0)
    prompts = [
        replace(p, token_ids=policy.encode(p.text), metadata={"play": play, "directory": str(directory)})
        for p, play in zip(task.held_out(len(plays)), plays, strict=True)
    ]
    params = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=policy.stop_token_ids)
    limits = TurnsConfig(**{"seconds_per_reply": SECONDS, **turns})  # type: ignore[arg-type]
    driver = EpisodeDriver(policy, OneByOne(policy), params, limits, should_stop=should_stop)
    return driver.play([Play(task, p, samples) for p in prompts])


FAILURES = {
    "raises": "KeyError: 'board' (faulty_games.py:",
    "raises_first": "ValueError: no docker (faulty_games.py:",
    "exits": "SystemExit: 3",
    "hangs": f"no answer within {SECONDS:g} s",
    "clings": f"no answer within {SECONDS:g} s",
    "no_score": "TypeError: play must return a Score; got str",
    "not_a_number": "ValueError: a reward must be finite",
    "says_bytes": "TypeError: an observation must be text or a list of messages; got bytes",
    "says_what_cannot_be_encoded": "ValueError: the tokenizer cannot encode the observation",
    "says_too_much": "ValueError: an observation must have at most 4194304 characters; got 8388608",
    "says_a_gigabyte": ("ValueError: an observation must have at most", "no answer within", "MemoryError"),
    "sends_messages": "ValueError: messages need a chat template",
    "never_asks": "RuntimeError: play asked the model nothing",
    "asks_twice_at_once": "RuntimeError: ask was called while the model's turn was open",
    "cancels_itself": "CancelledError",
    "leaves": "its worker process died (exit code 3), and again when it was played anew (exit code 3)",
    "is_killed": "its worker process died (signal SIGKILL), and again",
    "changes_its_mind_and_dies": "its worker process died, and it said something else when it was played anew",
    "scribbles": "the worker wrote what is no answer",
    "blocks_for_long": f"no answer within {SECONDS:g} s",
}
SAME = ["good", "chatty", "endless", "greedy_of_reward", "pauses_while_it_asks"]
"""What plays here as there, within its budgets or beyond."""
HARMLESS = ["prints", "leaves_a_process", "ends_its_child", "spoils_its_module", "dies_once"]


def test_every_failure_costs_its_own_episode_and_moves_no_other_by_a_bit(policy: Policy, tmp_path: Path) -> None:
    """All of them at once, beside good episodes, which are those of an environment that plays in this process."""
    plays = ["good", *FAILURES, *HARMLESS, *SAME]
    played = drive(policy, plays, tmp_path)
    alone = drive(policy, [play if play in SAME else "good" for play in plays], play_in="driver")
    for play, (ours,), (good,) in zip(plays, played, alone, strict=True):
        if play in FAILURES:
            assert ours.score.status is Status.ENVIRONMENT_ERROR, play
            assert ours.score.reward == 0.0
            assert ours.score.detail.startswith(FAILURES[play]), ours.score.detail
        else:
            assert ours == good, play
    assert (tmp_path / f"life-{plays.index('dies_once')}").exists(), "it has died once"
    close_hosts()
    strays = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]
    assert not strays, "what an episode leaves behind ends too"


def test_the_processes_of_an_episode_know_no_secrets_and_draw_what_its_seed_says(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    monkeypatch.setenv("GAME_KEY", "y")
    ((told,), *drawn) = drive(policy, ["tells_its_environment", "draws", "draws"], env=["GAME_KEY"])
    names = set((told.score.answer or "").split())
    assert {"PATH", "GAME_KEY"} <= names
    assert "SECRET_KEY" not in names
    rewards = [c.score.reward for (c,) in drawn]
    assert len(set(rewards)) == 2
    again = drive(policy, ["good", "draws", "draws"], env=["GAME_KEY"])
    assert [c.score.reward for (c,) in again[1:]] == rewards


def test_environments_close_what_they_opened_when_a_run_is_stopped(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        drive(policy, ["closes", "closes"], tmp_path, should_stop=lambda: True)
    assert {p.name for p in tmp_path.iterdir()} == {"closed-0", "closed-1"}


def test_a_host_that_was_killed_is_started_again_and_costs_nothing(policy: Policy) -> None:
    task = make_task(NAME, seed=0)
    alone = drive(policy, ["good"] * 2, task=task)
    host = host_for(task, TurnsConfig())
    assert host is not None
    guard = host.process_id()
    assert guard is not None
    os.kill(guard, signal.SIGKILL)
    assert drive(policy, ["good"] * 2, task=task) == alone
    assert host.process_id() not in (None, guard)


class Script:
    """Asks a model that says what is written, and 7 after that."""

    seed = 1

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.heard: list[str | Messages] = []

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        self.heard.append(observation)
        return Turn(self.texts.pop(0) if self.texts else "7", (1,), "stop")


def play_alone(task: Any, ask: Script | None = None, **metadata: object) -> Score | Answer:
    """Play one episode in a process of its own, without a driver."""
    made = origin_of(task)
    assert made is not None
    prompt = Prompt(0, "faulty", "", metadata={"play": "good", **metadata})
    return asyncio.run(Elsewhere(host_of(made), SECONDS).play(prompt, ask or Script()))


def test_a_process_that_does_not_begin_costs_its_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BEGIN_DEADLINE", 0.5)
    with pytest.raises(PlayError, match=r"^its worker process did not begin within 0.5 s$"):
        play_alone(make_task(NAME, seed=0), hangs=MadeBy(time.sleep, 600))


@pytest.mark.parametrize(("call", "what"), [(getitem, "KeyError: 'board'"), (os.stat, "FileNotFoundError: ")])
def test_a_prompt_that_cannot_be_read_in_a_process_is_said(call: Callable[..., Any], what: str) -> None:
    arguments = ({}, "board") if call is getitem else ("/board",)
    with pytest.raises(PlayError, match=f"^its worker process cannot read the prompt: {what}"):
        play_alone(make_task(NAME, seed=0), fails=MadeBy(call, *arguments))


def test_a_host_takes_as_many_sockets_as_the_system_allows_and_says_when_it_can_take_no_more() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    try:
        task = make_task(NAME, seed=0, refuses=False)  # of other options than those before: a host of its own
        made = origin_of(task)
        assert made is not None
        host = host_of(made)
        host.ready()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (child,) = psutil.Process(host.process_id()).children()
    assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises(PlayError, match=r"no file descriptor left; raise the hard limit of open files \(ulimit -Hn\)"):
        play_alone(task)
    resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert play_alone(task) == Score(1.0)


PROGRAM = """
import asyncio, sys
from sapo.data import Prompt
from sapo.environments import Turn
from sapo.tasks import make_task
from sapo.tasks.episodes.origin import origin_of
from sapo.tasks.episodes.elsewhere import Elsewhere
from sapo.tasks.episodes.pool import host_of

class Ask:
    seed = 1

    async def __call__(self, observation="", *, max_tokens=None):
        return Turn("7", (1,), "stop")

async def play():
    elsewhere = Elsewhere(host_of(origin_of(make_task("support.faulty_games:Faulty", seed=0))), 600)
    names = ["hangs", "blocks_for_long", "leaves_a_process", "hangs"]
    prompts = [Prompt(i, "faulty", "", metadata={"play": n, "directory": sys.argv[1]}) for i, n in enumerate(names)]
    await asyncio.gather(*(elsewhere.play(prompt, Ask()) for prompt in prompts))

asyncio.run(play())
"""


def test_no_process_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env={**os.environ, "PYTHONPATH": PATH})
    deadline = time.monotonic() + 120
    below: list[psutil.Process] = []
    while len(below) < 6 and time.monotonic() < deadline:  # a guard, a host, three that play and what one has left
        below = psutil.Process(run.pid).children(recursive=True)
        time.sleep(0.02)
    assert len(below) >= 6
    run.kill()
    run.wait()
    _, left = psutil.wait_procs(below, timeout=30)
    assert not left


def test_what_a_process_of_its_own_refuses_is_said(policy: Policy) -> None:
    task = make_task(NAME, seed=0, refuses=True)
    with pytest.raises(TaskError, match=r"Faulty', in a process of its own, .* rollout.turns.env .*KeyError: 'SECRET'"):
        drive(policy, ["good"], task=task)


def test_environments_of_ours_and_objects_play_in_this_process() -> None:
    ours = [make_task("calculator", seed=0), make_task("arithmetic", seed=0, tools=["calculator"])]
    assert [origin_of(task) for task in [*ours, Faulty()]] == [None] * 3
    assert [is_of_others(task) for task in [*ours, Faulty()]] == [False, False, True]
    theirs = [make_task(NAME, seed=0), make_task("arithmetic", seed=0, tools=["support.faulty_tools:twice"])]
    assert all(origin_of(task) is not None and is_of_others(task) for task in theirs)
    assert host_for(theirs[0], TurnsConfig(play_in="driver")) is None


def test_tools_of_ones_own_are_called_in_a_process_of_their_own(policy: Policy) -> None:
    """The rows and the verifier stay here: the process is told the prompt and answers with the last turn's text."""
    task = make_task("arithmetic", seed=0, tools=["support.faulty_tools:twice", "support.faulty_tools:where"])
    made = origin_of(task)
    assert made is not None
    assert made.make().toolbox.names == ("twice", "where")
    calls = ['{"name": "twice", "arguments": {"n": 21}}', '{"name": "where", "arguments": {}}']
    script = Script("".join(f"<tool_call>{call}</tool_call>" for call in calls), "42")
    answer = play_alone(task, script)
    assert isinstance(answer, Answer)
    assert answer.text == "42"
    assert answer.figures["tools/twice/calls"] == answer.figures["tools/where/calls"] == 1.0
    _, said = script.heard
    assert not isinstance(said, str)
    doubled, where = (str(message["content"]) for message in said)
    assert doubled == "42"
    assert int(where) != os.getpid()
    ((done,),) = drive(policy, ["-"], task=task)
    assert done.score.status in (Status.SCORED, Status.UNPARSEABLE, Status.TRUNCATED)


def test_programs_of_several_processes_take_turns() -> None:
    cores = range(os.cpu_count() or 1)
    toolkit.share_places()
    try:
        assert all(map(toolkit._take, cores))
        assert _in_a_fork(lambda: any(map(toolkit._take, cores))) == 0, "all places are taken"
    finally:
        toolkit._shared = None  # which closes the file, and frees them
    toolkit.share_places()
    try:
        assert _in_a_fork(lambda: all(map(toolkit._take, cores))) == 1
        with toolkit._place():  # those of the process that has ended are free
            assert _in_a_fork(lambda: toolkit._take(0)) == 0
            assert not toolkit._take(0), "another thread of this process has it"
        assert _in_a_fork(lambda: toolkit._take(0)) == 1
    finally:
        toolkit._shared = None


def _in_a_fork(call: Callable[[], bool]) -> int:
    child = os.fork()
    if not child:
        os._exit(int(call()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
