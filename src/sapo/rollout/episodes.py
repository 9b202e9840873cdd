"""Play episodes: coroutines of environments on one side, an engine on the other, turn by turn in waves.

In a wave the engine draws a turn of every episode that asks for one. It begins when every environment has answered, has
ended or has run out of time, so that the result depends on the recipe and the seed and not on who answered first. What
was drawn stays as it is: the history of an episode is a list of token ids. Only what an environment says is encoded.

Who is to blame decides what becomes of an episode. The policy is for an episode that ran out of turns or tokens, be it
inside its last turn: it is truncated, with reward 0. The environment is for an exception, a hang, or a score that is
none: the episode has the status environment_error and leaves loss and baseline. No other episode moves by a bit, with
an engine whose sums do not depend on the batch; with others the rest rounds as in a smaller batch.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Observation, Prompt, Score, Status
from sapo.data.rollouts import FinishReason
from sapo.data.transcripts import speakers_of
from sapo.environments import (
    Answer,
    Drawing,
    Environment,
    Episode,
    Messages,
    OutOfBudget,
    TokenEnvironment,
    Turn,
    is_environment,
)
from sapo.environments.clock import CLOCK
from sapo.environments.failures import WHILE_OPEN, EpisodeError, check_observation
from sapo.environments.wrapping import Wrapped
from sapo.errors import ConfigError, Interrupted
from sapo.model.policy import Policy
from sapo.rollout.bridge import Bridge
from sapo.rollout.conversation import begin_conversation
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request, max_length_of
from sapo.rollout.judging import GroupToJudge, check_turn_rewards, has_judge, judge_groups, put_in_place
from sapo.rollout.loops import clocked, raised, run_to_end
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.reply_times import ReplyTimes
from sapo.tasks import score_groups
from sapo.tasks.base import checked_score
from sapo.tasks.episodes.origin import origin_of
from sapo.tasks.episodes.pool import Elsewhere, Host, PlayError, host_of
from sapo.tasks.episodes.wire import GRACE
from sapo.utils.hashing import seed_for
from sapo.utils.spans import span

LOOK_EVERY = 1.0
"""Seconds of waiting for environments between two looks whether the run is to stop."""


class Joiner(Protocol):
    """Encodes what is said between two turns of a chat."""

    def between(self, messages: Messages, last: int | None) -> tuple[int, ...]:
        """Return the ids between an answer, whose last id is given, and the next one."""
        ...


@dataclass(frozen=True)
class Play:
    """Samples of one prompt to be played.

    >>> from sapo.environments.games import Guess
    >>> Play(Guess(), Prompt(0, "guess", "15=", token_ids=(1, 5, 3)), samples=8).samples
    8
    """

    environment: Environment
    prompt: Prompt
    """Encoded, with the strings that end a turn."""
    samples: int


@dataclass
class _Episode:
    """One sample on its way: what has been drawn and said, and whose turn it is."""

    play: Play
    place: int
    sample: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    base: tuple[int, ...] = ()
    """Ids of the prompt that the model sees: all of them, unless a history that another encoded begins otherwise."""
    seen: list[int] = field(default_factory=list)
    """All ids after these that the model sees."""
    taken: list[Turn] = field(default_factory=list)
    """Its turns, for a judge of the group."""
    heard: list[str] = field(default_factory=list)
    """What was said before each of them."""
    turns: int = 0
    text: str = ""
    """Of the last turn."""
    finish: FinishReason = "stop"
    cut: str = ""
    """Which budget ended it, in words; empty while none did."""
    asked: asyncio.Future[Turn] | None = None
    """What its environment waits for."""
    said: tuple[tuple[int, ...], str, int | None] | None = None
    """Observation of the present ask, not yet part of the episode: ids, text, and how many ids before it stay."""
    speakers: tuple[tuple[str, int], ...] = ()
    """Who speaks in it."""
    limit: int = 0
    """Most tokens of the turn that is asked for."""
    by_budget: bool = False
    """The limit is what the episode has left, and not one of a single turn."""
    answer: Answer | None = None
    """What the verifier is to judge once all have ended."""
    score: Score | None = None
    """Set when it has ended."""
    since: float = 0.0
    """When its environment began to think."""
    others: float = 0.0
    """Seconds that other environments had held the loop until then."""
    held: float = 0.0
    """Seconds for which its environment has held the loop."""
    waits: int = 0
    """How many of its calls wait for what others have; the clock then stands still."""
    stood: float = 0.0
    """Where it stands."""


class _Ask:
    """What an environment is given; see `environments.Ask`."""

    def __init__(self, driver: _Wave, episode: _Episode) -> None:
        self._driver, self._episode = driver, episode
        self.seed = episode.seed

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        """Show the model an observation and return its answer."""
        return await self._driver.ask(self._episode, observation, max_tokens)

    async def go_on(self, history: Sequence[int], *, max_tokens: int | None = None) -> Turn:
        """Let the model go on from a history that another has encoded; see `environments.TokenAsk`."""
        return await self._driver.go_on(self._episode, history, max_tokens)


class _Clock:
    """The clock of one episode; see `environments.clock.Clock`."""

    def __init__(self, wave: _Wave, episode: _Episode) -> None:
        self._wave, self._episode = wave, episode
        self.most = wave.driver.turns.seconds_per_reply

    def seconds(self) -> float:
        return self._wave._seconds(self._episode)

    def paused(self) -> AbstractContextManager[None]:
        return self._wave._paused(self._episode)


class EpisodeDriver:
    """Plays episodes of environments with an engine.

    Args:
        policy: its tokenizer encodes what environments say.
        engine: draws the turns; any engine does.
        params: of sampling; `max_new_tokens` is the most that is drawn in an episode.
        turns: the other limits.
        joiners: by task: how what is said between turns of a chat is encoded. Tasks without one are in plain text.
        should_stop: asked by the engine between two tokens, and while environments are waited for.
        times: gets the times of the waves, where they are of interest.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        params: SamplingParams,
        turns: TurnsConfig,
        joiners: Mapping[str, Joiner] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        times: ReplyTimes | None = None,
    ) -> None:
        self.policy, self.engine, self.params, self.turns = policy, engine, params, turns
        self.times = times or ReplyTimes()
        self.joiners = joiners or {}
        self.should_stop = should_stop
        lengths = [n for n in (turns.length, policy.max_length, max_length_of(engine)) if n is not None]
        self.length = min(lengths, default=math.inf)
        """Most tokens of an episode, its prompt counted."""

    def play(self, plays: Sequence[Play]) -> list[tuple[Completion, ...]]:
        """Play all samples of all prompts and return them scored, in order.

        Raises:
            ConfigError: the engine gave something other than it was asked for; see `draw`.
            Interrupted: when `should_stop` says so. Environments are cancelled, and nothing is kept.
        """
        self._prepare(plays)
        wave = _Wave(self, plays, self._elsewhere(plays))
        run_to_end(wave.run())
        wave.judge()
        wave.judge_groups()
        return wave.completions()

    def _prepare(self, plays: Sequence[Play]) -> None:
        """Tell environments that encode what the model reads by which tokenizer, and how is drawn.

        Raises:
            TaskError: one could not make itself ready.
        """
        for environment in {id(play.environment): play.environment for play in plays}.values():
            if isinstance(environment, TokenEnvironment):
                length = None if math.isinf(self.length) else int(self.length)
                stops, temperature = tuple(sorted(self.params.stop_token_ids)), self.params.temperature
                save = self.policy.tokenizer.save_pretrained
                environment.prepare(Drawing(save, length, self.params.max_new_tokens, temperature, stops))

    def _elsewhere(self, plays: Sequence[Play]) -> dict[int, Elsewhere]:
        """Return, by their ids, the environments that play in processes of their own, which have loaded them.

        Raises:
            TaskError: one could not be loaded there.
        """
        found: dict[int, Elsewhere] = {}
        for environment in {id(play.environment): play.environment for play in plays}.values():
            if (host := host_for(environment, self.turns)) is not None:
                host.ready()
                found[id(environment)] = Elsewhere(host, self.turns.seconds_per_reply)
        if found:
            _allow_sockets(sum(play.samples for play in plays))
        return found


def host_for(environment: Any, turns: TurnsConfig) -> Host | None:
    """Return the host that plays an environment; None of one that plays in this process."""
    origin = origin_of(environment)
    return None if origin is None or turns.play_in != "process" else host_of(origin, turns.env)


def _allow_sockets(number: int) -> None:
    """Raise this process's own limit of open files where so many episodes need more, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Wave:
    """One call of `EpisodeDriver.play`."""

    def __init__(self, driver: EpisodeDriver, plays: Sequence[Play], elsewhere: Mapping[int, Elsewhere]) -> None:
        self.driver = driver
        self.plays = plays
        self._elsewhere = elsewhere
        seed = driver.params.seed
        self.episodes = [
            _Episode(
                *(play, place, sample, seed_for(seed, f"episode/{play.prompt.task}/{play.prompt.id}/{sample}")),
                base=play.prompt.token_ids,
            )
            for place, play in enumerate(plays)
            for sample in range(play.samples)
        ]
        self._thinking: dict[int, _Episode] = {}
        self._replies: list[float] = []
        self._held = 0.0
        self._quiet = asyncio.Event()

    async def run(self) -> None:
        """Play to the end."""
        tasks = []
        self._conversation = begin_conversation(self.driver.engine, self.driver.params)
        waited = drawn = 0.0
        try:
            for episode in self.episodes:
                self._begins_to_think(episode)
                tasks.append(asyncio.create_task(self._live(episode)))
            while True:
                began = time.perf_counter()
                with span("environment"):
                    await self._all_quiet(tasks)
                quiet = time.perf_counter()
                waited += quiet - began
                asking = [e for e in self.episodes if e.score is None and e.asked is not None]
                if not asking:
                    break
                self._draw(asking)
                drawn += time.perf_counter() - quiet
        finally:
            self._conversation.close()
            self.driver.times.add(self._replies, waited=waited, drawn=drawn)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=GRACE)

    def judge(self) -> None:
        """Let the verifiers score the episodes that ended with an answer, all at a time."""
        waiting = [[e for e in self.episodes if e.place == place and e.answer] for place in range(len(self.plays))]
        asked = [(play, episodes) for play, episodes in zip(self.plays, waiting, strict=True) if episodes]
        items = [
            (_judge_of(p.environment), p.prompt, [Completion((), (), "stop", e.answer.text) for e in es if e.answer])
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
            GroupToJudge(own[0].play.environment, own[0].play.prompt, tuple(map(_as_read, own))) for own in members
        ]
        with span("environment"):
            judged = run_to_end(judge_groups(groups, self.driver.turns.seconds_per_reply))
        for episodes, found in zip(members, judged, strict=True):
            for place, episode in enumerate(episodes):
                assert episode.score is not None, "it has ended"
                if isinstance(found, str):
                    episode.score = Score(0.0, Status.ENVIRONMENT_ERROR, found)
                else:
                    truncated = self._scores_truncated(episode)
                    episode.score = put_in_place(episode.score, found[place], scores_truncated=truncated)

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return the episodes as completions, by prompt and sample."""
        found: list[list[Completion]] = [[] for _ in self.plays]
        for episode in self.episodes:
            found[episode.place].append(_completion(episode))
        return [tuple(completions) for completions in found]

    # ----------------------------------------------------------------------------------------------- the environments

    async def _live(self, episode: _Episode) -> None:
        """Run one `play` to its score."""
        play = episode.play
        CLOCK.set(_Clock(self, episode))  # of this task alone
        score: Score
        try:
            player = self._elsewhere.get(id(play.environment), play.environment)
            made = player.play(play.prompt, _Ask(self, episode))
            if not inspect.iscoroutine(made):
                raise TypeError(f"play must be a coroutine (async def play); got {type(made).__name__}")
            returned = await clocked(made, lambda seconds: self._hold(episode, seconds))
            score = self._score(episode, returned)
        except OutOfBudget as error:
            score = _truncated(episode) if episode.cut else _failed(episode, error)
        except asyncio.CancelledError as error:
            score = _truncated(episode) if episode.cut else _failed(episode, error)
        except (Exception, SystemExit) as error:
            score = _truncated(episode) if episode.cut else _failed(episode, error)
        self._end(episode, score)

    def _score(self, episode: _Episode, returned: Any) -> Score:
        if not (episode.turns or episode.cut):
            raise RuntimeError("play asked the model nothing")
        if isinstance(returned, Answer):
            score = checked_score(Score(0.0, figures=dict(returned.figures)))  # until it is judged
            if not isinstance(returned.text, str):
                raise TypeError(f"an answer must be a text; got {type(returned.text).__name__}")
            if episode.score is None and (not episode.cut or self._scores_truncated(episode)):
                episode.answer = returned
        else:
            score = checked_score(returned, "play")
            check_turn_rewards(score, episode.turns)
        if episode.cut and not self._scores_truncated(episode):
            return replace(_truncated(episode), figures=score.figures)
        return replace(score, status=Status.TRUNCATED) if episode.cut else score

    @staticmethod
    def _scores_truncated(episode: _Episode) -> bool:
        return bool(getattr(episode.play.environment, "score_truncated", False))

    def _end(self, episode: _Episode, score: Score) -> None:
        if episode.score is None:  # one that ran out of time has its score already
            late = self._seconds(episode) > self.driver.turns.seconds_per_reply and episode.asked is None
            episode.score = _timed_out(episode, self.driver.turns) if late else score
            episode.answer = None if late else episode.answer
        episode.asked = None
        self._stops_thinking(episode)

    async def ask(self, episode: _Episode, observation: str | Messages, max_tokens: int | None) -> Turn:
        """Wait for the model's next turn; see `environments.Ask`."""
        self._check_ask(episode, max_tokens)
        ids, text = self._encoded(episode, observation)
        speakers = () if isinstance(observation, str) else speakers_of(observation)
        return await self._next_turn(episode, (ids, text, None), speakers, max_tokens)

    async def go_on(self, episode: _Episode, history: Sequence[int], max_tokens: int | None) -> Turn:
        """Wait for the model's next turn after a history that was encoded elsewhere; see `environments.TokenAsk`.

        What it shares with what the model has seen stays, and the rest is an observation.
        """
        self._check_ask(episode, max_tokens)
        ids = tuple(history)
        if not ids:
            raise ValueError("a history must have a token or more; got none")
        vocabulary = self.driver.policy.head_weight.shape[0]
        if not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise ValueError(f"a history must have token ids from 0 to {vocabulary - 1}; use the model's tokenizer")
        if episode.play.prompt.pictures:
            raise ValueError("a history that was encoded elsewhere has no pictures; use prompts of text alone")
        seen = (*episode.base, *episode.seen)
        kept = next((i for i, (a, b) in enumerate(zip(seen, ids, strict=False)) if a != b), min(len(seen), len(ids)))
        if not episode.turns and kept == len(ids) < len(seen):
            kept -= 1  # nothing is said then, and the first turn needs no observation: let the last token be one
        return await self._next_turn(episode, (ids[kept:], "", kept if kept < len(seen) else None), (), max_tokens)

    def _check_ask(self, episode: _Episode, max_tokens: int | None) -> None:
        if episode.score is not None:
            raise RuntimeError("ask was called after the episode had ended")
        if episode.asked is not None:
            raise RuntimeError(WHILE_OPEN)
        if self._seconds(episode) > self.driver.turns.seconds_per_reply:  # it held the loop, which nothing interrupts
            episode.score = _timed_out(episode, self.driver.turns)
            raise RuntimeError(episode.score.detail)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more; got {max_tokens}; leave it out")

    async def _next_turn(
        self,
        episode: _Episode,
        said: tuple[tuple[int, ...], str, int | None],
        speakers: tuple[tuple[str, int], ...],
        max_tokens: int | None,
    ) -> Turn:
        """Wait for the turn that answers an observation, where the budgets leave room for one."""
        ids, _, kept = said
        dropped = 0 if kept is None else self._length(episode) - kept
        if not episode.cut:
            episode.cut = self._spent(episode, len(ids) - dropped)
        if episode.cut:
            await asyncio.sleep(0)  # an environment that asks on and on can then be cancelled
            raise OutOfBudget(episode.cut)
        left = self.driver.params.max_new_tokens - len(episode.token_ids)
        room = self.driver.length - self._length(episode) - len(ids) + dropped
        budget, own = min(left, room), self.driver.turns.tokens_per_turn
        episode.limit = int(min(budget, own or budget, max_tokens or budget))
        episode.by_budget = episode.limit == budget and episode.limit != max_tokens
        episode.said = said
        episode.speakers = speakers
        episode.asked = asyncio.get_running_loop().create_future()
        self._stops_thinking(episode)
        return await episode.asked

    def _spent(self, episode: _Episode, observed: int) -> str:
        """Name the budget that leaves no room for another turn after so many tokens of observation."""
        most = self.driver.turns.max
        if episode.turns >= most:
            return f"no turns were left of {most} (rollout.turns.max)"
        return self._full(episode, observed)

    def _full(self, episode: _Episode, observed: int = 0) -> str:
        """Name the budget of tokens that leaves no room for one more token."""
        if len(episode.token_ids) >= self.driver.params.max_new_tokens:
            return f"no tokens were left of {self.driver.params.max_new_tokens} (rollout.max_new_tokens)"
        if self._length(episode) + observed >= self.driver.length:
            return f"no positions were left of {self.driver.length} (rollout.turns.length, or the model's or engine's)"
        return ""

    @staticmethod
    def _length(episode: _Episode) -> int:
        return len(episode.base) + len(episode.seen)

    def _encoded(self, episode: _Episode, observation: str | Messages) -> tuple[tuple[int, ...], str]:
        """Return the ids of what an environment says, and its text.

        Raises:
            TypeError, ValueError: it is neither text nor messages, or cannot be encoded.
        """
        check_observation(observation)
        joiner = self.driver.joiners.get(episode.play.prompt.task)
        if isinstance(observation, str):
            if joiner is None or not observation:
                return (encode_observation(self.driver.policy, observation) if observation else ()), observation
            messages: Messages = [{"role": "user", "content": observation}]
        else:
            messages = observation
        if joiner is None:
            raise ValueError(
                "messages need a chat template, and the prompts of this task are in plain text; ask with text"
            )
        last = episode.seen[-1] if episode.seen else None
        text = "\n".join(str(m.get("content", "")) for m in messages)
        return joiner.between(messages, last), text

    # -------------------------------------------------------------------------------------------------- the barrier

    def _begins_to_think(self, episode: _Episode) -> None:
        episode.since, episode.others = time.perf_counter(), self._held - episode.held
        episode.waits = 0
        self._thinking[id(episode)] = episode
        self._quiet.clear()

    def _stops_thinking(self, episode: _Episode) -> None:
        if self._thinking.pop(id(episode), None) is not None:
            self._replies.append(self._seconds(episode))
        if not self._thinking:
            self._quiet.set()

    def _hold(self, episode: _Episode, seconds: float) -> None:
        self._held += seconds
        episode.held += seconds

    def _seconds(self, episode: _Episode) -> float:
        """Return how long an environment has been thinking, without what others held the loop for."""
        if episode.waits:
            return episode.stood
        others = self._held - episode.held - episode.others
        return time.perf_counter() - episode.since - others

    @contextmanager
    def _paused(self, episode: _Episode) -> Iterator[None]:
        """Let the clock of an episode stand still."""
        if not episode.waits:
            episode.stood = self._seconds(episode)
        since = episode.since
        episode.waits += 1
        try:
            yield
        finally:
            if episode.since == since and episode.waits:  # otherwise the turn is over, and its clock
                episode.waits -= 1
                if not episode.waits:
                    episode.since += self._seconds(episode) - episode.stood

    async def _all_quiet(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait until every environment has asked or ended, and end those that take too long.

        Raises:
            Interrupted: when `should_stop` says so in a long wait.
        """
        most = self.driver.turns.seconds_per_reply
        by_episode = dict(zip(map(id, self.episodes), tasks, strict=True))
        looked = time.perf_counter()
        while self._thinking:
            left = max(0.0, min(most - self._seconds(e) for e in self._thinking.values()))
            try:
                await asyncio.wait_for(self._quiet.wait(), min(left + 0.01, LOOK_EVERY))
            except TimeoutError:
                await asyncio.sleep(0)
                if time.perf_counter() - looked >= LOOK_EVERY:
                    looked = time.perf_counter()
                    if self.driver.should_stop():
                        raise Interrupted from None
                for episode in [e for e in self._thinking.values() if self._seconds(e) > most]:
                    episode.score = _timed_out(episode, self.driver.turns)
                    by_episode[id(episode)].cancel()
                    self._stops_thinking(episode)

    # ------------------------------------------------------------------------------------------------------ the model

    def _draw(self, asking: Sequence[_Episode]) -> None:
        """Draw a turn of each episode."""
        requests, members = self._requests(asking)
        most = max(e.limit for e in asking)
        params = replace(self.driver.params, max_new_tokens=most)
        should_stop, conversation = self.driver.should_stop, self._conversation
        drawn = draw(self.driver.engine, requests, params, should_stop, conversation=conversation)
        for episodes, completions in zip(members, drawn, strict=True):
            for episode, completion in zip(episodes, completions, strict=True):
                self._take(episode, completion)

    def _requests(self, asking: Sequence[_Episode]) -> tuple[list[Request], list[list[_Episode]]]:
        """Return the requests of a wave, and the episodes of each. Samples that answer the same are drawn as one."""
        requests: list[Request] = []
        members: list[list[_Episode]] = []
        for episode in asking:
            assert episode.said is not None, "an episode that asks has said something, if only nothing"
            ids, _, kept = episode.said
            same = members[-1] if members else []
            if (
                same
                and not episode.seen
                and not same[-1].seen
                and same[-1].place == episode.place
                and same[-1].sample == episode.sample - 1
                and same[-1].said == episode.said
            ):
                same.append(episode)
                requests[-1] = replace(requests[-1], samples=len(same), limits=tuple(member.limit for member in same))
                continue
            requests.append(
                Request(
                    _followed(episode, ids, kept),
                    1,
                    (episode.limit,),
                    first_sample=episode.sample,
                    drawn=len(episode.token_ids),
                )
            )
            members.append([episode])
        return requests, members

    def _take(self, episode: _Episode, drawn: Completion) -> None:
        """Make a turn part of its episode and hand it to the environment."""
        assert episode.said is not None, "a turn answers an ask"
        assert episode.asked is not None, "a turn answers an ask"
        ids, text, kept = episode.said
        if episode.turns or ids:
            said = Observation(len(episode.token_ids), ids, text, kept, speakers=episode.speakers)
            episode.observations.append(said)
        if kept is not None:
            episode.seen = episode.seen[: max(0, kept - len(episode.base))]
            episode.base = episode.base[:kept]
        own = tuple(drawn.token_ids.tolist())
        episode.seen += [*ids, *own]
        episode.token_ids += own
        episode.logprobs += drawn.logprobs.tolist()
        episode.versions += drawn.versions
        episode.turns += 1
        episode.finish = drawn.finish_reason
        if episode.by_budget and drawn.finish_reason == "length":
            episode.cut = self._full(episode)
        episode.text = self._text(episode.play.prompt, own)
        turn = Turn(episode.text, own, drawn.finish_reason, logprobs=tuple(drawn.logprobs.tolist()))
        episode.taken.append(turn)
        episode.heard.append(text)
        asked, episode.asked, episode.said = episode.asked, None, None
        self._begins_to_think(episode)
        if not asked.done():  # an environment that cancelled its own ask
            asked.set_result(turn)

    def _text(self, prompt: Prompt, own: tuple[int, ...]) -> str:
        ended = own[-1] in self.driver.params.stop_token_ids
        read = self.driver.policy.show if prompt.special_tokens else self.driver.policy.decode
        return read(own[:-1] if ended else own)


def _followed(episode: _Episode, ids: tuple[int, ...], kept: int | None) -> Prompt:
    """Return a prompt with what followed it, whose tokens have their places in the text on all axes."""
    prompt = episode.play.prompt
    history = (*episode.base, *episode.seen)[:kept]
    tokens = prompt.picture_tokens
    if tokens is not None and tokens.positions is not None:
        length = len(history) - len(prompt.token_ids) + len(ids)
        further = range(prompt.next_position, prompt.next_position + length)
        tokens = replace(tokens, positions=tuple((*axis, *further) for axis in tokens.positions))
    return replace(prompt, token_ids=(*history, *ids), picture_tokens=tokens)


class PlainJoiner:
    """Joins the contents of messages by line ends, for tools and environments of others in plain text.

    Args:
        policy: its tokenizer encodes them, with nothing special in it.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def between(self, messages: Messages, last: int | None) -> tuple[int, ...]:
        """Return the ids of what messages say.

        Raises:
            ValueError: one has no text, or the tokenizer cannot encode it.
        """
        contents = [message.get("content") for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise ValueError(f"a message must have a content of text; got {contents!r:.80}")
        return encode_observation(self._policy, "\n".join(map(str, contents)))


def joiners_for(policy: Policy, task: Any, form: PromptFormat, prompt: Prompt) -> dict[str, Joiner]:
    """Return, by its name, how what an environment says between turns is encoded; nothing where it says plain text.

    Args:
        prompt: any of its prompts.

    Raises:
        ModelError: the chat template has no way from one turn to the next that could be proven.
    """
    if not is_environment(task) or isinstance(task, TokenEnvironment):  # which encodes for itself
        return {}
    if not form.is_chat(policy, prompt):
        speaks = isinstance(task, Wrapped) or hasattr(task, "toolbox")  # in messages, whatever the prompts are
        return {task.name: PlainJoiner(policy)} if speaks else {}
    return {task.name: Bridge.prove(policy.tokenizer, form.tools(prompt), form.thinking)}


def encode_observation(policy: Policy, text: str) -> tuple[int, ...]:
    """Encode what an environment says as plain text: a special token that is spelled out in it stays text.

    Raises:
        ValueError: the tokenizer cannot encode it.
    """
    try:
        encoded = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a character it does not know
        raise ValueError(f"the tokenizer cannot encode the observation {text[:80]!r}: {error}") from error
    return tuple(encoded["input_ids"])


def check_environment(task: Any) -> None:
    """Refuse an environment that could not be played.

    Raises:
        ConfigError: `play` or `judge` is not async, or held-out prompts are missing.
    """
    if not inspect.iscoroutinefunction(task.play):
        raise ConfigError(f"play of environment {task.name!r} must be a coroutine; write `async def play(self, ...)`")
    if has_judge(task) and not inspect.iscoroutinefunction(task.judge):
        raise ConfigError(f"judge of environment {task.name!r} must be a coroutine; write `async def judge(self, ...)`")
    for method in ("train_prompt", "held_out"):
        if not callable(getattr(task, method, None)):
            raise ConfigError(f"environment {task.name!r} must have the method {method}; see sapo.environments")


def _as_read(episode: _Episode) -> Episode:
    assert episode.score is not None, "an episode has not ended"
    return Episode(episode.play.prompt, episode.sample, tuple(episode.taken), tuple(episode.heard), score=episode.score)


def _completion(episode: _Episode) -> Completion:
    assert episode.score is not None, "an episode has not ended"
    return Completion(
        token_ids=episode.token_ids,
        logprobs=episode.logprobs,
        finish_reason="length" if episode.cut else episode.finish,
        text=episode.text,
        score=episode.score,
        versions=tuple(episode.versions),
        observations=tuple(episode.observations),
    )


def _judge_of(environment: Any) -> Any:
    """Return the task whose verifier judges the answers: that within, whose workers take them side by side."""
    while isinstance(environment, Wrapped) and type(environment).verify is Wrapped.verify:
        environment = environment.source
    return environment


def _truncated(episode: _Episode) -> Score:
    return Score(0.0, Status.TRUNCATED, episode.cut)


def _timed_out(episode: _Episode, turns: TurnsConfig) -> Score:
    detail = f"no answer within {turns.seconds_per_reply:g} s (rollout.turns.seconds_per_reply)"
    return Score(0.0, Status.ENVIRONMENT_ERROR, f"{detail}, after turn {episode.turns}")


def _failed(episode: _Episode, error: BaseException) -> Score:
    """Return the score of an episode whose environment failed: what was raised, and where in its code."""
    text = str(error) if isinstance(error, PlayError | EpisodeError) else raised(error)
    return Score(0.0, Status.ENVIRONMENT_ERROR, f"{text}, after turn {episode.turns}")
