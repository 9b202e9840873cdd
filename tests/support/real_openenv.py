"""An environment for OpenEnv: its server, run as `python -m support.real_openenv PORT`, and its client."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from openenv.core import EnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_server import Action, Environment, Observation, State, create_app

SESSIONS = 16
"""Sessions that the server allows at once."""


class Say(Action):
    """What the model said."""

    said: str


class Heard(Observation):
    """What it is told."""

    told: str


class Lengths(Environment):
    """Two turns; a turn earns the share of digits in it. A seed of 90 and more is a fault, in the second step."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.turns = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Heard:
        self.seed, self.turns = seed or 0, 0
        return Heard(told=f"seed {seed}")

    def step(self, action: Say, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        self.turns += 1
        done = self.turns == 2
        if done and self.seed in FAULTS:
            return FAULTS[self.seed]()
        share = sum(map(str.isdigit, action.said)) / max(len(action.said), 1)
        return Heard(told=f"turn {self.turns}", reward=share, done=done)

    @property
    def state(self) -> State:
        return State(step_count=self.turns)


def _nan() -> Heard:
    return Heard(told="", reward=float("nan"), done=True)


def _raises() -> Heard:
    raise KeyError("board")


def _hangs() -> Heard:
    time.sleep(20)
    return Heard(told="", reward=1.0, done=True)


def _ends_its_session() -> Heard:
    raise asyncio.CancelledError


def _crashes() -> Heard:
    os._exit(3)


NAN, RAISES, HANGS, ENDS_ITS_SESSION, CRASHES = range(90, 95)
FAULTS = {NAN: _nan, RAISES: _raises, HANGS: _hangs, ENDS_ITS_SESSION: _ends_its_session, CRASHES: _crashes}


class LengthsClient(EnvClient[Say, Heard, State]):
    """As `openenv init` writes a client."""

    def _step_payload(self, action: Say) -> dict[str, Any]:
        return {"said": action.said}

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[Heard]:
        heard = Heard(told=payload["observation"]["told"], done=payload["done"], reward=payload["reward"])
        return StepResult(observation=heard, reward=payload["reward"], done=payload["done"])

    def _parse_state(self, payload: dict[str, Any]) -> State:
        return State(**payload)


def to_action(text: str) -> Say:
    return Say(said=text)


def to_json(text: str) -> dict[str, Any]:
    """For the client without types."""
    return {"said": text}


def told(observation: Heard) -> str:
    return observation.told


def synchronous(base_url: str) -> Any:
    """Make the client that OpenEnv has for code without coroutines."""
    return LengthsClient(base_url=base_url).sync()


def main(port: int) -> None:
    import uvicorn

    app = create_app(Lengths, Say, Heard, env_name="lengths", max_concurrent_envs=SESSIONS)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))
