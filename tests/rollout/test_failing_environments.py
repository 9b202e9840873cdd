"""Environments that fail, hang, or hold the loop: what it costs them, and nobody else."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Prompt, Score, Status
from sapo.environments import Answer, Ask, ToolCall, Turn, toolkit
from sapo.environments.side import Side
from sapo.environments.tool_task import converse
from sapo.environments.tools import Tool, Toolbox
from sapo.errors import Interrupted
from sapo.model.policy import Policy
from sapo.rollout.episodes import barrier
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.sandbox import Limits, Outcome, ProgramResult
from support.episode_cases import Game, PlayOf, drive, params
from support.faulty_games import (
    asks_twice_at_once,
    blocks,
    blocks_and_asks,
    cancels_itself,
    clings,
    exits,
    good,
    hangs,
    never_asks,
    no_score,
    not_a_number,
    raises,
    raises_first,
    says_bytes,
    says_too_much,
    says_what_cannot_be_encoded,
    sends_messages,
)
from support.trainer_cases import make_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    import torch

    return make_policy(torch.float32)


FAILURES = {
    raises: "KeyError: 'board' (faulty_games.py:",
    raises_first: "ValueError: no docker (faulty_games.py:",
    exits: "SystemExit: 3",
    hangs: "no answer within 0.2 s",
    clings: "no answer within 0.2 s",
    blocks: "no answer within 0.2 s",
    blocks_and_asks: "no answer within 0.2 s",
    no_score: "TypeError: play must return a Score; got str",
    not_a_number: "ValueError: a reward must be finite",
    says_bytes: "TypeError: an observation must be text or a list of messages; got bytes",
    says_what_cannot_be_encoded: "ValueError: the tokenizer cannot encode the observation",
    sends_messages: "ValueError: messages need a chat template",
    never_asks: "RuntimeError: play asked the model nothing",
    asks_twice_at_once: "RuntimeError: ask was called while the model's turn was open",
    cancels_itself: "CancelledError",
    says_too_much: "ValueError: an observation must have at most 4194304 characters; got 8388608",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("failing", FAILURES, ids=lambda f: f.__name__)
def test_a_failing_environment_costs_its_own_episode_and_moves_no_other_by_a_bit(
    policy: Policy, failing: PlayOf
) -> None:
    async def mixed(prompt: Prompt, ask: Ask) -> Score:
        return await (failing if prompt.id == 0 else good)(prompt, ask)

    turns = TurnsConfig(seconds_per_reply=0.2)
    bad, fine = drive(policy, mixed, turns=turns, engine=OneByOne(policy))
    _, alone = drive(policy, good, turns=turns, engine=OneByOne(policy))
    assert fine == alone
    for completion in bad:
        assert completion.score.status is Status.ENVIRONMENT_ERROR
        assert completion.score.reward == 0.0
        assert completion.score.detail.startswith(FAILURES[failing])


def test_a_failing_environment_moves_others_by_no_more_than_rounding_where_sums_depend_on_the_batch(
    policy: Policy,
) -> None:
    async def mixed(prompt: Prompt, ask: Ask) -> Score:
        return await (raises if prompt.id == 0 else good)(prompt, ask)

    (_, fine), (_, alone) = (drive(policy, play, engine=LocalEngine(policy)) for play in (mixed, good))
    for ours, theirs in zip(fine, alone, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.score == theirs.score
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)


class OneByOne(LocalEngine):
    """An engine that draws each request by itself: sums do not depend on what else is in the batch."""

    def generate(self, requests, params, should_stop=lambda: False, experts=None):
        return [super(OneByOne, self).generate([r], params, should_stop, experts)[0] for r in requests]


def test_answers_are_judged_together_after_the_last_turn_and_off_the_clock(policy: Policy) -> None:
    judged: list[str] = []

    class Judged(Game):
        def verify(self, text: str, prompt: Prompt) -> Score:
            judged.append(text)
            time.sleep(0.15)
            if prompt.id == 1:
                raise ConnectionError("no judge")
            return Score(float(len(text)), figures={"judge": 1.0})

    async def answers(prompt: Prompt, ask: Ask) -> Answer:
        turn = await ask(max_tokens=2 + prompt.id)
        assert not judged
        return Answer(turn.text, {"tools": 2.0})

    game = Judged(answers)
    prompts = [replace(p, token_ids=policy.encode(p.text)) for p in game.held_out(2)]
    driver = EpisodeDriver(policy, LocalEngine(policy), params(policy), TurnsConfig(seconds_per_reply=0.1))
    scored, failed = driver.play([Play(game, p, 2) for p in prompts])
    assert judged == [c.text for c in (*scored, *failed)]
    for completion in scored:
        assert completion.score == Score(float(len(completion.text)), figures={"judge": 1.0, "tools": 2.0})
    for completion in failed:  # the verifier's fault, and not the environment's
        assert completion.score.status is Status.VERIFIER_ERROR
        assert completion.score.detail == "ConnectionError: no judge"


def test_slow_calls_of_the_model_are_answered_with_an_error_and_fail_no_episode(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight episodes run a program each of 0.6 s, two at a time, with 2 s to reply, and then call on and on."""
    running: list[int] = []

    def program(code: str, limits: Limits) -> ProgramResult:
        running.append(1)
        most.append(len(running))
        assert limits.wall_seconds <= 1.6
        time.sleep(0.6)
        running.pop()
        return ProgramResult(Outcome.FINISHED, exit_code=0, signal=None, stdout="6", stderr="", seconds=0.6)

    async def slow(code: str) -> str:
        await asyncio.sleep(0.25)
        return code

    async def runs(prompt: Prompt, ask: Ask) -> Score:
        await ask(max_tokens=1)
        said = await toolkit.python_sandbox("print(6)")
        turns = iter([Turn("", (1,), "stop", (ToolCall("slow", {"code": "1"}),) * 32), Turn("7", (1,), "stop")])

        async def model(observation: object = "", **_: object) -> Turn:
            if not isinstance(observation, str):
                await ask(max_tokens=1)  # a turn begins, with a new time to reply
            return next(turns)

        tool = Tool("slow", slow, {"code": str}, ("code",))
        async with Side() as side:
            _, results = await converse(model, "", Toolbox([tool]), "auto", side)
        lost = [r.text for r in results if r.failed]
        assert lost == ["error: no time left for this call; make fewer in one turn"] * len(lost)
        assert 24 <= len(lost) <= 32
        return Score(float(said))

    most: list[int] = []
    monkeypatch.setattr(toolkit, "run_program", program)
    monkeypatch.setattr(toolkit, "_PLACES", ThreadPoolExecutor(2))
    played = drive(policy, runs, prompts=2, samples=4, turns=TurnsConfig(seconds_per_reply=2))
    assert [c.score for c in sum(played, ())] == [Score(6.0)] * 8
    assert max(most) == 2


def test_an_ask_after_the_end_is_refused_and_harms_nobody(policy: Policy) -> None:
    late: list[BaseException] = []

    async def leaves_a_task(prompt: Prompt, ask: Ask) -> Score:
        async def after() -> None:
            await asyncio.sleep(0.001)
            try:
                await ask("3")
            except RuntimeError as error:
                late.append(error)

        await ask(max_tokens=1)
        kept.append(asyncio.ensure_future(after()))
        return Score(1.0)

    async def mixed(prompt: Prompt, ask: Ask) -> Score:
        if prompt.id == 0:
            return await leaves_a_task(prompt, ask)
        await ask(max_tokens=1)
        await asyncio.sleep(0.1)
        return Score(1.0)

    kept: list[asyncio.Future[None]] = []
    assert {c.score.reward for c in sum(drive(policy, mixed), ())} == {1.0}
    assert [str(error) for error in late] == ["ask was called after the episode had ended"] * 2


def test_what_others_block_is_not_on_an_environments_clock(policy: Policy) -> None:
    async def mixed(prompt: Prompt, ask: Ask) -> Score:
        if prompt.id == 0:
            return await blocks(prompt, ask)
        await ask(max_tokens=1)
        await asyncio.sleep(0.05)
        return Score(1.0)

    blocked, patient = drive(policy, mixed, turns=TurnsConfig(seconds_per_reply=0.3))
    assert {c.score.status for c in blocked} == {Status.ENVIRONMENT_ERROR}
    assert all(c.score == Score(1.0) for c in patient)


def test_the_time_in_which_the_model_draws_is_not_on_the_clock(policy: Policy) -> None:
    class Slow(LocalEngine):
        def generate(self, *args, **options):
            time.sleep(0.3)
            return super().generate(*args, **options)

    played = drive(policy, good, engine=Slow(policy), turns=TurnsConfig(seconds_per_reply=0.2))
    assert all(c.score == Score(1.0) for c in sum(played, ()))


def test_environments_close_what_they_opened_when_a_run_is_stopped(policy: Policy) -> None:
    opened: list[int] = []

    async def opening(prompt: Prompt, ask: Ask) -> Score:
        opened.append(1)
        try:
            while True:
                await ask("1", max_tokens=1)
        finally:
            await asyncio.sleep(0)
            opened.pop()

    stops = iter([False] * 4)
    game = Game(opening)
    prompt = replace(game.train_prompt(0), token_ids=policy.encode("0+1"))
    driver = EpisodeDriver(
        policy, LocalEngine(policy), params(policy), TurnsConfig(max=99), should_stop=lambda: next(stops, True)
    )
    with pytest.raises(Interrupted):
        driver.play([Play(game, prompt, 2)])
    assert opened == []


def test_a_run_is_stopped_while_it_waits_for_environments(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "LOOK_EVERY", 0.05)
    game = Game(hangs)
    prompt = replace(game.train_prompt(0), token_ids=policy.encode("0+1"))
    stops = iter([False])  # before the only token that the engine draws
    driver = EpisodeDriver(
        *(policy, LocalEngine(policy), params(policy), TurnsConfig(seconds_per_reply=600)),
        should_stop=lambda: next(stops, True),
    )
    with pytest.raises(Interrupted):
        driver.play([Play(game, prompt, 1)])


def test_episodes_are_played_inside_a_running_loop_too(policy: Policy) -> None:
    async def notebook() -> list[tuple[Completion, ...]]:
        return drive(policy, good)

    assert asyncio.run(notebook()) == drive(policy, good)
