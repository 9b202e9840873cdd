"""Environments of skyrl-gym: `init(prompt)`, `step(text)` until done, `close()`. Rewards of steps are summed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from sapo.data import Prompt, Score
from sapo.environments.base import Ask, Messages
from sapo.environments.side import Side
from sapo.environments.wrapping import Wrapped, messages_of, real, row_of
from sapo.errors import TaskError
from sapo.utils.plugins import import_named
from sapo.utils.text import first_line


class SkyRlEnvironment(Wrapped):
    """A task played by an environment of skyrl-gym.

    Args:
        task: source of the prompts; the columns of a row are the environment's `extras`.
        make: function of the extras that makes an environment.
    """

    prefers_chat = True

    def __init__(self, task: Any, make: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(task)
        self.make = make

    @classmethod
    def named(cls, name: str, task: Any, env_config: Mapping[str, Any] | None = None) -> SkyRlEnvironment:
        """Make one of a name that skyrl-gym has registered, or of `module:Class`.

        Raises:
            TaskError: it cannot be imported, or is not registered.
        """
        config = dict(env_config or {})
        if ":" in name:
            kind = import_named(name, what="environment", noun="class", error=TaskError)
            return cls(task, lambda extras: kind(env_config=config, extras=extras))
        try:
            gym: Any = importlib.import_module("skyrl_gym")
            registered = importlib.import_module("skyrl_gym.envs.registration").registry
        except ImportError as error:
            raise TaskError(
                f"environment skyrl:{name} needs skyrl-gym: {first_line(error)}; pip install skyrl-gym, or name a "
                "class of yours as skyrl:module:Class"
            ) from error
        if name not in registered:
            raise TaskError(f"skyrl-gym has the environments {', '.join(registered)}; got {name!r}")
        return cls(task, lambda extras: gym.make(name, env_config=config, extras=extras))

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Step an environment with the model's turns until it is done."""
        async with Side() as side:
            environment = await side.call(self.make, _extras(prompt))
            try:
                return await self._steps(environment, side, prompt, ask)
            finally:
                await side.call(environment.close)

    async def _steps(self, environment: Any, side: Side, prompt: Prompt, ask: Ask) -> Score:
        given = messages_of(prompt)
        begun = await side.call(environment.init, [dict(m) for m in given])
        said = _opening(given, begun[0] if isinstance(begun, tuple) else begun)
        total, turns = 0.0, 0
        while True:
            turn = await ask(said)
            out = await side.call(environment.step, turn.text)
            total, turns = total + real(_of(out, "reward"), "the reward of a step"), turns + 1
            if _of(out, "done"):
                return Score(total, figures={"steps": float(turns)})
            said = [dict(m) for m in _of(out, "observations") or ()]
            if not said:
                raise ValueError("step gave no observations and was not done; a turn must be answered")


def _extras(prompt: Prompt) -> dict[str, Any]:
    """Return a row as skyrl-gym's environments read it: the answer is the ground truth of `reward_spec`."""
    row = row_of(prompt)
    return {"reward_spec": {"method": "rule", "ground_truth": prompt.answer}, **row}


def _opening(given: list[dict[str, Any]], begun: Any) -> str | Messages:
    """Return what `init` adds to the prompt.

    Raises:
        ValueError: it changes the prompt, which has been encoded.
    """
    messages = [dict(m) for m in begun]
    if messages[: len(given)] != given:
        raise ValueError("init changed the prompt, which the model has read already; change the rows instead")
    return messages[len(given) :] or ""


def _of(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
