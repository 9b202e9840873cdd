"""A stand-in for verifiers.v1: contexts, configs, and an environment of a few tasks that go well or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SamplingConfig(SimpleNamespace):
    def model_copy(self, update: dict[str, Any]) -> SamplingConfig:
        return SamplingConfig(**{**vars(self), **update})


types = SimpleNamespace(SamplingConfig=SamplingConfig)


class TrainClientConfig(SimpleNamespace):
    multiplex = 256


@dataclass
class ModelContext:
    model: str
    client: Any
    sampling: Any


class HarnessConfig:
    pass


class Harness(Generic[T]):
    pass


@dataclass
class ProgramResult:
    code: int
    out: str
    err: str


MODES = ("good", "rewritten", "raises", "nan", "text", "hangs", "blocks", "crashes", "prints", "two_traces", "others")


@dataclass
class Error:
    type: str
    message: str


@dataclass
class Trace:
    reward: Any = 1.0
    ok: bool = True
    last_error: Error | None = None
    metrics: dict[str, float | None] = field(default_factory=lambda: {"turns": 2.0, "none": None})
    rewards: dict[str, Any] = field(default_factory=dict)
    num_branches: int = 1


class Environment:
    """Talks with the model in ids: 4 and 14 open, 15 is said between two turns."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config["taskset"]["id"] == "broken":
            raise ValueError("no such board")
        print("an environment that prints")
        modes = config["taskset"].get("modes", MODES)
        self.taskset = [
            SimpleNamespace(data=SimpleNamespace(system_prompt=str(i), prompt=None, name=mode, id=None, mode=mode))
            for i, mode in enumerate(modes)
        ]

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        yield

    async def run_episode(self, task: Any, ctx: ModelContext) -> Any:
        mode, trace = task.data.mode, Trace()
        first = [int(task.data.system_prompt) % 10, 14]
        episode = SimpleNamespace(ok=True, errors=[], traces=[trace])
        try:
            drawn = await self._turn(ctx, first)
            if mode == "raises":
                raise RuntimeError("board gone")
            if mode == "hangs":
                await asyncio.sleep(999)
            if mode == "blocks":
                time.sleep(999)
            if mode == "crashes":
                os.abort()
            if mode == "prints":
                os.write(1, b'{"played": 1, "ok": true, "reward": 99, "figures": {}}\n')
            session = "another" if mode == "others" else "trace"
            history = [first[0], 13] if mode == "rewritten" else [*first, *drawn]
            await self._turn(ctx, [*history, 15], session)
            trace.reward = {"nan": float("nan"), "text": "1"}.get(mode, 1.0)
            if mode == "two_traces":
                episode.traces.append(Trace())
        except Exception as error:
            trace.ok = episode.ok = False
            trace.last_error = Error(type(error).__name__, str(error))
        return episode

    async def _turn(self, ctx: ModelContext, ids: list[int], session: str = "trace") -> list[int]:
        sampling = {"seed": ctx.sampling.seed, "temperature": ctx.sampling.temperature, "max_tokens": 5}
        content = json.dumps({"model": ctx.model, "token_ids": ids, "sampling_params": sampling}).encode()
        url = ctx.client.base_url.removesuffix("/v1") + "/inference/v1/generate"
        request = urllib.request.Request(url, content, {**ctx.client.headers, "X-Session-ID": session})

        def post() -> Any:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)

        return list((await asyncio.to_thread(post))["choices"][0]["token_ids"])
