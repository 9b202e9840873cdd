"""Judges of groups: called with all episodes of a prompt, and one that fails costs its own group alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import torch

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt, Score, Status
from sapo.environments import Ask, Episode, JudgedEnvironment
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.rollout.episodes.driver import EpisodeDriver, check_environment
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from support.trainer_cases import make_policy

Judge = Callable[[Prompt, list[Episode]], Awaitable[list[Score]]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(torch.float32)


class Contest:
    """Two turns of up to three tokens; the longest episode of a prompt wins."""

    name, stop = "contest", ("=",)

    def __init__(self, judge: Judge | None = None) -> None:
        self.seen: list[tuple[int, list[Episode]]] = []
        self._judge = judge

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, f"{index}+1")

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        first = await ask(max_tokens=3)
        if prompt.id == 2 and ask.seed % 2:
            raise ConnectionError("gone")
        second = await ask("7;", max_tokens=2)
        return Score(0.0, figures={"tokens": float(len(first.token_ids) + len(second.token_ids))})

    async def judge(self, prompt: Prompt, episodes: list[Episode]) -> list[Score]:
        self.seen.append((prompt.id, episodes))
        if self._judge is not None and prompt.id == 0:
            return await self._judge(prompt, episodes)
        await asyncio.sleep(0.01)
        lengths = [e.score.figures.get("tokens", 0.0) for e in episodes]
        return [Score(float(n == max(lengths)), figures={"judged": 1.0}) for n in lengths]


def drive(policy: Policy, game: Contest, prompts: int = 2, tokens: int = 12) -> list[tuple[Completion, ...]]:
    asked = [replace(p, token_ids=policy.encode(p.text), stop=game.stop) for p in game.held_out(prompts)]
    params = SamplingParams(max_new_tokens=tokens, seed=3, stop_token_ids=policy.stop_token_ids)
    driver = EpisodeDriver(policy, LocalEngine(policy), params, TurnsConfig(seconds_per_reply=0.4))
    return driver.play([Play(game, p, 4) for p in asked])


def test_a_judge_sees_all_episodes_of_a_prompt_and_its_scores_take_the_place_of_theirs(policy: Policy) -> None:
    game = Contest()
    assert isinstance(game, JudgedEnvironment)
    played = drive(policy, game, prompts=3)
    assert sorted(i for i, _ in game.seen) == [0, 1, 2]
    for completions in played[:2]:
        longest = max(map(len, completions))
        assert [c.score.reward for c in completions] == [float(len(c) == longest) for c in completions]
        assert all(c.score.figures == {"tokens": float(len(c)), "judged": 1.0} for c in completions)
    episodes = dict(game.seen)[1]
    assert [e.sample for e in episodes] == [0, 1, 2, 3]
    for episode, completion in zip(episodes, played[1], strict=True):
        assert [t.token_ids for t in episode.turns] == [
            tuple(completion.token_ids[start:stop].tolist()) for start, stop in completion.turns
        ]
        assert episode.observations == ("", "7;")
        assert episode.turns[-1].text == completion.text
    failed = [c.score.status is Status.ENVIRONMENT_ERROR for c in played[2]]
    assert any(failed)
    assert not all(failed)
    assert [e.sample for e in dict(game.seen)[2]] == [i for i, f in enumerate(failed) if not f]
    assert all("gone" in c.score.detail for c, f in zip(played[2], failed, strict=True) if f)


async def raises(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    raise KeyError("model")


async def exits(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    raise SystemExit(2)


async def too_few(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    return [Score(1.0)]


async def no_list(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    return Score(1.0)  # type: ignore[return-value]


async def no_scores(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    return [1.0] * 4  # type: ignore[list-item]


async def not_a_number(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    return [Score(1.0), Score(1.0), Score(1.0), Score(float("nan"))]


async def other_turns(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    return [Score(1.0, turn_rewards=(1.0,)) for _ in episodes]


async def hangs(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    await asyncio.sleep(99)
    return [Score(1.0) for _ in episodes]


async def blocks(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    time.sleep(0.5)
    return [Score(1.0) for _ in episodes]


async def cancels_itself(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    raise asyncio.CancelledError


class NoTextError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


async def raises_without_a_text(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
    raise NoTextError


FAILURES = {
    raises_without_a_text: "NoTextError (test_judging.py:",
    raises: "KeyError: 'model' (test_judging.py:",
    exits: "SystemExit: 2",
    too_few: "ValueError: judge must return a list with a score for each of the 4 episodes; got 1",
    no_list: "ValueError: judge must return a list with a score for each of the 4 episodes; got Score",
    no_scores: "TypeError: judge must return a Score; got float",
    not_a_number: "ValueError: a reward must be finite; got nan",
    other_turns: "ValueError: turn_rewards must be one for each of the 2 turns that were drawn; got 1",
    hangs: "no judgement within 0.4 s",
    blocks: "no judgement within 0.4 s",
    cancels_itself: "CancelledError",
}


@pytest.fixture(scope="module")
def fine(policy: Policy) -> tuple[Completion, ...]:
    return drive(policy, Contest())[1]


@pytest.mark.parametrize("failing", FAILURES, ids=lambda f: f.__name__)
def test_a_judge_that_fails_costs_its_group_alone(policy: Policy, fine: tuple[Completion, ...], failing: Judge) -> None:
    bad, other = drive(policy, Contest(failing))
    assert other == fine
    for completion in bad:
        assert completion.score.status is Status.ENVIRONMENT_ERROR
        assert completion.score.status.failed, "so it leaves loss and baseline, as any failed episode"
        assert completion.score.reward == 0.0
        assert completion.score.detail.startswith(FAILURES[failing])


def test_an_episode_that_a_limit_cut_keeps_its_reward_of_0_unless_it_is_to_be_scored(policy: Policy) -> None:
    (completions,) = drive(policy, Contest(), prompts=1, tokens=3)
    cut = [c for c in completions if c.score.status is Status.TRUNCATED]
    assert cut
    assert all(c.score.reward == 0.0 for c in cut)
    scored = Contest()
    scored.score_truncated = True  # type: ignore[attr-defined]

    async def all_right(prompt: Prompt, episodes: list[Episode]) -> list[Score]:
        return [Score(0.5) for _ in episodes]

    scored._judge = all_right
    (completions,) = drive(policy, scored, prompts=1, tokens=3)
    assert {(c.score.reward, c.score.status) for c in completions if c.score.status.value == "truncated"} == {
        (0.5, Status.TRUNCATED)
    }


def test_a_judge_that_is_no_coroutine_is_refused_before_the_run() -> None:
    class Plain(Contest):
        def judge(self, prompt: Prompt, episodes: list[Episode]) -> list[Score]:  # type: ignore[override]
            return []

    with pytest.raises(ConfigError, match="judge of environment 'contest' must be a coroutine"):
        check_environment(Plain())
