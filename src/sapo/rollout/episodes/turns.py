"""Draw turns: one of every episode that asks for one, in one call of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sapo.data import Completion, Observation, Prompt
from sapo.environments import Turn
from sapo.model.policy import Policy
from sapo.rollout.conversation import Conversation
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request
from sapo.rollout.episodes.asking import Budgets
from sapo.rollout.episodes.barrier import Barrier
from sapo.rollout.episodes.live import LiveEpisode
from sapo.rollout.params import SamplingParams


class TurnDrawer:
    """Draws the turns of the episodes of a wave and hands them to their environments.

    Args:
        policy: reads what was drawn.
        conversation: with the engine.
        params: of sampling; `max_new_tokens` is the most that is drawn in an episode.
        should_stop: asked by the engine between two tokens.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        conversation: Conversation,
        params: SamplingParams,
        budgets: Budgets,
        barrier: Barrier,
        should_stop: Callable[[], bool],
    ) -> None:
        self._policy, self._engine, self._conversation, self._params = policy, engine, conversation, params
        self._budgets, self._barrier, self._should_stop = budgets, barrier, should_stop

    def draw(self, asking: Sequence[LiveEpisode]) -> None:
        """Draw a turn of each episode.

        Raises:
            ConfigError: the engine gave something other than it was asked for.
            Interrupted: when `should_stop` says so.
        """
        requests, members = self._group(asking)
        params = replace(self._params, max_new_tokens=max(e.limit for e in asking))
        drawn = draw(self._engine, requests, params, self._should_stop, conversation=self._conversation)
        for episodes, completions in zip(members, drawn, strict=True):
            for episode, completion in zip(episodes, completions, strict=True):
                self._take(episode, completion)

    def _group(self, asking: Sequence[LiveEpisode]) -> tuple[list[Request], list[list[LiveEpisode]]]:
        """Return the requests of a wave, and the episodes of each. Samples that answer the same are drawn as one."""
        requests: list[Request] = []
        members: list[list[LiveEpisode]] = []
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
                    follow_prompt(episode, ids, kept),
                    1,
                    (episode.limit,),
                    first_sample=episode.sample,
                    drawn=len(episode.token_ids),
                )
            )
            members.append([episode])
        return requests, members

    def _take(self, episode: LiveEpisode, drawn: Completion) -> None:
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
            episode.cut = self._budgets.name_full(episode)
        episode.text = self._read(episode.play.prompt, own)
        turn = Turn(episode.text, own, drawn.finish_reason, logprobs=tuple(drawn.logprobs.tolist()))
        episode.taken.append(turn)
        episode.heard.append(text)
        asked, episode.asked, episode.said = episode.asked, None, None
        self._barrier.begin_thinking(episode)
        if not asked.done():  # an environment that cancelled its own ask
            asked.set_result(turn)

    def _read(self, prompt: Prompt, own: tuple[int, ...]) -> str:
        ended = own[-1] in self._params.stop_token_ids
        read = self._policy.show if prompt.special_tokens else self._policy.decode
        return read(own[:-1] if ended else own)


def follow_prompt(episode: LiveEpisode, ids: tuple[int, ...], kept: int | None) -> Prompt:
    """Return a prompt with what followed it, whose tokens have their places in the text on all axes."""
    prompt = episode.play.prompt
    history = (*episode.base, *episode.seen)[:kept]
    tokens = prompt.picture_tokens
    if tokens is not None and tokens.positions is not None:
        length = len(history) - len(prompt.token_ids) + len(ids)
        further = range(prompt.next_position, prompt.next_position + length)
        tokens = replace(tokens, positions=tuple((*axis, *further) for axis in tokens.positions))
    return replace(prompt, token_ids=(*history, *ids), picture_tokens=tokens)
