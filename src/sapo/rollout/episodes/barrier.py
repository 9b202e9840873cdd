"""The barrier of a wave: which environments are thinking, and for how long.

Environments share one loop. The seconds for which one of them holds it are not on the clock of another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from sapo.config.rollout import TurnsConfig
from sapo.errors import Interrupted
from sapo.rollout.episodes.live import LiveEpisode, score_timeout

LOOK_EVERY = 1.0
"""Seconds of waiting for environments between two looks whether the run is to stop."""


class Barrier:
    """Knows whose turn it is: a wave is drawn when no environment is thinking.

    Args:
        turns: has the seconds of a reply.
    """

    def __init__(self, turns: TurnsConfig) -> None:
        self.turns = turns
        self.replies: list[float] = []
        """Seconds of each reply so far."""
        self._thinking: dict[int, LiveEpisode] = {}
        self._held = 0.0
        self._quiet = asyncio.Event()

    def begin_thinking(self, episode: LiveEpisode) -> None:
        """Start the clock of an environment whose turn it is."""
        episode.since, episode.others = time.perf_counter(), self._held - episode.held
        episode.waits = 0
        self._thinking[id(episode)] = episode
        self._quiet.clear()

    def end_thinking(self, episode: LiveEpisode) -> None:
        """Note that an environment has asked or ended."""
        if self._thinking.pop(id(episode), None) is not None:
            self.replies.append(self.seconds(episode))
        if not self._thinking:
            self._quiet.set()

    def hold(self, episode: LiveEpisode, seconds: float) -> None:
        """Note for how long a step of an environment held the loop."""
        self._held += seconds
        episode.held += seconds

    def seconds(self, episode: LiveEpisode) -> float:
        """Return how long an environment has been thinking, without what others held the loop for."""
        if episode.waits:
            return episode.stood
        others = self._held - episode.held - episode.others
        return time.perf_counter() - episode.since - others

    @contextmanager
    def paused(self, episode: LiveEpisode) -> Iterator[None]:
        """Let the clock of an episode stand still."""
        if not episode.waits:
            episode.stood = self.seconds(episode)
        since = episode.since
        episode.waits += 1
        try:
            yield
        finally:
            if episode.since == since and episode.waits:  # otherwise the turn is over, and its clock
                episode.waits -= 1
                if not episode.waits:
                    episode.since += self.seconds(episode) - episode.stood

    async def wait_quiet(self, tasks: Mapping[int, asyncio.Task[None]], should_stop: Callable[[], bool]) -> None:
        """Wait until every environment has asked or ended, and end those that take too long.

        Args:
            tasks: by the id of its episode, the task that plays it.

        Raises:
            Interrupted: when `should_stop` says so in a long wait.
        """
        most = self.turns.seconds_per_reply
        looked = time.perf_counter()
        while self._thinking:
            left = max(0.0, min(most - self.seconds(e) for e in self._thinking.values()))
            try:
                await asyncio.wait_for(self._quiet.wait(), min(left + 0.01, LOOK_EVERY))
            except TimeoutError:
                await asyncio.sleep(0)
                if time.perf_counter() - looked >= LOOK_EVERY:
                    looked = time.perf_counter()
                    if should_stop():
                        raise Interrupted from None
                for episode in [e for e in self._thinking.values() if self.seconds(e) > most]:
                    episode.score = score_timeout(episode, self.turns)
                    tasks[id(episode)].cancel()
                    self.end_thinking(episode)


class EpisodeClock:
    """The clock of one episode; see `environments.clock.Clock`."""

    def __init__(self, barrier: Barrier, episode: LiveEpisode) -> None:
        self._barrier, self._episode = barrier, episode
        self.most = barrier.turns.seconds_per_reply

    def seconds(self) -> float:
        """Return how many seconds are spent."""
        return self._barrier.seconds(self._episode)

    def paused(self) -> AbstractContextManager[None]:
        """Leave out the time that passes inside."""
        return self._barrier.paused(self._episode)
