"""Environments of OpenEnv: a client of a server, `reset` and `step` until done. The rewards of the steps are summed.

Every episode has a connection, and so a session of the server, of its own for as long as it lasts. The server must
allow as many sessions as a batch has episodes: prompts_per_step * samples_per_prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from sapo.data import Prompt, Score
from sapo.environments.base import Ask
from sapo.environments.side import Side
from sapo.environments.tools import shown
from sapo.environments.wrapping import Wrapped, real
from sapo.errors import TaskError
from sapo.utils.plugins import import_named


class OpenEnvEnvironment(Wrapped):
    """A task played by clients of an OpenEnv server.

    Args:
        task: source of the prompts; `metadata["seed"]` of a prompt, where it has one, goes to `reset`.
        connect: makes a client, which is an asynchronous context manager, or one of `with`.
        action: makes an action of a turn's text.
        show: makes text of an observation.
    """

    prefers_chat = True

    def __init__(
        self,
        task: Any,
        connect: Callable[[], Any],
        action: Callable[[str], Any] = str,
        show: Callable[[Any], str] | None = None,
    ) -> None:
        super().__init__(task)
        self.connect, self.action, self.show = connect, action, show or text_of

    @classmethod
    def named(
        cls, name: str, task: Any, url: str | None = None, action: str | None = None, show: str | None = None
    ) -> OpenEnvEnvironment:
        """Make one of `module:Client` and the address of a server.

        Args:
            name: the client's class.
            url: address of the server, as the client's base_url.
            action, show: functions as `module:function`.

        Raises:
            TaskError: one of them cannot be imported, or there is no address.
        """
        if ":" not in name or name.startswith(("http:", "https:", "ws:", "wss:")):
            raise TaskError(
                f"environment openenv:... must name the client's class as module:Class; got {name!r:.80}; write "
                "environment: openenv:echo_env:EchoEnv with url: http://127.0.0.1:8000"
            )
        if url is None:
            raise TaskError(f"environment openenv:{name} needs the address of its server; got none; write url: ...")
        client = import_named(name, what="environment", noun="class", error=TaskError)
        functions = {
            key: import_named(spec, what=key, noun="function", error=TaskError)
            for key, spec in (("action", action), ("show", show))
            if spec is not None
        }
        return cls(task, lambda: client(base_url=url), **functions)

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Step a session with the model's turns until it is done."""
        async with AsyncExitStack() as stack:
            side = await stack.enter_async_context(Side())
            client = await _entered(stack, await side.call(self.connect), side)
            seed = prompt.metadata.get("seed")
            result = await side.call(client.reset, **({} if seed is None else {"seed": seed}))
            total, turns = real(result.reward, "the reward of reset"), 0
            while not result.done:
                turn = await ask(self.show(result.observation))
                result = await side.call(client.step, self.action(turn.text))
                total, turns = total + real(result.reward, "the reward of a step"), turns + 1
            return Score(total, figures={"steps": float(turns)})


def text_of(observation: Any) -> str:
    """Return what an observation says: its `text`, its `message`, or all of it.

    >>> text_of("Higher."), text_of({"message": "Lower."})
    ('Higher.', 'Lower.')
    """
    for name in ("text", "message"):
        found = observation.get(name) if isinstance(observation, dict) else getattr(observation, name, None)
        if isinstance(found, str):
            return shown(found)
    return shown(observation)


async def _entered(stack: AsyncExitStack, client: Any, side: Side) -> Any:
    """Return a client within its context, which is closed with the episode."""
    if hasattr(client, "__aenter__"):
        return await stack.enter_async_context(client)
    if hasattr(client, "__enter__"):
        entered = await side.call(client.__enter__)
        stack.push_async_callback(side.call, client.__exit__, None, None, None)
        return entered
    if callable(closing := getattr(client, "close", None)):
        stack.push_async_callback(_closed, side, closing)
    return client


async def _closed(side: Side, closing: Callable[[], Any]) -> None:
    done = await side.call(closing)
    if inspect.isawaitable(done):
        await done
