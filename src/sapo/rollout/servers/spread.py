"""One batch drawn by several servers: a request for each sample, sent to the server with the fewest in flight.

A request is idempotent: its id and its noise are functions of (seed, prompt, sample), so that whoever draws it draws
the same noise. A request whose connection breaks, or whose server is lost, is sent again. A server is lost when its
process ends, it is silent twice when asked for its health, it lets a request wait beyond the limit, it fails three
times in a row, or it draws from other weights than were set.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx

from sapo.data.rollouts import FinishReason
from sapo.errors import EngineError, Interrupted
from sapo.rollout.servers.client import (
    HEALTH_SECONDS,
    JSON,
    UNLIMITED,
    ServerLost,
    ServerRefused,
    describe,
    limits,
    read_answer,
)
from sapo.rollout.servers.fleet import Fleet, Server

HEALTH_EVERY = 2.0
"""Seconds between two questions for a server's health while it draws."""
SILENCES = 2
FAILURES = 3
"""Failures in a row after which a server is lost."""
TRIES = 5
"""Failed answers to one request after which the run ends: the request itself may be what fails."""
WAIT_SECONDS = 0.1


class BadAnswer(Exception):  # noqa: N818
    """An answer that is no completion; the server may do better with the next."""


class BrokenRequest(Exception):  # noqa: N818
    """The connection broke in the middle of a request; whether the server lives is asked next."""


@dataclass
class Job:
    """A sample to be drawn, and what has been drawn of it."""

    body: JSON
    """Of the request, without `stream`."""
    most: int
    """Most tokens."""
    ends: Callable[[list[int]], bool] | None
    """Whether the last token completes a stop string; None where there are none to look for."""
    tries: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None

    def reset(self) -> None:
        """Forget what was drawn."""
        self.token_ids, self.logprobs, self.finish = [], [], None

    def take(self, choice: JSON, label: str, vocabulary: int) -> bool:
        """Append what a part of an answer has; return whether the sample has ended.

        Raises:
            BadAnswer: it is no part of a completion.
            ServerLost: it was drawn from other weights.
        """
        tokens, content = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
        if not isinstance(tokens, list) or not isinstance(content, list) or len(tokens) != len(content):
            raise BadAnswer("an answer without a log-probability of every token")
        for token, found in zip(tokens, content, strict=True):
            logprob = found.get("logprob") if isinstance(found, dict) and found.get("token_id") == token else None
            if type(token) is not int or not 0 <= token < vocabulary or not _is_logprob(logprob):
                raise BadAnswer(f"an answer with token {token!r} of log-probability {logprob!r}")
            self.token_ids.append(token)
            self.logprobs.append(float(cast(float, logprob)))
            if self.ends is not None and self.ends(self.token_ids):
                self.finish = "stop"
                return True
        reason = choice.get("finish_reason")
        if reason is None and len(self.token_ids) < self.most:
            return False
        _check_weights(choice.get("weight_versions"), label)
        if reason not in ("stop", "length") or not 0 < len(self.token_ids) <= self.most:
            raise BadAnswer(f"an answer of {len(self.token_ids)} tokens that ended by {reason!r}")
        self.finish = "stop" if reason == "stop" else "length"
        return True


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


def _check_weights(spans: Any, label: str) -> None:
    used = {span.get("version") for span in spans or []}
    if used - {label}:
        raise ServerLost(f"it draws from other weights than it was sent (label {sorted(map(str, used))[0]!r})")


class Spread:
    """Draws jobs over the servers of a fleet.

    Args:
        rows: most requests in flight at one server.
        vocabulary: tokens that the model has.
        seconds: most of one request.
    """

    def __init__(
        self,
        fleet: Fleet,
        jobs: Sequence[Job],
        *,
        rows: int,
        vocabulary: int,
        seconds: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self._fleet = fleet
        self._rows = rows
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._should_stop = should_stop
        self._waiting = deque(jobs)
        self._flying: dict[asyncio.Task[Any], tuple[Job, Server]] = {}
        self._failures_when_sent: dict[asyncio.Task[Any], int] = {}
        self._watches: dict[asyncio.Task[Any], Server] = {}
        self._http: dict[int, httpx.AsyncClient] = {}
        self._given_up: list[httpx.AsyncClient] = []

    def run(self) -> None:
        """Draw all jobs.

        Raises:
            Interrupted: when `should_stop` says so.
            EngineError: no server is left, or a request fails everywhere.
        """
        asyncio.run(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting or self._flying:
                if self._should_stop():
                    raise Interrupted
                for server in self._fleet.poll():
                    self._take_back(server)
                self._fleet.require()
                self._assign()
                tasks: list[asyncio.Task[Any]] = [*self._flying, *self._watches]
                if tasks:
                    done, _ = await asyncio.wait(tasks, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    self._settle(done)
                else:
                    await asyncio.sleep(WAIT_SECONDS)
        finally:
            await self._end()

    def _assign(self) -> None:
        """Send waiting requests to the servers with the fewest in flight."""
        load = {server.number: 0 for server in self._fleet.up}
        for _, server in self._flying.values():
            load[server.number] += 1
        while self._waiting and load and (least := min(load, key=lambda n: load[n])) is not None:
            if load[least] >= self._rows:
                return
            job, server = self._waiting.popleft(), self._fleet.servers[least]
            task = asyncio.ensure_future(self._draw(job, server))
            self._flying[task], self._failures_when_sent[task] = (job, server), server.failures
            load[least] += 1
            if server not in self._watches.values():
                self._watches[asyncio.ensure_future(self._watch(server))] = server

    def _settle(self, done: set[asyncio.Task[Any]]) -> None:
        """Take note of requests that have ended, and of servers that are silent."""
        for task in done:
            if task in self._watches:
                self._lose(self._watches.pop(task), task.result())
            elif task in self._flying:
                job, server = self._flying.pop(task)
                failures = self._failures_when_sent.pop(task)
                if (error := task.exception()) is not None:
                    self._answer(job, server, error, again=failures == server.failures)
                else:
                    server.failures = 0

    def _answer(self, job: Job, server: Server, error: BaseException, again: bool) -> None:
        """Have a request that failed drawn again.

        Args:
            again: it was sent after the server's last failure. Many that were in flight then are one failure.
        """
        job.reset()
        self._waiting.appendleft(job)
        if isinstance(error, ServerRefused):
            raise EngineError(f"{server.name} refused a request: {error}") from error
        if isinstance(error, ServerLost):
            self._lose(server, str(error))
            return
        if not isinstance(error, BadAnswer | BrokenRequest):
            raise error
        server.failures += again
        job.tries += isinstance(error, BadAnswer)
        if job.tries >= TRIES:
            raise EngineError(f"a request failed {TRIES} times, at last by {server.name}: {error}") from error
        if server.failures >= FAILURES:
            self._lose(server, f"it failed {FAILURES} times in a row: {error}")

    def _lose(self, server: Server, reason: str) -> None:
        if server.up:
            self._fleet.lose(server, reason)
            self._take_back(server)

    def _take_back(self, server: Server) -> None:
        """Have the requests of a lost server drawn by others."""
        for task in [t for t, s in self._watches.items() if s is server]:
            task.cancel()
            del self._watches[task]
        for task in [t for t, (_, s) in self._flying.items() if s is server]:
            job, _ = self._flying.pop(task)
            del self._failures_when_sent[task]
            task.cancel()
            self._waiting.appendleft(job)
        if server.number in self._http:
            self._given_up.append(self._http.pop(server.number))

    async def _draw(self, job: Job, server: Server) -> None:
        """Draw one sample.

        Raises:
            BadAnswer, BrokenRequest, ServerLost, ServerRefused: see there.
        """
        job.reset()
        try:
            async with asyncio.timeout(self._seconds):
                async for choice in self._parts(job, server):
                    if job.take(choice, self._fleet.label, self._vocabulary):
                        return
        except httpx.ConnectError as error:
            raise ServerLost(describe(error)) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ServerLost(f"a request was not answered within {self._seconds:g} s") from error
        except httpx.HTTPError as error:
            raise BrokenRequest(describe(error)) from error
        raise BadAnswer("an answer that ended too early")

    async def _parts(self, job: Job, server: Server) -> AsyncIterator[JSON]:
        """Yield the parts of an answer: one, or as they come where stop strings are looked for."""
        http, path = self._client(server), "/inference/v1/generate"
        if job.ends is None:
            answer = await http.post(path, json=job.body)
            yield _choice(_read(answer))
            return
        async with http.stream("POST", path, json={**job.body, "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                _read(answer)
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield _choice(_parsed(line.removeprefix("data: ")))

    async def _watch(self, server: Server) -> str:
        """Return why a server is lost, once it is silent."""
        silent = 0
        while silent < SILENCES:
            await asyncio.sleep(HEALTH_EVERY)
            try:
                answer = await self._client(server).get("/health", timeout=HEALTH_SECONDS)
                silent = 0 if answer.status_code == 200 else SILENCES
            except httpx.ConnectError:
                return "no connection"
            except httpx.HTTPError:
                silent += 1
        return f"it does not say that it lives ({HEALTH_SECONDS:g} s, {SILENCES} times)"

    def _client(self, server: Server) -> httpx.AsyncClient:
        if server.number not in self._http:
            self._http[server.number] = httpx.AsyncClient(
                base_url=server.client.address,
                headers=server.client.headers,
                timeout=limits(self._seconds),
                trust_env=False,
                limits=UNLIMITED,
            )
        return self._http[server.number]

    async def _end(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._flying, *self._watches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for http in [*self._http.values(), *self._given_up]:
            await http.aclose()


def _read(answer: httpx.Response) -> JSON:
    try:
        return read_answer("a request", answer.status_code, answer)
    except ServerLost as error:
        raise BadAnswer(str(error)) from error


def _parsed(text: str) -> JSON:
    try:
        found = json.loads(text)
    except ValueError:
        raise BadAnswer("a part that is no JSON") from None
    if not isinstance(found, dict):
        raise BadAnswer("a part that is no JSON object")
    return found


def _choice(answer: JSON) -> JSON:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("an answer without its one completion")
    return choices[0]
