"""What is refused before a run with servers begins: one line with the rule, the value and the way out."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.config import RolloutConfig
from sapo.errors import UserError
from sapo.model.policy import Policy
from sapo.rollout.servers import engine as engines
from sapo.rollout.servers.address import check_addresses
from sapo.rollout.servers.client import Client
from sapo.rollout.servers.engine import ServerEngine
from sapo.rollout.servers.guard import TOKEN, Guard
from sapo.rollout.servers.serve import arguments
from support.runs import write_recipe
from support.servers import free_port, order, serving


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("servers", "engine", "said"),
    [
        (0, "vllm", "a number from 1, or a list of addresses; got 0"),
        ([], "vllm", "a number from 1, or a list of addresses; got []"),
        (2, "local", "rollout.servers is for rollout.engine=vllm; got engine local"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, servers: Any, engine: str, said: str) -> None:
    file = write_recipe(tmp_path, rollout__engine=engine, rollout__servers=servers)
    assert said in refusal(lambda: sapo.load_recipe(file))


def test_an_adapter_is_not_sent_to_servers_as_itself(tmp_path: Path) -> None:
    adapter = {"rollout__vllm": {"lora_sync": "adapter"}, "model__lora": {"rank": 2}}
    file = write_recipe(tmp_path, rollout__engine="vllm", rollout__servers=2, **adapter)
    assert "folded into the weights; got rollout.vllm.lora_sync=adapter with" in refusal(lambda: sapo.load_recipe(file))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000", "http://127.0.0.1", "http://127.0.0.1:x", "ftp://a:1", "http://u@a:1", "http://a:1/v1"],
)
def test_what_is_no_address(address: str) -> None:
    assert f"as http://127.0.0.1:8000; got {address!r}" in refusal(lambda: check_addresses([address]))


def test_addresses_beyond_loopback_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    check_addresses(["http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"])
    assert f"got http://10.0.0.7:8000 and no {TOKEN}" in refusal(lambda: check_addresses(["http://10.0.0.7:8000"]))
    assert "got --host 0.0.0.0 and no" in refusal(lambda: arguments("model", ["--host", "0.0.0.0"]))
    assert "got --host gpu-7 and no" in refusal(lambda: arguments("model", ["--host=gpu-7"]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"must be free; got 127.0.0.1 {port}: " in refusal(lambda: arguments("model", ["--port", port]))
    monkeypatch.setenv(TOKEN, "secret")
    check_addresses(["http://10.0.0.7:8000"])
    assert "secret" not in " ".join(arguments("model", ["--host", "0.0.0.0"]))
    assert "every address once" in refusal(lambda: check_addresses(["http://10.0.0.7:8000"] * 2))


def test_a_server_beyond_loopback_that_asks_for_no_token(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setattr(engines, "needs_token", lambda address: True)
    config = recipe(tmp_path, addresses[:1])
    assert "must refuse who has no token" in refusal(lambda: ServerEngine.check(config))


def recipe(directory: Path, addresses: list[str], **changes: Any) -> Any:
    file = write_recipe(directory, rollout__engine="vllm", rollout__servers=addresses, **changes)
    return sapo.load_recipe(file)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"version": "0.31.1"}, "must run vLLM 0.32.x, .* got 0.31.1 at http"),
        ({"config": {"vocab_size": 21}}, "the model that is trained; got vocabulary 21 at .* and 17 here"),
        ({"config": {"num_hidden_layers": 3}}, "got layers 3 at .* and 2 here"),
        ({"config": {"model_type": "llama"}}, "got architecture llama at .* and qwen3 here"),
        ({"config": {"rms_norm_eps": 1e-5}}, "got rms_norm_eps 1e-05 at .* and 1e-06 here"),
        ({"describe": {"dtype": "bfloat16"}}, "got bfloat16 at .* and float32 here; .*--dtype float32"),
        ({"describe": {"logprobs_mode": "raw_logprobs"}}, "got --logprobs-mode raw_logprobs at"),
        ({"describe": {"protocol": 0}}, "one version of sapo; got protocol 0 at"),
        ({"describe": {"tensor_parallel": 2}}, "one worker each; got 2 workers at"),
        ({"describe": {"max_length": 16}}, "got --max-model-len 16 at .* and rollout.max_new_tokens=64"),
    ],
)
def test_a_server_of_something_else(policy: Policy, addresses: list[str], wrong: dict[str, Any], said: str) -> None:
    order(addresses[0])
    order(addresses[1], **wrong)

    def start() -> None:
        with closing(ServerEngine(policy, RolloutConfig(engine="vllm", servers=addresses))):
            pass

    try:
        message = refusal(start)
    finally:
        order(addresses[1])
    assert addresses[1] in message
    assert re.search(said, message), message


def test_an_address_that_does_not_answer_leaves_nothing_behind(tmp_path: Path, addresses: list[str]) -> None:
    silent = f"http://127.0.0.1:{free_port()}"
    config = recipe(tmp_path, [addresses[0], silent])
    message = refusal(lambda: sapo.train(config))
    assert f"{silent}: GET /version: no connection; start it by python -m sapo.rollout.servers.serve" in message
    assert not (tmp_path / "run").exists()


def test_another_token_and_something_that_is_no_vllm(tmp_path: Path, policy: Policy) -> None:
    policy.save(tmp_path / "served")
    with serving(tmp_path / "served", token="of the server") as [(address, _)]:
        config = recipe(tmp_path, [address])
        assert f"it does not know the token; set {TOKEN}" in refusal(lambda: ServerEngine.check(config))
        assert Client(address).guarded()
        assert Client(address, "of the server").release() == "0.32.0"
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port := free_port())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(port)
        said = refusal(lambda: ServerEngine.check(recipe(tmp_path, [address])))
        assert f"{address}: GET /version: status 404" in said
    finally:
        process.kill()
        process.wait()


def _wait(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            probe.settimeout(0.1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("it never answered")


@pytest.mark.parametrize(
    ("token", "given", "status"),
    [("a", b"Bearer a", 200), ("a", b"Bearer b", 401), ("a", b"a", 401), ("a", None, 401), (None, None, 200)],
)
def test_the_guard_lets_nobody_pass_without_the_token(
    monkeypatch: pytest.MonkeyPatch, token: str | None, given: bytes | None, status: int
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN, token)
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if given is None else [(b"Authorization", given)]
    asyncio.run(Guard(application)({"type": "http", "headers": headers, "path": "/update_weights"}, None, send))
    assert sent[0]["status"] == status
