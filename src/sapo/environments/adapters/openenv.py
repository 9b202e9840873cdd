"""Environments of OpenEnv: a client of a server, `reset` and `step` until done. The rewards of the steps are summed.

Every episode has a connection, and so a session of the server, of its own for as long as it lasts. The server must
allow as many sessions as a batch has episodes: prompts_per_step * samples_per_prompt.

The last step must have a reward. OpenEnv's server sends a NaN as null, which is what a step without a reward has too:
taken for 0, a reward that went wrong would be trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
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
        """Step a session with the model's turns until it is done.

        Raises:
            ValueError: the last step has no reward.
        """
        async with AsyncExitStack() as stack:
            side = await stack.enter_async_context(Side())
            client, call = await _entered(stack, await side.call(self.connect), side)
            seed = prompt.metadata.get("seed")
            result = await call(client.reset, **({} if seed is None else {"seed": seed}))
            total, turns = real(result.reward, "the reward of reset"), 0
            while not result.done:
                turn = await ask(self.show(result.observation))
                result = await call(client.step, self.action(turn.text))
                total, turns = total + real(result.reward, "the reward of a step"), turns + 1
            if result.reward is None:
                raise ValueError(
                    "the last step has no reward, or NaN, which comes as none; give 0.0 where that is meant"
                )
            return Score(total, figures={"steps": float(turns)})


_NOT_SAID = ("done", "reward", "metadata")
"""Fields of every observation of OpenEnv that are not for the model."""

_Call = Callable[..., Awaitable[Any]]


def text_of(observation: Any) -> str:
    """Return what an observation says: its `text`, its `message`, or all of it but its reward.

    >>> text_of("Higher."), text_of({"message": "Lower."}), text_of({"left": 3, "reward": 0.5})
    ('Higher.', 'Lower.', "{'left': 3}")
    """
    fields = observation.model_dump() if hasattr(observation, "model_dump") else observation
    for name in ("text", "message"):
        found = fields.get(name) if isinstance(fields, dict) else getattr(fields, name, None)
        if isinstance(found, str):
            return shown(found)
    return shown({k: v for k, v in fields.items() if k not in _NOT_SAID} if isinstance(fields, dict) else fields)


async def _entered(stack: AsyncExitStack, client: Any, side: Side) -> tuple[Any, _Call]:
    """Return a client within its context, which is closed with the episode, and how its methods are called.

    The methods of OpenEnv's asynchronous client are plain functions that look for a running loop: with one they return
    an awaitable, elsewhere they wait for the answer, with a second connection. So they are called in the loop. Its
    synchronous client answers for every name that the other has: only its type tells what it is.
    """
    kind = type(client)
    if hasattr(kind, "__aenter__"):
        return await stack.enter_async_context(client), _here
    if hasattr(kind, "__enter__"):
        entered = await side.call(client.__enter__)
        stack.push_async_callback(side.call, client.__exit__, None, None, None)
        return entered, side.call
    if callable(closing := getattr(client, "close", None)):
        stack.push_async_callback(_closed, side, closing)
    return client, side.call


async def _here(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    done = function(*args, **options)
    return await done if inspect.isawaitable(done) else done


async def _closed(side: Side, closing: Callable[[], Any]) -> None:
    done = await side.call(closing)
    if inspect.isawaitable(done):
        await done
