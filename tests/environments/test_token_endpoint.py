"""The loopback endpoint: whoever has the token is given turns of one episode, one at a time, and nobody else is."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from sapo.environments import OutOfBudget, Turn
from sapo.environments.verifiers.endpoint import MAX_BODY, MODEL, TokenEndpoint

CLIENT = httpx.Client(timeout=20, trust_env=False, verify=False)


class Model:
    """An `ask` that answers each history with its last id, once it may."""

    seed = 0

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.asked: list[tuple[Sequence[int], int | None]] = []
        self.may = asyncio.Event()
        self.may.set()

    async def __call__(self, observation: Any = "", *, max_tokens: int | None = None) -> Turn:
        raise AssertionError("the endpoint asks with ids")

    async def go_on(self, history: Sequence[int], *, max_tokens: int | None = None) -> Turn:
        self.asked.append((history, max_tokens))
        await self.may.wait()
        if self.fails is not None:
            raise self.fails
        return Turn("7", (history[-1], 1), "stop", logprobs=(-0.5, -0.25))


class Episodes:
    """A loop in a thread, as the driver's, in which seats are taken."""

    def __init__(self, endpoint: TokenEndpoint) -> None:
        self.endpoint = endpoint
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.ends: list[tuple[asyncio.Event, Future[None]]] = []

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def begin(self, model: Model) -> int:
        number: Future[int] = Future()
        ended = self.do(asyncio.Event)

        async def play() -> None:
            with self.endpoint.seat(model) as seat:
                number.set_result(seat)
                await ended.wait()

        self.ends.append((ended, asyncio.run_coroutine_threadsafe(play(), self.loop)))
        return number.result(10)

    def end(self) -> None:
        for ended, played in self.ends:
            self.do(ended.set)
            played.result(10)
        self.ends.clear()


@pytest.fixture(scope="module")
def started() -> Iterator[Episodes]:
    endpoint = TokenEndpoint(max_length=64)
    endpoint.start()
    episodes = Episodes(endpoint)
    yield episodes
    endpoint.close()
    episodes.loop.call_soon_threadsafe(episodes.loop.stop)


@pytest.fixture
def episodes(started: Episodes) -> Iterator[Episodes]:
    yield started
    started.end()


def body(seat: int, ids: Sequence[int] = (4, 9), **params: Any) -> dict[str, Any]:
    return {"model": MODEL, "token_ids": list(ids), "sampling_params": {"seed": seat, "logprobs": 1, **params}}


def post(episodes: Episodes, content: Any, session: str = "trace", **headers: str) -> httpx.Response:
    given = {"Authorization": f"Bearer {episodes.endpoint.token}", "X-Session-ID": session, **headers}
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    url = f"{episodes.endpoint.url}/inference/v1/generate"
    return CLIENT.post(url, content=raw, headers=given)


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.01)


def test_a_turn_comes_as_vllm_gives_it(episodes: Episodes) -> None:
    model = Model()
    seat = episodes.begin(model)
    answer = post(episodes, body(seat, max_tokens=5)).json()
    assert model.asked == [((4, 9), 5)]
    (choice,) = answer["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == ([9, 1], "stop")
    assert [(c["token"], c["logprob"]) for c in choice["logprobs"]["content"]] == [
        ("token_id:9", -0.5),
        ("token_id:1", -0.25),
    ]


def test_the_model_says_how_long_it_is(episodes: Episodes) -> None:
    headers = {"Authorization": f"Bearer {episodes.endpoint.token}"}
    (model,) = CLIENT.get(f"{episodes.endpoint.url}/v1/models", headers=headers).json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 64)


def test_episodes_are_served_side_by_side(episodes: Episodes) -> None:
    models = [Model() for _ in range(24)]
    seats = [episodes.begin(model) for model in models]
    for model in models:
        episodes.do(model.may.clear)
    with ThreadPoolExecutor(len(seats)) as pool:
        answers = [pool.submit(post, episodes, body(seat, (5, i))) for i, seat in enumerate(seats)]
        wait_for(lambda: all(model.asked for model in models))  # all of them wait in their episodes together
        for model in models:
            episodes.do(model.may.set)
        drawn = [answer.result().json()["choices"][0]["token_ids"] for answer in answers]
    assert drawn == [[i, 1] for i in range(24)]


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong", "Basic abc", "Bearer \u00e9"])
def test_nothing_is_drawn_without_the_token(episodes: Episodes, token: str) -> None:
    model = Model()
    seat = episodes.begin(model)
    headers = [(b"Authorization", token.encode("latin-1"))]
    for method, path in (("POST", "/inference/v1/generate"), ("GET", "/v1/models")):
        answer = CLIENT.request(method, episodes.endpoint.url + path, headers=headers, json=body(seat))
        assert answer.status_code == 401
    assert model.asked == []
    assert episodes.endpoint.token not in repr(episodes.endpoint)


@pytest.mark.parametrize("says", [True, False])
def test_an_oversized_body_is_refused(episodes: Episodes, says: bool) -> None:
    model = Model()
    episodes.begin(model)
    port = int(episodes.endpoint.url.rpartition(":")[2])
    head = f"POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {episodes.endpoint.token}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as channel:
        if says:
            channel.sendall(f"{head}Content-Length: {MAX_BODY + 1}\r\n\r\n".encode())
        else:
            channel.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            chunk = f"{2**20:x}\r\n".encode() + b" " * 2**20 + b"\r\n"
            try:
                for _ in range(MAX_BODY // 2**20 + 1):
                    channel.sendall(chunk)
            except OSError:  # it has refused already
                pass
        assert channel.recv(64).startswith(b"HTTP/1.1 413")
    assert model.asked == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "must be JSON"),
        (b"[]", "must have token_ids"),
        ({"token_ids": []}, "must have token_ids"),
        ({"token_ids": [1.5]}, "must have token_ids"),
        ({"token_ids": [True]}, "must have token_ids"),
        ({"sampling_params": 3}, "must have token_ids"),
        ({"sampling_params": {}}, "must be the number"),
        ({"sampling_params": {"seed": 0, "max_tokens": 0}}, "must be 1 or more"),
        ({"sampling_params": {"seed": 0, "n": 2}}, "one completion"),
    ],
)
def test_a_wrong_request_is_refused(episodes: Episodes, change: Any, message: str) -> None:
    answer = post(episodes, change if isinstance(change, bytes) else {**body(0), **change})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_request_of_no_episode_is_refused(episodes: Episodes) -> None:
    assert post(episodes, body(5)).status_code == 410
    seat = episodes.begin(Model())
    episodes.end()
    assert post(episodes, body(seat)).status_code == 410


def test_another_trace_of_an_episode_is_refused(episodes: Episodes) -> None:
    seat = episodes.begin(Model())
    assert post(episodes, body(seat)).status_code == 200
    answer = post(episodes, body(seat), session="other")
    assert (answer.status_code, "one agent" in answer.text) == (400, True)


def test_one_turn_of_an_episode_is_open_at_a_time(episodes: Episodes) -> None:
    model = Model()
    seat = episodes.begin(model)
    episodes.do(model.may.clear)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, episodes, body(seat))
        wait_for(lambda: bool(model.asked))
        assert post(episodes, body(seat, (1, 2))).status_code == 409
        assert post(episodes, body(seat)).status_code == 409
        episodes.do(model.may.set)
        assert first.result().status_code == 200
    assert post(episodes, body(seat, (1, 2))).status_code == 200
    assert len(model.asked) == 2


def test_a_request_waits_while_weights_change(episodes: Episodes) -> None:
    model = Model()
    seat = episodes.begin(model)
    updating, updated = threading.Event(), threading.Event()

    def update() -> None:  # in the driver's loop, which draws and updates
        updating.set()
        updated.wait(20)

    episodes.loop.call_soon_threadsafe(update)
    updating.wait(20)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, episodes, body(seat))
        time.sleep(0.1)
        assert not answer.done()
        assert model.asked == []
        updated.set()
        assert answer.result().status_code == 200


@pytest.mark.parametrize("drawn_first", [True, False])
def test_who_asks_again_after_it_vanished_gets_the_turn_that_was_drawn(episodes: Episodes, drawn_first: bool) -> None:
    model = Model()
    seat = episodes.begin(model)
    episodes.do(model.may.clear)
    port = int(episodes.endpoint.url.rpartition(":")[2])
    raw = json.dumps(body(seat)).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as channel:
        channel.sendall(
            f"POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {episodes.endpoint.token}\r\n"
            f"X-Session-ID: trace\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            + raw
        )
        wait_for(lambda: bool(model.asked))
    time.sleep(0.1)  # until the server has seen the end of the connection
    if drawn_first:
        episodes.do(model.may.set)
        wait_for(lambda: episodes.endpoint._seats[seat].lost is not None)
        answer = post(episodes, body(seat))
    else:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, episodes, body(seat))
            time.sleep(0.2)
            episodes.do(model.may.set)
            answer = waiting.result()
    assert answer.json()["choices"][0]["token_ids"] == [9, 1]
    assert len(model.asked) == 1
    assert post(episodes, body(seat)).status_code == 200
    assert len(model.asked) == 2  # what was taken is drawn anew


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OutOfBudget("no tokens were left of 16"), 400, "maximum context length"),
        (ValueError("use the model's tokenizer"), 400, "use the model's tokenizer"),
        (RuntimeError("ask was called after the episode had ended"), 410, "has ended"),
    ],
)
def test_what_the_episode_raises_is_told(episodes: Episodes, error: Exception, status: int, message: str) -> None:
    answer = post(episodes, body(episodes.begin(Model(error))))
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True)


def test_who_waits_when_the_episode_ends_is_told(episodes: Episodes) -> None:
    model = Model()
    seat = episodes.begin(model)
    episodes.do(model.may.clear)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, episodes, body(seat))
        wait_for(lambda: bool(model.asked))
        episodes.end()
        assert answer.result().status_code == 410


def test_a_shut_endpoint_says_when_to_come_again() -> None:
    endpoint = TokenEndpoint()
    endpoint.start()
    episodes = Episodes(endpoint)
    model = Model()
    seat = episodes.begin(model)
    episodes.do(model.may.clear)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, episodes, body(seat))
        wait_for(lambda: bool(model.asked))
        endpoint._closing = True  # as close() begins, while the server still answers
        answer = post(episodes, body(seat, (1, 2)))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        endpoint.close()
        assert waiting.result().status_code == 503
    with pytest.raises(httpx.ConnectError):
        post(episodes, body(seat))
    episodes.end()
    episodes.loop.call_soon_threadsafe(episodes.loop.stop)
