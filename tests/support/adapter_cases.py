"""Environments in the forms of TRL, skyrl-gym and OpenEnv, as stand-ins written after their documentation."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from sapo.data import Prompt, Score

PROMPT = Prompt(0, "rows", "Reach 7.", answer="7", metadata={"start": 3, "secret": "x"})


class Rows:
    """A source of one prompt."""

    name = "rows"

    def train_prompt(self, index: int) -> Prompt:
        return PROMPT

    def held_out(self, count: int) -> list[Prompt]:
        return [PROMPT]

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(float(text == prompt.answer))


class Counter:
    """As in TRL's docs: reset(**row), public methods are tools, get_reward."""

    def reset(self, start: int, **row: Any) -> str:
        self.row = row
        self.n = start
        return f"You have {start}."

    def add(self, k: int) -> int:
        """Add to the number.

        Args:
            k: how much.
        """
        if k > 100:
            raise RuntimeError("too much")
        self.n += k
        return self.n

    def get_reward(self) -> float:
        return float(self.n == 7)

    @property
    def unready(self) -> int:
        raise AssertionError("a property is no tool and must not be looked at")

    def _hidden(self) -> None:
        raise AssertionError("not a tool")


class Gym:
    """As skyrl-gym's BaseTextEnv."""

    closed = 0

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        self.config, self.extras, self.turns = env_config, extras, 0

    def init(self, prompt: Any) -> tuple[Any, dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        self.turns += 1
        done = self.turns == 3
        truth = self.extras["reward_spec"]["ground_truth"]
        said = [] if done else [{"role": "user", "content": f"turn {self.turns}"}]
        return {"observations": said, "reward": 0.5 * (action == truth), "done": done, "metadata": {}}

    def close(self) -> None:
        type(self).closed += 1


class Client:
    """As an OpenEnv client: an asynchronous context with reset and step."""

    open = 0

    def __init__(self, base_url: str = "") -> None:
        self.base_url = base_url

    async def __aenter__(self) -> Client:
        type(self).open += 1
        return self

    async def __aexit__(self, *_: Any) -> None:
        type(self).open -= 1

    async def reset(self, seed: int | None = None) -> Any:
        self.turns, self.seed = 0, seed
        return SimpleNamespace(observation=SimpleNamespace(message=f"seed {seed}"), reward=None, done=False)

    async def step(self, action: Any) -> Any:
        await asyncio.sleep(0)
        self.turns += 1
        done, said = self.turns == 2, {"text": f"turn {self.turns}"}
        return SimpleNamespace(observation=said, reward=float("7" in action), done=done)
