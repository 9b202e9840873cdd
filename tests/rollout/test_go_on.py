"""Histories that another encodes: what they share with what was seen stays, and the rest is an observation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Group, Prompt, Score, Status
from sapo.environments import Drawing, OutOfBudget, TokenAsk, TokenEnvironment
from sapo.model.policy import Policy
from sapo.rollout.conversation import Waves
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import encode_observation
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from support.plain_models import plain_copy
from support.trainer_cases import make_policy, make_trainer

PlayOf = Callable[[Prompt, TokenAsk], Awaitable[Score]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(torch.float32)


class Encoded:
    """An environment that encodes for itself."""

    name = "encoded"

    def __init__(self, play: PlayOf) -> None:
        self._play = play
        self.drawing: Drawing | None = None

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, "1+1=", token_ids=(1, 10, 1, 14))

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    def prepare(self, drawing: Drawing) -> None:
        self.drawing = drawing

    async def play(self, prompt: Prompt, ask: TokenAsk) -> Score:
        return await self._play(prompt, ask)


class WavesEngine(LocalEngine):
    """Computes every history anew."""

    def converse(self, params: SamplingParams) -> Waves:
        return Waves(self)


def drive(
    policy: Policy, play: PlayOf, tokens: int = 18, engine: LocalEngine | None = None, **turns: int
) -> tuple[Encoded, list[tuple[Prompt, tuple[Completion, ...]]]]:
    environment = Encoded(play)
    params = SamplingParams(max_new_tokens=tokens, seed=3, stop_token_ids=policy.stop_token_ids)
    settings = TurnsConfig(**{"seconds_per_reply": 20, "tokens_per_turn": 5, **turns})
    driver = EpisodeDriver(policy, engine or LocalEngine(policy), params, settings)
    prompts = environment.held_out(2)
    return environment, list(zip(prompts, driver.play([Play(environment, p, 2) for p in prompts]), strict=True))


async def appends(prompt: Prompt, ask: TokenAsk) -> Score:
    first = await ask.go_on(prompt.token_ids)
    if len(first.logprobs) != len(first.token_ids):
        return Score(0.0)
    await ask.go_on((*prompt.token_ids, *first.token_ids, 15, 11))
    return Score(1.0)


async def asks(prompt: Prompt, ask: TokenAsk) -> Score:
    await ask()
    await ask(";-")
    return Score(1.0)


async def rewrites(prompt: Prompt, ask: TokenAsk) -> Score:
    """Open with another prompt, leave out half of a turn, and begin all over."""
    opening = (1, 10, 7, 7)
    first = await ask.go_on(opening)
    second = await ask.go_on((*opening, *first.token_ids[:2], 12))
    await ask.go_on((3, 4, *second.token_ids))
    return Score(1.0)


async def shortens(prompt: Prompt, ask: TokenAsk) -> Score:
    """Show the model the beginning of what it has seen, and nothing new."""
    first = await ask.go_on(prompt.token_ids[:2])
    await ask.go_on((*prompt.token_ids[:2], *first.token_ids[:1]))
    return Score(1.0)


def test_a_history_that_goes_on_is_what_ask_would_have_drawn(policy: Policy) -> None:
    assert encode_observation(policy, ";-") == (15, 11)
    environment, by_ids = drive(policy, appends)
    assert isinstance(environment, TokenEnvironment)
    assert environment.drawing is not None
    assert (environment.drawing.max_length, environment.drawing.max_new_tokens) == (64, 18)
    _, by_text = drive(policy, asks)
    for (_, one), (_, other) in zip(by_ids, by_text, strict=True):
        for mine, its in zip(one, other, strict=True):
            assert mine.score.reward == 1.0
            assert mine.token_ids.tolist() == its.token_ids.tolist()
            assert mine.logprobs.tolist() == its.logprobs.tolist()
            assert [replace(o, text="") for o in its.observations] == list(mine.observations)


@pytest.mark.parametrize(("play", "first"), [(rewrites, 2), (shortens, 1)])
def test_every_own_token_is_that_of_its_own_history(policy: Policy, play: PlayOf, first: int) -> None:
    _, played = drive(policy, play)
    _, in_waves = drive(policy, play, engine=WavesEngine(policy))
    groups = [Group(p, c, (0.5, -0.5)) for p, c in played]
    plain = plain_copy(policy.model)
    for group, computed in zip(groups, make_trainer(policy).groups.compute(groups), strict=True):
        for completion, values in zip(group.completions, computed, strict=True):
            assert completion.score.status is Status.SCORED
            assert completion.observations[0].keep == first
            assert any(o.keep is not None for o in completion.observations[1:])
            np.testing.assert_allclose(values, completion.logprobs, atol=1e-5, rtol=0)
            np.testing.assert_allclose(plain_logprobs(plain, group.prompt, completion), values, atol=1e-5, rtol=0)
    for (_, one), (_, other) in zip(played, in_waves, strict=True):
        assert [c.token_ids.tolist() for c in one] == [c.token_ids.tolist() for c in other]


@torch.no_grad()
def plain_logprobs(plain: torch.nn.Module, prompt: Prompt, completion: Completion) -> list[float]:
    """Compute each turn by a forward of what the model saw then."""
    seen, found, own = list(prompt.token_ids), [], completion.token_ids.tolist()
    observations = {o.at: o for o in completion.observations}
    for at, token in enumerate(own):
        if at in observations:
            said = observations[at]
            seen = [*seen[: said.keep], *said.token_ids]
        logits = plain(torch.tensor([seen])).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[token]))
        seen.append(token)
    return found


@pytest.mark.parametrize(
    ("history", "message"),
    [([], "a token or more"), ([1, 99], "token ids from 0 to"), ([1, -1], "token ids from 0 to"), ([1.0], "token ids")],
)
def test_a_history_that_is_none_is_refused(policy: Policy, history: list[int], message: str) -> None:
    async def wrong(prompt: Prompt, ask: TokenAsk) -> Score:
        await ask.go_on(history)
        return Score(1.0)

    _, played = drive(policy, wrong)
    for _, completions in played:
        assert all(c.score.status is Status.ENVIRONMENT_ERROR and message in c.score.detail for c in completions)


def test_a_history_that_does_not_fit_ends_the_episode(policy: Policy) -> None:
    async def long(prompt: Prompt, ask: TokenAsk) -> Score:
        await ask.go_on(prompt.token_ids)
        with pytest.raises(OutOfBudget, match="no positions were left of 20"):
            await ask.go_on((1,) * 20)
        return Score(1.0)

    async def shorter(prompt: Prompt, ask: TokenAsk) -> Score:
        first = await ask.go_on(prompt.token_ids)
        await ask.go_on((*prompt.token_ids, *first.token_ids, *(2,) * 5))
        await ask.go_on((3,))  # what is forgotten takes no room
        return Score(1.0)

    for _, completions in drive(policy, long, length=20)[1]:
        assert all(c.score.status is Status.TRUNCATED for c in completions)
    for _, completions in drive(policy, shorter, length=20)[1]:
        assert all(c.score.status is Status.SCORED for c in completions)
