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

import inspect
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion
from sapo.environments import Drawing, TokenEnvironment
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.rollout.engine import Engine, max_length_of
from sapo.rollout.episodes.joining import Joiner
from sapo.rollout.episodes.judging import has_judge
from sapo.rollout.episodes.live import Play
from sapo.rollout.episodes.loops import run_to_end
from sapo.rollout.episodes.reply_times import ReplyTimes
from sapo.rollout.episodes.wave import Wave
from sapo.rollout.params import SamplingParams
from sapo.tasks.episodes.elsewhere import Elsewhere
from sapo.tasks.episodes.origin import origin_of
from sapo.tasks.episodes.pool import Host, host_of


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
        wave = Wave(self, plays, self._elsewhere(plays))
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
