"""Play episodes in the players that a host forks.

An episode that is played elsewhere is a coroutine like any other, which tells the player what the model said and the
driver what the environment says. Nobody else reads from its player. A player that dies is started once more: the
episode is played again from its beginning, where the environment hears what the model has already said to it. It has to
say the same again, which what depends on its prompt and `ask.seed` alone does.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sapo.data import Prompt, Score
from sapo.environments.base import Answer, Ask, Messages, OutOfBudget, Turn
from sapo.environments.clock import off_the_clock
from sapo.tasks.episodes.line import NO_ANSWER, DiedError, Line, PlayError
from sapo.tasks.episodes.pool import Host
from sapo.tasks.workers.wire import score_from_json
from sapo.utils.text import name_error


@dataclass
class _Call:
    """What the environment has said once, and what it heard."""

    said: str | Messages
    max_tokens: int | None
    heard: tuple[Any, ...]


class Elsewhere:
    """An environment whose episodes are played in processes of their own.

    Args:
        host: forks them.
        seconds_per_reply: for the environment's tools to know; the driver has the clock.
    """

    def __init__(self, host: Host, seconds_per_reply: float) -> None:
        self._host, self._seconds = host, seconds_per_reply

    async def play(self, prompt: Prompt, ask: Ask) -> Score | Answer:
        """Play one episode, and once more where its player dies.

        Raises:
            OutOfBudget: the environment let it pass.
            PlayError: the environment failed.
        """
        past: list[_Call] = []
        try:
            return await self._once(prompt, ask, past)
        except DiedError as error:
            first = error
        try:
            return await self._once(prompt, ask, past)
        except DiedError as second:
            raise PlayError(
                f"its worker process died ({first}), and again when it was played anew ({second})"
            ) from None

    async def _once(self, prompt: Prompt, ask: Ask, past: list[_Call]) -> Score | Answer:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        line = Line(ours)
        try:
            with off_the_clock():  # until it begins: the host forks one player at a time
                try:
                    await self._host.admit(theirs)
                finally:
                    theirs.close()
                await self._host.await_begin(line, _pickle_beginning(prompt, ask.seed, self._seconds))
                await self._replay(line, past)
            return await _Dialogue(line, ask, past).hold()
        except asyncio.CancelledError:
            await line.leave()
            raise
        finally:
            ours.close()

    async def _replay(self, line: Line, past: Sequence[_Call]) -> None:
        """Let the environment hear again what it has heard, each reply within its time.

        Raises:
            DiedError: it died once more.
            PlayError: it hung, or said something else than before.
        """
        for call in past:
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await line.read()
                    while "pause" in answer:
                        answer = await line.read()
                    same = answer.get("ask") == call.said and answer.get("max_tokens") == call.max_tokens
                    if same:
                        await line.send(*call.heard)
            except TimeoutError:
                raise PlayError("its worker process died, and hung when it was played anew") from None
            if not same:
                raise PlayError(
                    "its worker process died, and it said something else when it was played anew: an environment may "
                    "depend on its prompt and on ask.seed alone"
                )


class _Dialogue:
    """The conversation of one player with the model."""

    def __init__(self, line: Line, ask: Ask, past: list[_Call]) -> None:
        self._line, self._ask, self._past = line, ask, past
        self._pause = contextlib.ExitStack()
        self._reading: asyncio.Future[dict[str, Any]]

    async def hold(self) -> Score | Answer:
        """Carry asks to the model and its turns back, until the environment ends the episode."""
        self._read_on()
        try:
            while True:
                said = await self._reading
                if "ask" in said:
                    self._pause.close()
                    self._read_on()
                    await self._turn(said["ask"], said.get("max_tokens"))
                    continue
                if "pause" in said:
                    self._pause.close()
                    if said["pause"]:
                        self._pause.enter_context(off_the_clock())
                    self._read_on()
                    continue
                return _result(said)
        finally:
            self._pause.close()
            self._reading.cancel()
            with contextlib.suppress(BaseException):
                await self._reading

    def _read_on(self) -> None:
        self._reading = asyncio.ensure_future(self._line.read())

    async def _turn(self, said: Any, max_tokens: Any) -> None:
        """Ask the model for a turn, unless the environment ends the episode first."""
        asking = asyncio.ensure_future(_heard(self._ask, said, max_tokens))
        try:
            while not asking.done():
                await asyncio.wait((asking, self._reading), return_when=asyncio.FIRST_COMPLETED)
                if asking.done():
                    break
                if isinstance(self._reading.exception(), DiedError):
                    await asyncio.wait((asking,))  # the turn is drawn all the same, and the environment will hear it
                elif self._reading.exception() is None and "pause" in self._reading.result():
                    self._read_on()  # the clock stands still anyway, and begins anew with the turn
                else:
                    return  # it has ended the episode by itself
            heard = asking.result()
        finally:
            asking.cancel()
        self._past.append(_Call(said, max_tokens, heard))
        await self._line.send(*heard)


async def _heard(ask: Ask, said: Any, max_tokens: Any) -> tuple[Any, ...]:
    try:
        turn: Turn = await ask(said, max_tokens=max_tokens)
    except OutOfBudget as error:
        return "spent", str(error)
    except (TypeError, ValueError, RuntimeError) as error:
        return "refused", type(error).__name__, str(error)
    return "turn", turn.text, turn.token_ids, turn.finish_reason, turn.calls


def _pickle_beginning(prompt: Prompt, seed: int, seconds: float) -> bytes:
    """Pickle what a player is told first, without the places and positions of pictures: only the model reads them.

    Raises:
        PlayError: its metadata cannot be sent.
    """
    try:
        return pickle.dumps((replace(prompt, picture_tokens=None), seed, seconds))
    except Exception as error:  # an object in the metadata may raise anything when it is pickled
        raise PlayError(f"the prompt cannot be sent to a worker: {name_error(error)}"[:400]) from error


def _result(said: dict[str, Any]) -> Score | Answer:
    try:
        if "score" in said:
            return score_from_json(said["score"])
        if "answer" in said:
            return Answer(said["answer"], {str(k): float(v) for k, v in dict(said["figures"]).items()})
        if "spent" in said:
            raise OutOfBudget(str(said["spent"]))
        raise PlayError(str(said["failed"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PlayError(NO_ANSWER) from error
