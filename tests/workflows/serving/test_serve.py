"""A served model, over HTTP: what it answers, what it refuses, and what happens to who leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from sapo.data import Prompt
from sapo.errors import ConfigError
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams
from sapo.workflows.serving.requests import CompletionRequest, parse
from sapo.workflows.serving.served import ServedModel
from sapo.workflows.serving.web import bound
from sapo.workflows.serving.worker import Worker
from support.served import HELLO, chat, complete, endless, events, served_here, talker


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[httpx.Client, ServedModel]]:
    with served_here(talker()) as (url, served), httpx.Client(base_url=url, timeout=60) as client:
        yield client, served


def drawn(served: ServedModel, token_ids, seed: int, samples: int = 1, **params):
    """What the engine draws for a prompt, asked without a server."""
    settings = SamplingParams(seed=seed, stop_token_ids=served.policy.stop_token_ids, **params)
    [completions] = served.engine.generate([Request(Prompt(0, "t", "", token_ids=tuple(token_ids)), samples)], settings)
    return completions


def test_a_chat_has_the_completions_that_the_engine_draws_for_its_tokens(here) -> None:
    client, served = here
    answer = chat(client, seed=3, n=2, max_tokens=9, logprobs=True).json()
    ids = served.policy.encode("[system]Be brief.\n[user]Hello?\n[assistant]")
    expected = drawn(served, ids, 3, samples=2, max_new_tokens=9)
    for choice, completion in zip(answer["choices"], expected, strict=True):
        assert choice["message"]["content"] == completion.text
        assert choice["finish_reason"] == completion.finish_reason
        content = choice["logprobs"]["content"]
        kept = [i for i, token in enumerate(completion.token_ids) if token not in served.policy.stop_token_ids]
        assert [c["logprob"] for c in content] == pytest.approx(completion.logprobs[kept].tolist(), abs=1e-5)
        assert "".join(c["token"] for c in content) == completion.text
    tokens = sum(len(c) for c in expected)
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": tokens,
        "total_tokens": len(ids) + tokens,
    }
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")


def test_a_stream_is_the_whole_answer_in_pieces(here) -> None:
    client, _ = here
    whole = chat(client, seed=4, n=3, max_tokens=8, logprobs=True).json()
    response = chat(
        client, seed=4, n=3, max_tokens=8, logprobs=True, stream=True, stream_options={"include_usage": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(p["id"] == last["id"] and p["object"] == "chat.completion.chunk" for p in pieces)
    for choice in whole["choices"]:
        own = [c for p in pieces for c in p["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert len(own) > 3, "it came piece by piece"
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        logprobs = [e for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        assert [e["logprob"] for e in logprobs] == pytest.approx(
            [e["logprob"] for e in choice["logprobs"]["content"]], abs=1e-5
        )


def test_completions_take_text_and_tokens_one_or_several(here) -> None:
    client, served = here
    ids = list(served.policy.encode("1+1="))
    one = complete(client, temperature=0, max_tokens=5, logprobs=0).json()["choices"]
    [expected] = drawn(served, ids, 0, max_new_tokens=5, temperature=0.0)
    assert one[0]["text"] == expected.text
    assert one[0]["logprobs"]["text_offset"] == list(range(len(expected.text)))
    assert one[0]["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs.tolist(), abs=1e-5)
    for prompt, count in ((["1+1=", "1+1="], 2), (ids, 1), ([ids, list(served.policy.encode("x"))], 2)):
        choices = complete(client, prompt=prompt, temperature=0, max_tokens=5).json()["choices"]
        assert [c["index"] for c in choices] == list(range(count))
        assert choices[0]["text"] == expected.text
    pieces = events(complete(client, temperature=0, max_tokens=5, stream=True))
    assert "".join(p["choices"][0]["text"] for p in pieces) == expected.text
    default = complete(client).json()["usage"]["completion_tokens"]
    assert default <= 16


def test_a_stop_string_is_no_part_of_the_answer_streamed_or_not(here) -> None:
    client, _ = here
    whole = chat(client, temperature=0, max_tokens=20).json()["choices"][0]["message"]["content"]
    stop = whole[5:7]
    cut = whole[: whole.index(stop)]
    answer = chat(client, temperature=0, max_tokens=20, stop=[stop]).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (cut, "stop")
    pieces = events(chat(client, temperature=0, max_tokens=20, stop=stop, stream=True))
    assert "".join(c["delta"].get("content", "") for p in pieces for c in p["choices"]) == cut


def test_a_seed_repeats_an_answer_and_none_draws_anew(here) -> None:
    client, _ = here
    text = lambda **f: chat(client, max_tokens=20, **f).json()["choices"][0]["message"]["content"]  # noqa: E731
    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text() != text()


def test_messages_may_be_in_parts_and_the_template_is_switched(here) -> None:
    client, _ = here
    count = lambda **f: chat(client, max_tokens=1, **f).json()["usage"]["prompt_tokens"]  # noqa: E731
    plain = count(messages=[{"role": "user", "content": "ab"}])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert count(messages=[{"role": "user", "content": parts}]) == plain
    thinking = {"enable_thinking": True}
    assert count(messages=[{"role": "user", "content": "ab"}], chat_template_kwargs=thinking) == plain + 1
    developer = count(messages=[{"role": "developer", "content": "ab"}])
    assert developer == count(messages=[{"role": "system", "content": "ab"}])
    answer = chat(client, max_tokens=3).json()["choices"][0]["message"]
    given_back = [*HELLO, {**answer, "tool_calls": None, "audio": None}, {"role": "user", "content": "And?"}]
    assert count(messages=given_back) > count()


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "gpt-9"}, 404, None, "the one served is 'tiny'"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "1"}, 400, "temperature", 'got "1"'),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"n": 1000}, 400, "n", "less than or equal to 128"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"stop": ""}, 400, "stop", "empty"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages",
            "type",
        ),
        ({"messages": [{"role": "user", "content": "\u00e9"}]}, 400, None, "cannot encode|refuses"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "another distribution"),
        (
            {"tools": [{"type": "function"}]},
            400,
            "tools",
            r'^tools.0.function: Field required; got \{"type": "function"\}$',
        ),
        ({"top_logprobs": 5}, 400, "top_logprobs", "^top_logprobs needs logprobs: true$"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "are text"),
    ],
)
def test_a_bad_request_gets_the_protocols_error(here, fields, status, param, words) -> None:
    import re

    client, _ = here
    response = chat(client, **fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert re.search(words, error["message"]), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompts", "n", "product"),
    [(["1"] * 5000, 128, 640000), ([[1, 2]] * 257, 1, 257), (["1"] * 257, None, 257)],
)
def test_a_request_for_more_completions_than_the_most_is_refused(here, prompts, n, product) -> None:
    client, _ = here
    response = complete(client, prompt=prompts, n=n, max_tokens=1)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "prompt"
    assert f"at most 256; got {len(prompts)} times {n or 1}, {product}" in error["message"]


def test_a_request_for_the_most_completions_is_taken() -> None:
    for prompt, n in ((["1"] * 2, 128), ([1] * 300, 128), ("1" * 300, 128)):
        body = json.dumps({"model": "tiny", "prompt": prompt, "n": n}).encode()
        assert parse(CompletionRequest, body, "tiny").n == n


def test_what_asks_for_nothing_is_taken(here) -> None:
    client, _ = here
    nothing = {"presence_penalty": 0, "logit_bias": {}, "tools": None, "user": "me", "top_p": None, "n": None}
    assert chat(client, max_tokens=1, response_format={"type": "text"}, **nothing).status_code == 200


def test_what_is_no_request_at_all_is_refused(here) -> None:
    client, _ = here
    kind = {"content-type": "application/json"}
    for body, words in ((b"{", "must be JSON"), (b"[" * 100_000, "must be JSON"), (b"[]", "object; got list")):
        response = client.post("/v1/chat/completions", content=body, headers=kind)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    assert client.post("/v1/completions", content=b" " * (9 * 2**20), headers=kind).status_code == 413
    assert client.get("/v2/models").json()["error"]["message"].startswith("there is nothing at /v2/models")
    assert client.get("/v1/completions").status_code == 405
    for host, status in (("evil.example", 403), ("localhost:1", 200)):
        assert client.get("/v1/models", headers={"host": host}).status_code == status
    lone = client.post("/v1/completions", content=b'{"model": "\\ud800"}', headers=kind)
    assert lone.status_code in (400, 404)


def test_models_are_listed(here) -> None:
    client, _ = here
    [card] = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_a_short_answer_overtakes_a_long_one() -> None:
    order, started = [], threading.Event()
    with served_here(endless()) as (url, _), httpx.Client(base_url=url, timeout=60) as client:

        def long() -> None:
            body = {"model": "tiny", "prompt": "1", "max_tokens": 400, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                for _ in response.iter_lines():
                    started.set()
            order.append("long")

        thread = threading.Thread(target=long)
        thread.start()
        assert started.wait(60)
        complete(client, max_tokens=1)
        order.append("short")
        thread.join(60)
    assert order == ["short", "long"]


def test_who_leaves_is_drawn_for_no_more_and_gives_its_place_to_the_next() -> None:
    worker = Worker(most_jobs=1, most_waiting=1)
    with served_here(endless(), worker=worker) as (url, served):
        count = steps_of(served)
        body = {"model": "tiny", "prompt": "1", "max_tokens": 4000}
        with httpx.Client(base_url=url, timeout=60) as client:
            for stream in (True, False):
                count.clear()
                leave_while_drawing(url, {**body, "stream": stream}, count)
                # With one place alone this is answered only when the other has ended.
                assert complete(client, max_tokens=1).status_code == 200
                assert 0 < sum(count) < 4000


def steps_of(served: ServedModel) -> list[int]:
    """Count the steps of the engine's streams from now on."""
    count: list[int] = []
    inner = served.engine.stream

    def counted(requests, params):
        made = inner(requests, params)
        try:
            for step in made:
                count.append(1)
                yield step
        finally:
            made.close()

    served.engine.stream = counted
    return count


def leave_while_drawing(url: str, body: dict, count: list[int]) -> None:
    host, port = url.removeprefix("http://").split(":")
    payload = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        deadline = time.monotonic() + 60
        while not count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_too_many_that_wait_are_told_so_and_a_server_that_stops_ends_all() -> None:
    statuses: list[int] = []
    worker = Worker(most_jobs=1, most_waiting=1)
    with served_here(endless(), worker=worker) as (url, served):
        count = steps_of(served)
        body = {"model": "tiny", "prompt": "1", "max_tokens": 4000}
        ask = lambda: statuses.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code)  # noqa: E731
        first, second = threading.Thread(target=ask), threading.Thread(target=ask)
        first.start()
        deadline = time.monotonic() + 60
        while not count and time.monotonic() < deadline:
            time.sleep(0.01)
        second.start()
        while not worker.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        third = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert third.json()["error"]["code"] == "queue_full"
    first.join(60)
    second.join(60)
    assert statuses == [503, 503]


def test_a_chat_without_a_template_is_refused_and_text_is_completed() -> None:
    with served_here(talker(template=None)) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        response = chat(client)
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        assert complete(client, max_tokens=2).status_code == 200


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with served_here(talker(max_length=64)) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for fields in ({"prompt": "1" * 64}, {"prompt": "1" * 60, "max_tokens": 5}):
            error = complete(client, **fields).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert "64 positions" in error["message"]
        assert complete(client, prompt="1" * 60, max_tokens=4).status_code == 200
        assert chat(client).json()["usage"]["total_tokens"] <= 64


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_SERVER_TOKEN", "secret word")
    with served_here(talker(), host="0.0.0.0") as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "sapo_token=wrong"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"authorization": "Bearer secret word"}).status_code == 200
        turned = client.get("/v1/models?token=secret%20word")
        assert (turned.status_code, turned.headers["location"]) == (303, "/v1/models")
        assert "HttpOnly" in turned.headers["set-cookie"]
        assert client.get("/v1/models").status_code == 200, "the cookie holds"
        client.cookies.clear()
        evil = {"authorization": "Bearer secret word", "host": "node-7:80"}
        assert client.get("/v1/models", headers=evil).status_code == 200, "a token is enough under any name"
    monkeypatch.delenv("SAPO_SERVER_TOKEN")
    with bound("0.0.0.0", 0) as (_, address):
        assert address.token is not None
        assert len(address.token) >= 32


def test_a_port_in_use_and_a_host_of_another_machine_are_refused() -> None:
    with bound("127.0.0.1", 0) as (taken, address):
        taken.listen()
        with pytest.raises(ConfigError, match="--port must be free; got 127"), bound("127.0.0.1", address.port):
            pass
    with pytest.raises(ConfigError, match="--host must be"), bound("no.such.host.invalid", 0):
        pass
    with pytest.raises(ConfigError, match=r"got 192\.0\.2\.1"), bound("192.0.2.1", 0):
        pass
