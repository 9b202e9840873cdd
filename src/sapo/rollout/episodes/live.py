"""The state of an episode on its way, and what becomes of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Observation, Prompt, Score, Status
from sapo.data.rollouts import FinishReason
from sapo.environments import Answer, Environment, Episode, Turn
from sapo.environments.failures import EpisodeError
from sapo.rollout.episodes.loops import describe_raised
from sapo.tasks.episodes.line import PlayError


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
class LiveEpisode:
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

    @property
    def length(self) -> int:
        """Return how many tokens the model sees."""
        return len(self.base) + len(self.seen)

    @property
    def scores_truncated(self) -> bool:
        """Return whether its environment scores an episode that a limit cut."""
        return bool(getattr(self.play.environment, "score_truncated", False))


def to_record(episode: LiveEpisode) -> Episode:
    """Return an episode that has ended, as a judge of its group reads it."""
    assert episode.score is not None, "an episode has not ended"
    return Episode(episode.play.prompt, episode.sample, tuple(episode.taken), tuple(episode.heard), score=episode.score)


def to_completion(episode: LiveEpisode) -> Completion:
    """Return an episode that has ended, as it is trained on."""
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


def score_truncated(episode: LiveEpisode) -> Score:
    """Return the score of an episode that a limit cut."""
    return Score(0.0, Status.TRUNCATED, episode.cut)


def score_timeout(episode: LiveEpisode, turns: TurnsConfig) -> Score:
    """Return the score of an episode whose environment took too long."""
    detail = f"no answer within {turns.seconds_per_reply:g} s (rollout.turns.seconds_per_reply)"
    return Score(0.0, Status.ENVIRONMENT_ERROR, f"{detail}, after turn {episode.turns}")


def score_failure(episode: LiveEpisode, error: BaseException) -> Score:
    """Return the score of an episode whose environment failed: what was raised, and where in its code."""
    text = str(error) if isinstance(error, PlayError | EpisodeError) else describe_raised(error)
    return Score(0.0, Status.ENVIRONMENT_ERROR, f"{text}, after turn {episode.turns}")
