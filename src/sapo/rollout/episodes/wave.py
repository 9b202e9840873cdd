"""One wave after the other: one call of `EpisodeDriver.play`."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sapo.data import Completion, Score, Status
from sapo.environments import Answer, OutOfBudget
from sapo.environments.clock import CLOCK
from sapo.environments.wrapping import Wrapped
from sapo.rollout.conversation import begin_conversation
from sapo.rollout.episodes.asking import Budgets, LiveAsk
from sapo.rollout.episodes.barrier import Barrier, EpisodeClock
from sapo.rollout.episodes.judging import GroupToJudge, check_turn_rewards, has_judge, judge_groups, put_in_place
from sapo.rollout.episodes.live import (
    LiveEpisode,
    Play,
    score_failure,
    score_timeout,
    score_truncated,
    to_completion,
    to_record,
)
from sapo.rollout.episodes.loops import run_to_end, time_steps
from sapo.rollout.episodes.turns import TurnDrawer
from sapo.tasks import score_groups
from sapo.tasks.base import checked_score
from sapo.tasks.episodes.elsewhere import Elsewhere
from sapo.tasks.episodes.wire import GRACE
from sapo.utils.hashing import seed_for
from sapo.utils.spans import span

if TYPE_CHECKING:
    from sapo.rollout.episodes.driver import EpisodeDriver


class Wave:
    """One call of `EpisodeDriver.play`."""

    def __init__(self, driver: EpisodeDriver, plays: Sequence[Play], elsewhere: Mapping[int, Elsewhere]) -> None:
        self.driver = driver
        self.plays = plays
        self._elsewhere = elsewhere
        seed = driver.params.seed
        self.episodes = [
            LiveEpisode(
                *(play, place, sample, seed_for(seed, f"episode/{play.prompt.task}/{play.prompt.id}/{sample}")),
                base=play.prompt.token_ids,
            )
            for place, play in enumerate(plays)
            for sample in range(play.samples)
        ]
        self._barrier = Barrier(driver.turns)
        self._budgets = Budgets(driver.turns, driver.params.max_new_tokens, driver.length)

    async def run(self) -> None:
        """Play to the end."""
        driver = self.driver
        tasks: dict[int, asyncio.Task[None]] = {}
        conversation = begin_conversation(driver.engine, driver.params)
        drawer = TurnDrawer(
            *(driver.policy, driver.engine, conversation, driver.params, self._budgets, self._barrier),
            should_stop=driver.should_stop,
        )
        waited = drawn = 0.0
        try:
            for episode in self.episodes:
                self._barrier.begin_thinking(episode)
                tasks[id(episode)] = asyncio.create_task(self._live(episode))
            while True:
                began = time.perf_counter()
                with span("environment"):
                    await self._barrier.wait_quiet(tasks, driver.should_stop)
                quiet = time.perf_counter()
                waited += quiet - began
                asking = [e for e in self.episodes if e.score is None and e.asked is not None]
                if not asking:
                    break
                drawer.draw(asking)
                drawn += time.perf_counter() - quiet
        finally:
            conversation.close()
            driver.times.add(self._barrier.replies, waited=waited, drawn=drawn)
            for task in tasks.values():
                task.cancel()
            if tasks:
                await asyncio.wait(tasks.values(), timeout=GRACE)

    def judge(self) -> None:
        """Let the verifiers score the episodes that ended with an answer, all at a time."""
        waiting = [[e for e in self.episodes if e.place == place and e.answer] for place in range(len(self.plays))]
        asked = [(play, episodes) for play, episodes in zip(self.plays, waiting, strict=True) if episodes]
        items = [
            (_find_judge(p.environment), p.prompt, [Completion((), (), "stop", e.answer.text) for e in es if e.answer])
            for p, es in asked
        ]
        for (_, episodes), judged in zip(asked, score_groups(items), strict=True):
            for episode, completion in zip(episodes, judged, strict=True):
                assert episode.answer is not None, "it waits for its verdict"
                score = completion.score
                status = Status.TRUNCATED if episode.cut and not score.status.failed else score.status
                episode.score = replace(score, status=status, figures={**score.figures, **episode.answer.figures})

    def judge_groups(self) -> None:
        """Let environments judge the episodes of each prompt side by side, all prompts at a time."""
        members = [
            [e for e in self.episodes if e.place == place and e.score is not None and not e.score.status.failed]
            for place, play in enumerate(self.plays)
            if has_judge(play.environment)
        ]
        members = [episodes for episodes in members if episodes]
        if not members:
            return
        groups = [
            GroupToJudge(own[0].play.environment, own[0].play.prompt, tuple(map(to_record, own))) for own in members
        ]
        with span("environment"):
            judged = run_to_end(judge_groups(groups, self.driver.turns.seconds_per_reply))
        for episodes, found in zip(members, judged, strict=True):
            for place, episode in enumerate(episodes):
                assert episode.score is not None, "it has ended"
                if isinstance(found, str):
                    episode.score = Score(0.0, Status.ENVIRONMENT_ERROR, found)
                else:
                    truncated = episode.scores_truncated
                    episode.score = put_in_place(episode.score, found[place], scores_truncated=truncated)

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return the episodes as completions, by prompt and sample."""
        found: list[list[Completion]] = [[] for _ in self.plays]
        for episode in self.episodes:
            found[episode.place].append(to_completion(episode))
        return [tuple(completions) for completions in found]

    async def _live(self, episode: LiveEpisode) -> None:
        """Run one `play` to its score."""
        play = episode.play
        CLOCK.set(EpisodeClock(self._barrier, episode))  # of this task alone
        score: Score
        try:
            player = self._elsewhere.get(id(play.environment), play.environment)
            made = player.play(play.prompt, self._ask_of(episode))
            if not inspect.iscoroutine(made):
                raise TypeError(f"play must be a coroutine (async def play); got {type(made).__name__}")
            returned = await time_steps(made, lambda seconds: self._barrier.hold(episode, seconds))
            score = self._score(episode, returned)
        except OutOfBudget as error:
            score = score_truncated(episode) if episode.cut else score_failure(episode, error)
        except asyncio.CancelledError as error:
            score = score_truncated(episode) if episode.cut else score_failure(episode, error)
        except (Exception, SystemExit) as error:
            score = score_truncated(episode) if episode.cut else score_failure(episode, error)
        self._end(episode, score)

    def _ask_of(self, episode: LiveEpisode) -> LiveAsk:
        driver = self.driver
        joiner = driver.joiners.get(episode.play.prompt.task)
        return LiveAsk(episode, self._budgets, self._barrier, driver.policy, joiner)

    def _score(self, episode: LiveEpisode, returned: Any) -> Score:
        if not (episode.turns or episode.cut):
            raise RuntimeError("play asked the model nothing")
        if isinstance(returned, Answer):
            score = checked_score(Score(0.0, figures=dict(returned.figures)))  # until it is judged
            if not isinstance(returned.text, str):
                raise TypeError(f"an answer must be a text; got {type(returned.text).__name__}")
            if episode.score is None and (not episode.cut or episode.scores_truncated):
                episode.answer = returned
        else:
            score = checked_score(returned, "play")
            check_turn_rewards(score, episode.turns)
        if episode.cut and not episode.scores_truncated:
            return replace(score_truncated(episode), figures=score.figures)
        return replace(score, status=Status.TRUNCATED) if episode.cut else score

    def _end(self, episode: LiveEpisode, score: Score) -> None:
        if episode.score is None:  # one that ran out of time has its score already
            late = self._barrier.seconds(episode) > self.driver.turns.seconds_per_reply and episode.asked is None
            episode.score = score_timeout(episode, self.driver.turns) if late else score
            episode.answer = None if late else episode.answer
        episode.asked = None
        self._barrier.end_thinking(episode)


def _find_judge(environment: Any) -> Any:
    """Return the task whose verifier judges the answers: that within, whose workers take them side by side."""
    while isinstance(environment, Wrapped) and type(environment).verify is Wrapped.verify:
        environment = environment.source
    return environment
