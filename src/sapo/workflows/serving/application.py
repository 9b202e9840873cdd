"""The routes of a served model: /v1/models, /v1/chat/completions, /v1/completions and /health."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from sapo.errors import UserError
from sapo.workflows.serving.answers import ChatAnswers, CompletionAnswers, usage
from sapo.workflows.serving.refusals import ApiError
from sapo.workflows.serving.requests import ChatRequest, CompletionRequest, parse
from sapo.workflows.serving.served import Begun, Order, Piece, ServedModel, TooLongError
from sapo.workflows.serving.worker import Done, Failed, Stopping, Worker

MOST_BYTES = 8 * 2**20
"""Bytes of a request's body."""
CLOSED = 499
"""The status of an answer that nobody waits for any more."""

log = logging.getLogger(__name__)


def refusal(status: int, message: str) -> Response:
    """Return an error in the protocol's form."""
    kinds = {401: ("authentication_error", "invalid_api_key"), 403: ("permission_error", None)}
    kind, code = kinds.get(status, (None, None))
    return _response(ApiError(status, message, kind=kind, code=code))


def application(served: ServedModel, worker: Worker, on_answer: Callable[[], None] = lambda: None) -> Starlette:
    """Make the application of a model.

    Args:
        worker: does all that touches the model.
        on_answer: called for every request that is drawn for.
    """
    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "sapo"}
    card |= {"max_model_len": served.policy.max_length}

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != served.name:
            message = f"there is no model {name!r} here; the one served is {served.name!r}"
            raise ApiError(404, message, code="model_not_found")
        return _json(card)

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request), served.name)
        return await answer(request, asked, ChatAnswers(served.name, asked.wants_logprobs, asked.offered))

    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request), served.name)
        return await answer(request, asked, CompletionAnswers(served.name, asked.wants_logprobs, asked.likeliest))

    async def answer(
        request: Request, asked: ChatRequest | CompletionRequest, answers: ChatAnswers | CompletionAnswers
    ) -> Response:
        order = asked.order()
        if order.top_logprobs and not served.shows_likeliest:
            message = "this engine knows the log-probability of the drawn token alone; leave top_logprobs out"
            raise ApiError(400, message, param="top_logprobs", code="unsupported_parameter")
        on_answer()
        events = _events(worker, served, order)
        if asked.stream:
            return await _streamed(events, asked, answers)
        gathering = asyncio.create_task(_whole(events, answers))
        leaving = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({gathering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return _json(gathering.result()) if gathering.done() else Response(status_code=CLOSED)
        finally:
            leaving.cancel()
            gathering.cancel()

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/health", health),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _own_fault},
    )


async def _body(request: Request) -> bytes:
    """Read a body.

    Raises:
        ApiError: it is no JSON by its type, or too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page elsewhere in the browser may send other types to this machine without being asked.
        raise ApiError(415, f"Content-Type must be application/json; got {kind!r}")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the body must be at most {MOST_BYTES} bytes")
    return body


async def _events(worker: Worker, served: ServedModel, order: Order) -> AsyncIterator[Any]:
    """Yield what an order draws; leaving it ends the draws.

    Raises:
        ApiError: the order is refused.
    """
    told: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(value: Any) -> None:
        loop.call_soon_threadsafe(told.put_nowait, value)

    try:
        job = worker.submit(lambda: served.draw(order), tell)
    except Stopping as error:
        raise _stopping() from error
    if job is None:
        raise ApiError(429, "too many requests wait; try again later", kind="rate_limit_error", code="queue_full")
    try:
        while not isinstance(value := await told.get(), Done):
            if isinstance(value, Failed):
                raise _error_of(value.error) from value.error
            yield value
    finally:
        job.cancel()


def _error_of(error: Exception) -> ApiError:
    if isinstance(error, Stopping):
        return _stopping()
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    log.error("a completion failed", exc_info=error)
    return ApiError(500, f"the completion failed: {type(error).__name__}; the server's log has more")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping")


async def _whole(events: AsyncIterator[Any], answers: ChatAnswers | CompletionAnswers) -> dict[str, Any]:
    choices: dict[int, list[Piece]] = {}
    prompt_tokens = drawn = 0
    async with aclosing(events):  # type: ignore[type-var]
        async for value in events:
            if isinstance(value, Begun):
                prompt_tokens = value.prompt_tokens
                continue
            for piece in value:
                choices.setdefault(piece.choice, []).append(piece)
                drawn += piece.drawn
    return answers.whole([choices[number] for number in sorted(choices)], usage(prompt_tokens, drawn))


async def _streamed(
    events: AsyncIterator[Any], asked: ChatRequest | CompletionRequest, answers: ChatAnswers | CompletionAnswers
) -> Response:
    """Begin a stream once its prompts are accepted, so that a refusal has a status of its own."""
    begun = await anext(events)
    assert isinstance(begun, Begun)

    async def lines() -> AsyncIterator[str]:
        drawn = 0
        async with aclosing(events):  # type: ignore[type-var]
            try:
                for event in answers.opening(asked.n or 1):
                    yield _line(event)
                async for pieces in events:
                    for piece in pieces:
                        drawn += piece.drawn
                        if piece.text or piece.finish or (asked.wants_logprobs and piece.tokens):
                            event = answers.event(piece)
                            if _says(event["choices"][0]):
                                yield _line(event)
                if asked.sends_usage:
                    yield _line(answers.last(usage(begun.prompt_tokens, drawn)))
                yield "data: [DONE]\n\n"
            except ApiError as error:  # the status has been sent
                yield _line(error.body)

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _says(choice: Mapping[str, Any]) -> bool:
    """Tell whether a choice of an event has news: text that may become a call is held back."""
    return "delta" not in choice or bool(choice["delta"] or choice["finish_reason"] or choice["logprobs"])


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: dict[str, Any], status: int = 200) -> Response:
    # In ASCII: half of a surrogate pair, which a request may hold and an error quotes, has no UTF-8.
    return Response(json.dumps(value), status, media_type="application/json")


def _response(error: ApiError) -> Response:
    return _json(error.body, error.status)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "/v1/models, /v1/chat/completions, /v1/completions"
    words = {404: f"there is nothing at {request.url.path}; {known}", 405: f"{request.method} is not taken here"}
    return _response(ApiError(error.status_code, words.get(error.status_code, error.detail)))


async def _own_fault(request: Request, error: Exception) -> Response:
    return _response(ApiError(500, f"the server failed: {type(error).__name__}; its log has more"))
