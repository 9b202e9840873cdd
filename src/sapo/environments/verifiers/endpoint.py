"""A loopback endpoint at which environments of other processes let the model take its turns, ids in and ids out.

It speaks vLLM's `POST /inference/v1/generate` and `GET /v1/models`, on 127.0.0.1 at a port that is free, to whoever has
the run's token. It draws nothing by itself: a request waits in the episode that it belongs to, as any `ask` does, and
the driver draws those of all episodes together. So nothing is drawn while weights change, and the noise of a turn is
that of its prompt, sample and own tokens, whatever the request says.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sapo.environments.base import OutOfBudget, TokenAsk, Turn

MAX_BODY = 16 * 2**20
"""Bytes of the largest request."""

RETRY_AFTER = 5
"""Seconds after which whoever was told that the endpoint shuts may look for another."""

MODEL = "policy"
"""Name of the model."""

_TOO_LONG = "this model's maximum context length is reached: {}"  # the words by which vLLM's clients know it


class RefusedError(Exception):
    """A request that is not answered with a turn.

    Args:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def response(self) -> JSONResponse:
        """Return the answer in the form of OpenAI's errors."""
        kind = "BadRequestError" if self.status == 400 else "Error"
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status == 503 else None
        error = {"message": str(self), "type": kind, "code": self.status}
        return JSONResponse({"error": error}, self.status, headers)


@dataclass(frozen=True)
class Order:
    """What a request asks for.

    >>> Order.of({"token_ids": [1, 5], "sampling_params": {"seed": 7, "max_tokens": 8}})
    Order(seat=7, token_ids=(1, 5), max_tokens=8)
    """

    seat: int
    """Which episode asks: the request's seed, which is free, since the run's own noise is drawn with."""
    token_ids: tuple[int, ...]
    max_tokens: int | None

    @classmethod
    def of(cls, body: Any) -> Order:
        """Read a body.

        Raises:
            RefusedError: it is none.
        """
        params = body.get("sampling_params") if isinstance(body, dict) else None
        ids = body.get("token_ids") if isinstance(body, dict) else None
        if not isinstance(params, dict) or not (isinstance(ids, list) and ids and all(type(i) is int for i in ids)):
            raise RefusedError(400, "a request must have token_ids, a list of ids, and sampling_params")
        seat, limit = params.get("seed"), params.get("max_tokens")
        if type(seat) is not int:
            raise RefusedError(400, "sampling_params.seed must be the number that the episode was given")
        if limit is not None and not (type(limit) is int and limit >= 1):
            raise RefusedError(400, f"sampling_params.max_tokens must be 1 or more; got {limit!r:.40}")
        if params.get("n", 1) != 1:
            raise RefusedError(400, "one completion is drawn at a time; leave sampling_params.n at 1")
        return cls(seat, tuple(ids), limit)


@dataclass
class _Seat:
    """Where the turns of one episode are asked for."""

    loop: asyncio.AbstractEventLoop
    ask: TokenAsk
    session: str | None = None
    """The trace that its turns belong to, as the first request names it."""
    open: asyncio.Future[Turn] | None = None
    """The turn that is being waited for."""
    request: Request | None = None
    """Who waits for it."""
    order: Order | None = None
    """What was asked for last."""
    lost: Turn | None = None
    """The answer to it, where nobody was there to take it."""


@dataclass
class TokenEndpoint:
    """The endpoint of a process. `start` it, take a `seat` for each episode, and `close` it.

    >>> endpoint = TokenEndpoint()
    >>> endpoint.url
    ''
    """

    max_length: int | None = None
    """Longest sequence, for clients to know."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    """Every request must bear it."""
    url: str = ""
    """Address, once it has been started, without a path."""
    _seats: dict[int, _Seat] = field(default_factory=dict, repr=False)
    _closing: bool = False
    _server: Any = field(default=None, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        """Answer requests from now on, in a thread of its own."""
        taken = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        routes = [
            Route("/inference/v1/generate", self._generate, methods=["POST"]),
            Route("/v1/inference/v1/generate", self._generate, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=600,  # the time of an update is no reason to hang up
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._server.capture_signals = _no_signals
        self._thread = threading.Thread(target=self._run, args=(taken,), name="sapo-endpoint", daemon=True)
        self._thread.start()

    def _run(self, taken: socket.socket) -> None:
        with taken:
            asyncio.run(self._server.serve(sockets=[taken]))

    def close(self) -> None:
        """Answer 503 to those who wait and to all who come, and end."""
        self._closing = True
        for seat in list(self._seats.values()):
            _withdraw(seat)
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5)

    @contextmanager
    def seat(self, ask: TokenAsk) -> Iterator[int]:
        """Let requests with a number, which is yielded, be turns of the episode that is played in this loop.

        Where the episode ends, whoever still waits for a turn is told so.
        """
        number = secrets.randbelow(2**53)
        seat = self._seats[number] = _Seat(asyncio.get_running_loop(), ask)
        try:
            yield number
        finally:
            del self._seats[number]
            _withdraw(seat)

    async def _models(self, request: Request) -> Response:
        try:
            self._check(request)
        except RefusedError as refused:
            return refused.response()
        model = {"id": MODEL, "object": "model", "max_model_len": self.max_length}
        return JSONResponse({"object": "list", "data": [model]})

    async def _generate(self, request: Request) -> Response:
        try:
            self._check(request)
            order = Order.of(await _body(request))
            seat = self._seats.get(order.seat)
            if seat is None:
                raise RefusedError(410, "the episode has ended, or its seed is not the one that it was given")
            turn = await self._turn(seat, order, request)
        except RefusedError as refused:
            return refused.response()
        return JSONResponse(_answer(request, turn))

    def _check(self, request: Request) -> None:
        """Refuse those who may not ask.

        Raises:
            RefusedError: the token is missing or wrong, or the endpoint shuts.
        """
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise RefusedError(401, "the token of the run is missing or wrong")
        if self._closing:
            raise RefusedError(503, "the endpoint shuts")

    async def _turn(self, seat: _Seat, order: Order, request: Request) -> Turn:
        """Wait for a turn. Whoever asks again for one that nobody was there to take, gets that one.

        Raises:
            RefusedError: there is none, or another is being waited for.
        """
        session = request.headers.get("x-session-id", "")
        if seat.session not in (None, session):
            raise RefusedError(400, "one agent's turns make an episode, in one trace; got those of another")
        seat.session, again = session, order == seat.order
        if seat.open is not None:
            if not again or (seat.request is not None and not await seat.request.is_disconnected()):
                raise RefusedError(409, "one turn of an episode is drawn at a time; wait for the one that is open")
        elif again and seat.lost is not None:
            turn, seat.lost = seat.lost, None
            return turn
        else:
            asked = asyncio.run_coroutine_threadsafe(_asked(seat.ask, order), seat.loop)
            seat.order, seat.lost, seat.open = order, None, asyncio.wrap_future(asked)
        seat.request = request
        turn = await self._drawn(seat)
        if await request.is_disconnected() and seat.request is request:
            seat.lost = turn
        return turn

    async def _drawn(self, seat: _Seat) -> Turn:
        assert seat.open is not None, "a turn is waited for"
        opened = seat.open
        try:
            return await asyncio.shield(opened)
        except OutOfBudget as error:
            raise RefusedError(400, _TOO_LONG.format(error)) from error
        except (asyncio.CancelledError, RuntimeError) as error:
            if self._closing:
                raise RefusedError(503, "the endpoint shuts") from error
            raise RefusedError(410, f"the episode has ended {error}".strip()) from error
        except (TypeError, ValueError) as error:
            raise RefusedError(400, str(error)) from error
        finally:
            if seat.open is opened:
                seat.open = None


async def _asked(ask: TokenAsk, order: Order) -> Turn:
    return await ask.go_on(order.token_ids, max_tokens=order.max_tokens)


def _withdraw(seat: _Seat) -> None:
    """Let whoever waits at a seat wait no longer."""
    opened = seat.open
    if opened is not None:
        with suppress(RuntimeError):  # its loop has ended
            opened.get_loop().call_soon_threadsafe(opened.cancel)


async def _body(request: Request) -> Any:
    """Return what a request brings.

    Raises:
        RefusedError: it is too large, or no JSON.
    """
    too_large = RefusedError(413, f"a request must have at most {MAX_BODY} bytes")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_large
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"a request must be JSON: {str(error)[:80]}") from error


def _answer(request: Request, turn: Turn) -> dict[str, Any]:
    """Return a turn as vLLM's endpoint gives it."""
    pairs: Sequence[tuple[int, float]] = list(zip(turn.token_ids, turn.logprobs, strict=True))
    content = [{"token": f"token_id:{token}", "logprob": logprob, "top_logprobs": []} for token, logprob in pairs]
    choice = {
        "index": 0,
        "token_ids": list(turn.token_ids),
        "finish_reason": turn.finish_reason,
        "logprobs": {"content": content},
    }
    return {"request_id": request.headers.get("x-request-id", secrets.token_hex(8)), "choices": [choice]}


@contextmanager
def _no_signals() -> Iterator[None]:
    """Leave the signals of the process to the run."""
    yield
