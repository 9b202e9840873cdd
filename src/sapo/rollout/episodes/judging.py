"""Judge groups: an environment may score the episodes of one prompt side by side, when all of them have ended.

`async def judge(self, prompt, episodes) -> list[Score]` gets the episodes that did not fail and returns a score for
each, which takes the place of that of `play`. All groups of a batch are judged at a time, in one loop; the seconds for
which one judge holds it are not on another's clock. A judge that raises, takes too long or returns something else costs
its own group alone.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.environments import Episode
from sapo.rollout.episodes.loops import describe_raised, time_steps
from sapo.tasks.base import checked_score
from sapo.tasks.episodes.wire import GRACE


@dataclass(frozen=True)
class GroupToJudge:
    """The episodes of one prompt, and whose judgement they wait for.

    >>> from sapo.environments.games import Guess
    >>> GroupToJudge(Guess(), Prompt(0, "guess", "15="), ()).episodes
    ()
    """

    environment: Any
    prompt: Prompt
    episodes: tuple[Episode, ...]


def has_judge(environment: Any) -> bool:
    """Return whether an environment judges groups."""
    return callable(getattr(environment, "judge", None))


async def judge_groups(groups: Sequence[GroupToJudge], seconds: float) -> list[list[Score] | str]:
    """Return the scores of each group, or why there are none.

    Args:
        seconds: that a judge has, without those for which others hold the loop.
    """
    started, held = time.perf_counter(), [0.0] * len(groups)

    def spent(place: int) -> float:
        return time.perf_counter() - started - (sum(held) - held[place])

    async def judge(place: int) -> list[Score] | str:
        def hold(seconds: float) -> None:
            held[place] += seconds

        try:
            scores = await time_steps(_judge(groups[place]), hold)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return f"{describe_raised(error)}, in judge"
        return late if spent(place) > seconds else scores

    late = f"no judgement within {seconds:g} s (rollout.turns.seconds_per_reply)"
    found: list[list[Score] | str] = [late] * len(groups)
    places = {asyncio.create_task(judge(place)): place for place in range(len(groups))}
    pending = set(places)
    try:
        while pending:
            left = max(0.0, min(seconds - spent(places[task]) for task in pending))
            done, pending = await asyncio.wait(pending, timeout=left + 0.01, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                found[places[task]] = task.result()
            pending = {task for task in pending if spent(places[task]) <= seconds}
    finally:
        for task in (unfinished := [task for task in places if not task.done()]):
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=GRACE)
    return found


async def _judge(group: GroupToJudge) -> list[Score]:
    """Call one judge, and check what it returns.

    Raises:
        TypeError, ValueError: it is not a finite score for each episode.
    """
    made = group.environment.judge(group.prompt, list(group.episodes))
    if not inspect.iscoroutine(made):
        raise TypeError(f"judge must be a coroutine (async def judge); got {type(made).__name__}")
    returned = await made
    number = len(group.episodes)
    if not isinstance(returned, list | tuple) or len(returned) != number:
        got = f"{len(returned)}" if isinstance(returned, list | tuple) else type(returned).__name__
        raise ValueError(f"judge must return a list with a score for each of the {number} episodes; got {got}")
    scores = [checked_score(score, "judge") for score in returned]
    for score, episode in zip(scores, group.episodes, strict=True):
        check_turn_rewards(score, len(episode.turns))
    return scores


def check_turn_rewards(score: Score, turns: int) -> None:
    """Refuse another number of rewards than there are turns.

    Raises:
        ValueError: it is another.
    """
    if score.turn_rewards and len(score.turn_rewards) != turns:
        raise ValueError(
            f"turn_rewards must be one for each of the {turns} turns that were drawn; got {len(score.turn_rewards)}"
        )


def put_in_place(old: Score, new: Score, *, scores_truncated: bool) -> Score:
    """Return a judge's score in place of that of `play`: an episode that a limit cut stays one.

    Args:
        scores_truncated: such episodes have the judge's reward too.
    """
    figures = {**old.figures, **new.figures}
    if old.status is Status.TRUNCATED and not scores_truncated:
        return replace(old, figures=figures)
    status = old.status if old.status is Status.TRUNCATED else new.status
    return replace(new, status=status, figures=figures, answer=old.answer if new.answer is None else new.answer)
