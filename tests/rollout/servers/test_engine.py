"""The engine of servers on fake ones: it draws what each request draws alone, and survives what a server may do.

The fake servers draw each request on its own with the local engine (support/fake_vllm), so that completions are equal
to the bit whichever server has drawn them. All tests share two servers at addresses, whose faults are set anew.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sapo.config import RolloutConfig
from sapo.data import Completion
from sapo.errors import EngineError, Interrupted
from sapo.model.policy import Policy
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.servers import fleet, spread
from sapo.rollout.servers.engine import ServerEngine
from sapo.rollout.vllm.drawing import request_seed
from support.engine_cases import assert_same, flat, params, ragged_requests
from support.servers import order, serving
from support.vllm_cases import disturb

PARAMS = params(max_new_tokens=12)


@pytest.fixture
def engine(policy: Policy, addresses: list[str]) -> Iterator[ServerEngine]:
    for address in addresses:
        order(address)
    with closing(made(policy, addresses)) as engine:
        yield engine


def made(policy: Policy, addresses: list[str], **settings: Any) -> ServerEngine:
    return ServerEngine(policy, RolloutConfig(engine="vllm", servers=addresses, **settings))


def alone(policy: Policy, requests: list[Request]) -> list[tuple[Completion, ...]]:
    """Return what the local engine draws for each sample on its own, with the noise that belongs to the sample."""
    drawer = LocalEngine(policy)

    def draw(request: Request, sample: int) -> Completion:
        limit = request.limits[sample] if request.limits else PARAMS.max_new_tokens
        own = replace(PARAMS, seed=request_seed(PARAMS.seed, request.prompt.id, sample), max_new_tokens=limit)
        [[completion]] = drawer.generate([Request(replace(request.prompt, id=0), 1)], own)
        return completion

    return [tuple(draw(r, sample) for sample in range(r.samples)) for r in requests]


def assert_drawn(engine: ServerEngine, policy: Policy, requests: list[Request] | None = None) -> None:
    requests = requests or ragged_requests()
    drawn, expected = engine.generate(requests, PARAMS), alone(policy, requests)
    assert [len(group) for group in drawn] == [len(group) for group in expected]
    for ours, theirs in zip(flat(drawn), flat(expected), strict=True):
        assert_same(ours, theirs)


def test_each_sample_is_what_its_noise_draws_from_the_weights_set_last(
    engine: ServerEngine, policy: Policy, addresses: list[str]
) -> None:
    engine.set_weights(policy.weights(), 0)
    assert_drawn(engine, policy)
    assert engine.max_length == policy.max_length
    loads = [order(address) for address in addresses]
    # by hand: 16 samples, spread over two equal servers
    assert sum(loads) == 16
    assert min(loads) >= 6
    disturb(policy)
    engine.set_weights(policy.weights(), 3)
    assert engine.version == 3
    requests = ragged_requests()
    limited = [replace(r, limits=tuple(1 + i for i in range(r.samples))) for r in requests[:3]]
    stopped = [replace(r, prompt=replace(r.prompt, stop=("3", "1+"))) for r in requests[3:]]
    assert_drawn(engine, policy, [*limited, *stopped])


def test_answers_that_are_no_completions_are_asked_for_again(
    engine: ServerEngine, policy: Policy, addresses: list[str]
) -> None:
    warnings: list[str] = []
    engine.begin(Path(), 3, 1, warnings.append)
    engine.set_weights(policy.weights(), 0)
    order(addresses[0], fail=[0, 3], garbage=[1, 5, 6])
    order(addresses[1], garbage=[0, 2, 7], slow=0.02)
    assert_drawn(engine, policy)
    assert not warnings  # what fails at one time is one failure


def test_a_request_that_fails_everywhere_ends_the_draw(
    engine: ServerEngine, policy: Policy, addresses: list[str]
) -> None:
    engine.set_weights(policy.weights(), 0)
    for address in addresses:
        order(address, fail=list(range(100)))
    with pytest.raises(EngineError, match=r"(failed 5 times|no vLLM server is left to draw).*status 500, .*out of mem"):
        engine.generate(ragged_requests(), PARAMS)
    for address in addresses:
        order(address)
    engine.set_weights(policy.weights(), 1)  # both are asked again
    assert_drawn(engine, policy)


@pytest.mark.parametrize("wrong", [{"hang_at": 1}, {"label": "other"}])
def test_a_server_that_hangs_or_has_other_weights_is_left_out(
    policy: Policy, addresses: list[str], wrong: dict[str, Any]
) -> None:
    warnings: list[str] = []
    for address in addresses:
        order(address)
    with closing(made(policy, addresses, server_timeout=4)) as engine:
        engine.begin(Path(), 3, 1, warnings.append)
        order(addresses[1], **wrong)
        engine.set_weights(policy.weights(), 0)
        assert_drawn(engine, policy)
    what = "was not answered within 4 s" if "hang_at" in wrong else r"draws from other weights than it was sent"
    assert len(warnings) == 1
    assert f"server 1 ({addresses[1]}) is lost" in warnings[0]
    assert what in warnings[0]


def test_a_stop_is_honoured_and_the_servers_draw_on(engine: ServerEngine, policy: Policy, addresses: list[str]) -> None:
    engine.set_weights(policy.weights(), 0)
    for address in addresses:
        order(address, slow=0.3)
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        engine.generate(ragged_requests(), PARAMS, should_stop=lambda: next(asked) > 3)
    for address in addresses:
        order(address)
    assert_drawn(engine, policy)


@pytest.mark.parametrize("how", ["hang", "fail"])
def test_weights_that_do_not_arrive_end_with_one_line(
    policy: Policy, addresses: list[str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "TRANSFER_SECONDS", 3.0)
    for address in addresses:
        order(address, transfer=how)
    with closing(made(policy, addresses)) as engine, pytest.raises(EngineError) as caught:
        engine.set_weights(policy.weights(), 0)
    assert "the weights did not reach it: POST /update_weights: " in str(caught.value)
    assert "\n" not in str(caught.value)
    for address in addresses:
        order(address)
    with closing(made(policy, addresses)) as engine:  # a transfer that was begun and not finished is in nobody's way
        engine.set_weights(policy.weights(), 0)
        assert_drawn(engine, policy)


def test_a_server_that_dies_and_is_started_again_at_its_address_takes_part_again(
    policy: Policy, addresses: list[str], tmp_path: Path
) -> None:
    order(addresses[0])
    policy.save(tmp_path)
    warnings: list[str] = []
    with serving(tmp_path) as [(third, process)], closing(made(policy, [addresses[0], third])) as engine:
        engine.begin(Path(), 3, 1, warnings.append)
        engine.set_weights(policy.weights(), 0)
        order(third, slow=5)
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        assert_drawn(engine, policy)  # in the middle of which it dies
        killer.join()
        assert len(warnings) == 1, warnings
        engine.set_weights(policy.weights(), 1)
        assert_drawn(engine, policy)  # one is enough
        with serving(tmp_path, port=int(third.rpartition(":")[2])):
            order(addresses[0])
            engine.set_weights(policy.weights(), 2)
            assert_drawn(engine, policy)
            assert order(third) > 0
        assert len(warnings) == 1, warnings


def test_a_frozen_server_is_noticed_by_its_silence(
    policy: Policy, addresses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "HEALTH_EVERY", 0.2)
    monkeypatch.setattr(spread, "HEALTH_SECONDS", 1.0)
    order(addresses[0], slow=0.1)
    policy.save(tmp_path)
    warnings: list[str] = []
    with serving(tmp_path) as [(third, process)], closing(made(policy, [addresses[0], third])) as engine:
        engine.begin(Path(), 3, 1, warnings.append)
        engine.set_weights(policy.weights(), 0)
        order(third, freeze_at=2)
        started = time.monotonic()
        assert_drawn(engine, policy)
        assert time.monotonic() - started < 30
        os.kill(process.pid, signal.SIGCONT)
    assert "does not say that it lives" in warnings[0]


@torch.no_grad()
def test_servers_without_the_weights_are_seen_by_their_log_probabilities(
    engine: ServerEngine, policy: Policy, addresses: list[str]
) -> None:
    """What run/parity.py rests on: a sync that changes nothing shows in the log-probabilities, and in nothing else."""
    engine.set_weights(policy.weights(), 0)
    for address in addresses:
        order(address, ignore_weights=True)
    disturb(policy, seed=5)
    engine.set_weights(policy.weights(), 1)
    drawn = flat(engine.generate(ragged_requests(), PARAMS))
    expected = flat(alone(policy, ragged_requests()))
    assert any(tuple(a.token_ids) != tuple(b.token_ids) for a, b in zip(drawn, expected, strict=True))
