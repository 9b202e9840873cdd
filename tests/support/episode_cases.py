"""An environment of one function, and a driver that plays it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt, Score
from sapo.environments import Ask
from sapo.model.policy import Policy
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams

PlayOf = Callable[[Prompt, Ask], Awaitable[Score]]


class Game:
    """An environment of one function."""

    name, stop = "game", ("=",)

    def __init__(self, play: PlayOf) -> None:
        self._play = play

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, f"{index}+1")

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        return await self._play(prompt, ask)


def params(policy: Policy, tokens: int = 12, **options: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": tokens, "seed": 3, "stop_token_ids": policy.stop_token_ids, **options})


def drive(
    policy: Policy,
    play: PlayOf,
    prompts: int = 2,
    samples: int = 2,
    engine: object | None = None,
    turns: TurnsConfig | None = None,
    **options: object,
) -> list[tuple[Completion, ...]]:
    game = Game(play)
    asked = [replace(p, token_ids=policy.encode(p.text), stop=game.stop) for p in game.held_out(prompts)]
    driver = EpisodeDriver(
        policy, engine or LocalEngine(policy), params(policy, **options), turns or TurnsConfig(seconds_per_reply=5)
    )
    return driver.play([Play(game, p, samples) for p in asked])
