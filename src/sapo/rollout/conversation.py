"""Draw the turns of episodes: what an engine remembers between the turns of the same samples.

An engine that has a method `converse` keeps what it computed of an episode, and reads only what was said since. Any
other engine is asked for each turn anew, with the whole history as its prompt. The turns are the same: a request says
all that the model is to see, so that what an engine remembers can save work and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sapo.data import Completion
from sapo.rollout.engine import Engine, Request
from sapo.rollout.params import SamplingParams


class Conversation(Protocol):
    """Draws turn after turn of the same samples, at the weights that the engine had when it began."""

    in_place: bool
    """Samples go on where they stand; otherwise their histories are computed anew for each turn."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Completion, ...]]:
        """Return the next turn of each request, in order; see `Engine.generate`.

        A request for a later turn is of one sample, has that sample's number, and its prompt is all that the model has
        seen and drawn before. Samples that are not asked for now may be asked for later.

        Args:
            params: those the conversation began with, except for `max_new_tokens`, the most that a turn may have.

        Raises:
            Interrupted: when `should_stop` says so between two tokens.
        """
        ...

    def close(self) -> None:
        """Forget all samples and give their memory back."""
        ...


class Waves:
    """A conversation with an engine that remembers nothing: each turn is a call of its `generate`."""

    in_place = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Completion, ...]]:
        """See `Conversation.generate`."""
        return self._engine.generate(requests, params, should_stop)

    def close(self) -> None:
        """See `Conversation.close`."""


def begin_conversation(engine: Engine, params: SamplingParams) -> Conversation:
    """Begin a conversation with an engine, in waves where it has no other way.

    Args:
        params: of sampling; `max_new_tokens` is the most that is drawn of a sample in all its turns.
    """
    converse: Callable[[SamplingParams], Conversation] | None = getattr(engine, "converse", None)
    return Waves(engine) if converse is None else converse(params)
