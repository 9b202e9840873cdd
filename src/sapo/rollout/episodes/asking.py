"""What an environment is given to ask the model with, and the budgets that an ask has to fit in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sapo.config.rollout import TurnsConfig
from sapo.data.transcripts import speakers_of
from sapo.environments import Messages, OutOfBudget, Turn
from sapo.environments.failures import WHILE_OPEN, check_observation
from sapo.model.policy import Policy
from sapo.rollout.episodes.barrier import Barrier
from sapo.rollout.episodes.joining import Joiner, encode_observation
from sapo.rollout.episodes.live import LiveEpisode, score_timeout


class Budgets:
    """The limits of an episode.

    Args:
        turns: limits of turns.
        max_new_tokens: most that is drawn in an episode.
        length: most tokens of an episode, its prompt counted.
    """

    def __init__(self, turns: TurnsConfig, max_new_tokens: int, length: float) -> None:
        self.turns, self.max_new_tokens, self.length = turns, max_new_tokens, length

    def name_spent(self, episode: LiveEpisode, observed: int) -> str:
        """Name the budget that leaves no room for another turn after so many tokens of observation."""
        most = self.turns.max
        if episode.turns >= most:
            return f"no turns were left of {most} (rollout.turns.max)"
        return self.name_full(episode, observed)

    def name_full(self, episode: LiveEpisode, observed: int = 0) -> str:
        """Name the budget of tokens that leaves no room for one more token."""
        if len(episode.token_ids) >= self.max_new_tokens:
            return f"no tokens were left of {self.max_new_tokens} (rollout.max_new_tokens)"
        if episode.length + observed >= self.length:
            return f"no positions were left of {self.length} (rollout.turns.length, or the model's or engine's)"
        return ""

    def limit_turn(self, episode: LiveEpisode, observed: int, max_tokens: int | None) -> None:
        """Set the most tokens of the turn that is asked for after so many tokens of observation."""
        left = self.max_new_tokens - len(episode.token_ids)
        room = self.length - episode.length - observed
        budget, own = min(left, room), self.turns.tokens_per_turn
        episode.limit = int(min(budget, own or budget, max_tokens or budget))
        episode.by_budget = episode.limit == budget and episode.limit != max_tokens


class LiveAsk:
    """What an environment is given; see `environments.Ask` and `environments.TokenAsk`.

    Args:
        policy: its tokenizer encodes what is said.
        joiner: encodes what is said between the turns of a chat; None for plain text.
    """

    def __init__(
        self, episode: LiveEpisode, budgets: Budgets, barrier: Barrier, policy: Policy, joiner: Joiner | None
    ) -> None:
        self._episode, self._budgets, self._barrier = episode, budgets, barrier
        self._policy, self._joiner = policy, joiner
        self.seed = episode.seed

    async def __call__(self, observation: str | Messages = "", *, max_tokens: int | None = None) -> Turn:
        """Show the model an observation and return its answer."""
        self._check(max_tokens)
        ids, text = self._encode(observation)
        speakers = () if isinstance(observation, str) else speakers_of(observation)
        return await self._await_turn((ids, text, None), speakers, max_tokens)

    async def go_on(self, history: Sequence[int], *, max_tokens: int | None = None) -> Turn:
        """Let the model go on from a history that another has encoded.

        What it shares with what the model has seen stays, and the rest is an observation.
        """
        self._check(max_tokens)
        episode, ids = self._episode, tuple(history)
        if not ids:
            raise ValueError("a history must have a token or more; got none")
        vocabulary = self._policy.head_weight.shape[0]
        if not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise ValueError(f"a history must have token ids from 0 to {vocabulary - 1}; use the model's tokenizer")
        if episode.play.prompt.pictures:
            raise ValueError("a history that was encoded elsewhere has no pictures; use prompts of text alone")
        seen = (*episode.base, *episode.seen)
        kept = next((i for i, (a, b) in enumerate(zip(seen, ids, strict=False)) if a != b), min(len(seen), len(ids)))
        if not episode.turns and kept == len(ids) < len(seen):
            kept -= 1  # nothing is said then, and the first turn needs no observation: let the last token be one
        return await self._await_turn((ids[kept:], "", kept if kept < len(seen) else None), (), max_tokens)

    def _check(self, max_tokens: int | None) -> None:
        episode = self._episode
        if episode.score is not None:
            raise RuntimeError("ask was called after the episode had ended")
        if episode.asked is not None:
            raise RuntimeError(WHILE_OPEN)
        turns = self._barrier.turns
        if self._barrier.seconds(episode) > turns.seconds_per_reply:  # it held the loop, which nothing interrupts
            episode.score = score_timeout(episode, turns)
            raise RuntimeError(episode.score.detail)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more; got {max_tokens}; leave it out")

    def _encode(self, observation: str | Messages) -> tuple[tuple[int, ...], str]:
        """Return the ids of what an environment says, and its text.

        Raises:
            TypeError, ValueError: it is neither text nor messages, or cannot be encoded.
        """
        check_observation(observation)
        joiner, episode = self._joiner, self._episode
        if isinstance(observation, str):
            if joiner is None or not observation:
                return (encode_observation(self._policy, observation) if observation else ()), observation
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

    async def _await_turn(
        self,
        said: tuple[tuple[int, ...], str, int | None],
        speakers: tuple[tuple[str, int], ...],
        max_tokens: int | None,
    ) -> Turn:
        """Wait for the turn that answers an observation, where the budgets leave room for one."""
        episode = self._episode
        ids, _, kept = said
        observed = len(ids) - (0 if kept is None else episode.length - kept)
        if not episode.cut:
            episode.cut = self._budgets.name_spent(episode, observed)
        if episode.cut:
            await asyncio.sleep(0)  # an environment that asks on and on can then be cancelled
            raise OutOfBudget(episode.cut)
        self._budgets.limit_turn(episode, observed, max_tokens)
        episode.said = said
        episode.speakers = speakers
        episode.asked = asyncio.get_running_loop().create_future()
        self._barrier.end_thinking(episode)
        return await episode.asked
