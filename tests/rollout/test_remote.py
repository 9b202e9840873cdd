"""Engines over channels: workers that answer in this process, in messages that have been bytes, and that can die."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sapo.config import RolloutConfig
from sapo.data import Prompt
from sapo.data.messages import Message, decode, encode
from sapo.errors import ConfigError, EngineError, Interrupted
from sapo.rollout.engine import Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.remote.building import hello_message
from sapo.rollout.remote.calls import generate_message, read_requests
from sapo.rollout.remote.channel import ChannelError
from sapo.rollout.remote.engine import RemoteEngine
from sapo.rollout.remote.worker import EngineWorker
from support.policies import make_policy
from support.vision_cases import SQUARE, WIDE, make_vision_policy, shown

PARAMS = SamplingParams(max_new_tokens=20, seed=11, stop_token_ids=frozenset({15}))


class DirectChannel:
    """A channel to a worker in this process; it dies of the calls that `deadly` numbers, counted from 1."""

    def __init__(self, *deadly: int) -> None:
        self.deadly = deadly
        self.calls: list[str] = []
        self.drawn = 0
        self.closed = False
        self.worker: EngineWorker | None = EngineWorker()

    def call(self, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> Message:
        assert timeout > 0
        self.calls.append(message.header["call"])
        self.drawn += len(message.header.get("requests", ()))
        if len(self.calls) in self.deadly:
            self.worker = None
        if self.worker is None:
            raise ChannelError("engine 0 was ended by a test")
        return decode(*encode(self.worker.handle(decode(*encode(message)), should_stop)))

    def restart(self) -> None:
        self.worker = EngineWorker()

    def close(self) -> None:
        self.closed = True


def requests_of(policy) -> list[Request]:
    texts = ["12+3=", "1*2", "7-7=", "9=", "123456789+1="]
    prompts = [Prompt(i, "t", text, policy.encode(text), stop=("7",) * (i % 2)) for i, text in enumerate(texts)]
    limits = [None, (5, 9, 20), None, None, None]
    return [Request(p, samples=3, limits=limit) for p, limit in zip(prompts, limits, strict=True)]


def remote(policy, *channels: DirectChannel, settings: RolloutConfig | None = None, **options) -> RemoteEngine:
    return RemoteEngine(channels, hello_message(policy, settings or RolloutConfig()), timeout=60.0, **options)


def drawn_by(engine, policy, weights=None, experts: ExpertLog | None = None):
    engine.wake()
    engine.set_weights(iter((weights or dict(policy.weights())).items()), 4)
    drawn = engine.generate(requests_of(policy), PARAMS, experts=experts)
    engine.sleep()
    return drawn


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_a_worker_draws_to_the_bit_what_the_engine_draws_here(architecture: str) -> None:
    policy = make_policy(architecture)
    moved = {name: tensor + 0.01 for name, tensor in policy.weights()}
    engine = remote(policy, DirectChannel())
    for weights in (None, moved):
        assert drawn_by(engine, policy, weights) == drawn_by(LocalEngine(policy), policy, weights)
    assert engine.version == 4
    assert engine.capabilities == LocalEngine.capabilities


def test_an_engine_elsewhere_holds_as_long_sequences_as_the_shortest_of_its_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy("qwen3")
    assert remote(policy, DirectChannel()).max_length is None
    lengths = iter([60, 50])
    monkeypatch.setattr(LocalEngine, "max_length", property(lambda engine: next(lengths)), raising=False)
    assert remote(policy, DirectChannel(), DirectChannel()).max_length == 50


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "internvl"])
def test_a_worker_draws_of_pictures_what_the_engine_draws_here_without_their_files(name: str, tmp_path: Path) -> None:
    policy = make_vision_policy(name)
    file = tmp_path / "picture.png"
    file.write_bytes(WIDE.read())
    pictures = (replace(WIDE, data=None, path=str(file)), SQUARE)
    prompts = [shown(policy, "1+<image>=<image>?", *pictures), shown(policy, "12+3=", prompt_id=1)]
    requests = [Request(p, samples=3) for p in prompts]
    here, there = LocalEngine(policy), remote(policy, DirectChannel())
    drawn = []
    for engine in (here, there):
        engine.wake()
        engine.set_weights(dict(policy.weights()).items(), 1)
        drawn.append(engine.generate(requests, PARAMS))
    assert drawn[0] == drawn[1]
    message = generate_message(requests, PARAMS, record_experts=False)
    file.unlink()
    read, _ = read_requests(decode(*encode(message)))
    assert [p.read() for p in read[0].prompt.pictures] == [WIDE.read(), SQUARE.read()]
    assert read[0].prompt.picture_tokens == prompts[0].picture_tokens


def test_experts_that_a_worker_records_arrive() -> None:
    policy = make_policy("qwen3_moe")
    here, there = ExpertLog(), ExpertLog()
    drawn_by(LocalEngine(policy), policy, experts=here)
    drawn_by(remote(policy, DirectChannel()), policy, experts=there)
    assert vars(here) == vars(there)


def test_several_workers_draw_whole_requests_each_and_the_same_tokens() -> None:
    policy = make_policy("qwen3")
    channels = DirectChannel(), DirectChannel()
    drawn = drawn_by(remote(policy, *channels), policy)
    assert [[c.token_ids.tolist() for c in group] for group in drawn] == [
        [c.token_ids.tolist() for c in group] for group in drawn_by(LocalEngine(policy), policy)
    ]
    # by hand, prompt and limit: 65, 37, 64, 62 and 72 tokens; the longest first to the emptiest: 72 + 62, 65 + 64 + 37
    assert [channel.drawn for channel in channels] == [2, 3]


@pytest.mark.parametrize("deadly", [(2,), (3,), (5,), (5, 8)], ids=str)
def test_a_worker_that_dies_is_given_its_weights_again_and_draws_the_same(deadly: tuple[int, ...]) -> None:
    """Calls: hello, wake, weights, set_weights, generate; after a death: hello, what it had, and the call again."""
    policy = make_policy("qwen3")
    channel, said = DirectChannel(*deadly), []
    engine = remote(policy, channel, max_restarts=2, on_restart=said.append)
    assert drawn_by(engine, policy) == drawn_by(LocalEngine(policy), policy)
    assert said == [
        f"engine 0 was ended by a test; it is started again ({i + 1} of at most 2 times)" for i in range(len(deadly))
    ]


def test_a_worker_dies_no_more_often_than_it_may() -> None:
    policy = make_policy("qwen3")
    engine = remote(policy, DirectChannel(5, 6, 7), max_restarts=2, way_out="resume it")
    with pytest.raises(EngineError, match=r"^engine 0 was ended by a test; resume it$"):
        drawn_by(engine, policy)
    engine.sleep()  # as `loaded` does, whatever happened


def test_a_worker_that_dies_of_its_first_call_is_not_started_again() -> None:
    channel = DirectChannel(1)
    with pytest.raises(EngineError, match="was ended by a test"):
        remote(make_policy("qwen3"), channel, max_restarts=2)
    assert channel.calls == ["hello"]
    assert channel.closed


def test_a_stop_reaches_the_worker_and_leaves_it_ready() -> None:
    policy = make_policy("qwen3")
    engine, asked = remote(policy, DirectChannel()), iter(range(1000))
    engine.wake()
    engine.set_weights(policy.weights(), 0)
    with pytest.raises(Interrupted):
        engine.generate(requests_of(policy), PARAMS, lambda: next(asked) > 3)
    assert drawn_by(engine, policy) == drawn_by(LocalEngine(policy), policy)


def test_errors_of_a_worker_are_raised_here() -> None:
    policy = make_policy("qwen3")
    with pytest.raises(ConfigError, match=r"^rollout\.engine must be one of"):
        remote(policy, DirectChannel(), settings=RolloutConfig(engine="loca"))
    engine = remote(policy, DirectChannel())
    engine.wake()
    engine.set_weights(policy.weights(), 0)
    long = Request(Prompt(0, "t", "", (1,) * 600), samples=1)
    with pytest.raises(RuntimeError, match=r"(?s)engine 0 has raised ValueError: prompt and completion must fit.*File"):
        engine.generate([long], PARAMS)


def test_the_policys_own_tensors_are_read_and_never_kept_by_a_worker() -> None:
    policy = make_policy("qwen3")
    engine = remote(policy, channel := DirectChannel())
    drawn_by(engine, policy)
    assert channel.worker is not None
    ours = {t.data_ptr() for _, t in policy.weights()}
    theirs = dict(channel.worker.policy.weights())
    assert not ours & {t.data_ptr() for t in theirs.values()}
    assert all(torch.equal(t, theirs[name]) for name, t in policy.weights())
