"""Environments in the forms of TRL, skyrl-gym and OpenEnv, by stand-ins."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sapo.data import Prompt, Score, Status
from sapo.environments import Environment
from sapo.environments.adapters.openenv import OpenEnvEnvironment, text_of
from sapo.environments.adapters.skyrl import SkyRlEnvironment
from sapo.environments.adapters.trl import TrlEnvironment
from sapo.environments.side import Side
from support.adapter_cases import PROMPT, Client, Counter, Gym, Rows
from support.asking import Scripted, play

# ----------------------------------------------------------------------------------------------------------------- TRL


def call(**arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': 'add', 'arguments': arguments})}</tool_call>"


def test_a_trl_environment_is_played() -> None:
    task = TrlEnvironment(Rows(), Counter)
    assert isinstance(task, Environment)
    assert task.toolbox.names == ("add",)
    score, shown = play(task, PROMPT, call(k=1) + call(k=2), call(k=1), "Done.")
    assert score.reward == 1.0
    assert shown[0] == "You have 3."
    assert [[m["content"] for m in said] for said in shown[1:]] == [["4", "6"], ["7"]]
    assert score.figures["tools/add/calls"] == 3.0
    score, _ = play(task, PROMPT, "Done.")
    assert score.reward == 0.0  # reset for each episode


def test_what_a_trl_tool_raises_is_answered() -> None:
    score, shown = play(TrlEnvironment(Rows(), Counter), PROMPT, call(k=101), call(k="4"), call(k=4), "Done.")
    assert score.reward == 1.0
    assert shown[1][0]["content"] == "error: too much"
    assert shown[2][0]["content"] == "error: add: k must be a whole number; got '4'"


def test_a_trl_environment_without_a_reward_is_judged_by_the_task() -> None:
    class Silent:
        def reset(self) -> None:  # takes no columns
            return None

    score, shown = play(TrlEnvironment(Rows(), Silent), PROMPT, "7")
    assert (score.reward, list(shown)) == (1.0, [""])
    cut, _ = play(TrlEnvironment(Rows(), Silent), PROMPT, "7", cut=True)
    assert cut.status is Status.TRUNCATED


def test_coroutines_of_a_trl_environment_are_awaited() -> None:
    class Slow(Counter):
        async def add(self, k: int) -> int:
            """Add to the number.

            Args:
                k: how much.
            """
            await asyncio.sleep(0)
            self.n += k
            return self.n

        async def get_reward(self) -> float:
            return float(self.n)

    score, _ = play(TrlEnvironment(Rows(), Slow), PROMPT, call(k=4), "Done.")
    assert score.reward == 7.0


def bad(**methods: Any) -> type:
    return type("Bad", (Counter,), methods)


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (bad(reset=lambda self, **row: [{"type": "image"}]), TypeError, "reset must return a text or None"),
        (bad(reset=lambda self, **row: 1 / 0), ZeroDivisionError, "division"),
        (bad(get_reward=lambda self: None), ValueError, "cannot be scored"),
        (bad(get_reward=lambda self: sys.exit(3)), RuntimeError, "SystemExit: 3"),
        (bad(get_reward=lambda self: next(iter(()))), RuntimeError, "StopIteration"),
    ],
)
def test_a_bad_trl_environment_fails_its_episode(factory: type, error: type[Exception], message: str) -> None:
    task = TrlEnvironment(Rows(), factory)
    with pytest.raises(error, match=message):
        play(task, PROMPT, "Done.")


def test_an_environment_that_failed_is_not_used_again() -> None:
    made: list[Counter] = []

    class Once(Counter):
        def __init__(self) -> None:
            made.append(self)

        def get_reward(self) -> float:
            if self.n == 3:
                raise RuntimeError("broken")
            return 1.0

    task = TrlEnvironment(Rows(), Once)
    play(task, PROMPT, call(k=1), "Done.")
    play(task, PROMPT, call(k=1), "Done.")
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="broken"):
        play(task, PROMPT, "Done.")
    play(task, PROMPT, call(k=1), "Done.")
    assert len(made) == 2


# --------------------------------------------------------------------------------------------------------------- skyrl


def gym(**methods: Any) -> SkyRlEnvironment:
    kind = type("Made", (Gym,), methods)
    return SkyRlEnvironment(Rows(), lambda extras: kind(extras=extras))


def test_a_skyrl_environment_is_stepped_and_closed() -> None:
    Gym.closed = 0
    score, shown = play(SkyRlEnvironment(Rows(), lambda extras: Gym(extras=extras)), PROMPT, "7", "6", "7")
    assert (score.reward, score.figures["steps"], Gym.closed) == (1.0, 3.0, 1)
    assert [said[0]["content"] for said in shown[1:]] == ["turn 1", "turn 2"]


def test_messages_that_init_adds_are_an_opening() -> None:
    opening = {"role": "user", "content": "Begin."}
    _, shown = play(gym(init=lambda self, prompt: ([*prompt, opening], {})), PROMPT, "7", "7", "7")
    assert shown[0] == [opening]


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ({"init": lambda self, prompt: ([{"role": "user", "content": "Other."}], {})}, ValueError, "init changed"),
        ({"step": lambda self, action: {"reward": "1", "done": True}}, TypeError, "must be a number; got '1'"),
        ({"step": lambda self, action: {"reward": 1, "done": False}}, ValueError, "no observations"),
        ({"step": lambda self, action: 1 / 0}, ZeroDivisionError, "division"),
    ],
)
def test_a_bad_skyrl_environment_fails_its_episode_and_is_closed(methods: Any, error: Any, message: str) -> None:
    task = gym(**methods)
    with pytest.raises(error, match=message):
        play(task, PROMPT, "7", "7", "7")


# ------------------------------------------------------------------------------------------------------------- OpenEnv


class SyncClient:
    """As the same client made synchronous."""

    open = 0

    def __init__(self) -> None:
        self.client = Client()

    def __enter__(self) -> SyncClient:
        type(self).open += 1
        return self

    def __exit__(self, *_: Any) -> None:
        type(self).open -= 1

    def reset(self, seed: int | None = None) -> Any:
        return asyncio.run(self.client.reset(seed))

    def step(self, action: Any) -> Any:
        return asyncio.run(self.client.step(action))


def test_an_openenv_session_is_stepped_and_closed() -> None:
    task = OpenEnvEnvironment(Rows(), Client, action=lambda text: f"<{text}>")
    prompt = Prompt(0, "rows", "?", metadata={"seed": 5})
    score, shown = play(task, prompt, "7", "7")
    assert (score.reward, list(shown), Client.open) == (2.0, ["seed 5", "turn 1"], 0)


def test_a_lost_connection_fails_the_episode_and_is_closed() -> None:
    class Lost(Client):
        async def step(self, action: Any) -> Any:
            raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError):
        play(OpenEnvEnvironment(Rows(), Lost), PROMPT, "7")
    assert Lost.open == 0


class Dispatching(Client):
    """As the client of OpenEnv 0.10: its methods are plain functions, for coroutines where a loop runs."""

    def reset(self, seed: int | None = None) -> Any:
        asyncio.get_running_loop()  # elsewhere it would open a second connection, and wait for it
        return super().reset(seed)

    def step(self, action: Any) -> Any:
        asyncio.get_running_loop()
        return super().step(action)


class Delegating:
    """As what `sync()` makes of it: it has every name of the other, and `with` alone."""

    def __init__(self) -> None:
        self.client = SyncClient()

    def __getattr__(self, name: str) -> Any:
        return getattr(Client if name == "__aenter__" else self.client, name)

    def __enter__(self) -> Any:
        return self.client.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.client.__exit__(*error)


@pytest.mark.parametrize("kind", [Dispatching, SyncClient, Delegating])
def test_every_kind_of_openenv_client_is_stepped_in_its_own_way(kind: Any) -> None:
    score, shown = play(OpenEnvEnvironment(Rows(), kind), PROMPT, "7", "6")
    assert (score.reward, list(shown)) == (1.0, ["seed None", "turn 1"])
    assert Client.open == SyncClient.open == 0


def test_an_openenv_episode_whose_last_step_has_no_reward_cannot_be_scored() -> None:
    """NaN has no place in JSON: the server sends null."""

    class Unscored(Client):
        async def step(self, action: Any) -> Any:
            result = await super().step(action)
            return SimpleNamespace(observation=result.observation, done=result.done, reward=None)

    with pytest.raises(ValueError, match="the last step has no reward, or NaN"):
        play(OpenEnvEnvironment(Rows(), Unscored), PROMPT, "7", "7")


def test_an_openenv_observation_without_a_text_says_all_but_its_reward() -> None:
    typed = SimpleNamespace(model_dump=lambda: {"left": 3, "reward": 0.5, "done": False, "metadata": {}})
    assert text_of(typed) == "{'left': 3}"


# ------------------------------------------------------------------------------------------------------------- hanging


def test_a_call_that_hangs_holds_up_its_episode_alone() -> None:
    stop = threading.Event()
    hanging = gym(step=lambda self, action: stop.wait(30))
    good = SkyRlEnvironment(Rows(), lambda extras: Gym(extras=extras))

    async def both() -> tuple[Any, Score]:
        async def limited() -> Any:
            return await asyncio.wait_for(hanging.play(PROMPT, Scripted("7")), 0.3)

        bad, fine = await asyncio.gather(limited(), good.play(PROMPT, Scripted("7", "7", "7")), return_exceptions=True)
        return bad, fine  # type: ignore[return-value]

    started = time.monotonic()
    bad, fine = asyncio.run(both())
    stop.set()
    assert isinstance(bad, TimeoutError)
    assert fine.reward == 1.5
    assert time.monotonic() - started < 20


def test_the_calls_of_an_episode_are_made_in_one_thread_and_in_order() -> None:
    async def calls() -> list[Any]:
        async with Side() as side:
            return [await side.call(lambda i=i: (i, threading.get_ident())) for i in range(5)]

    made = asyncio.run(calls())
    assert [i for i, _ in made] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in made}) == 1
    assert made[0][1] != threading.get_ident()
