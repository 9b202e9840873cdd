"""Draw completions from an engine and check that what came is what was asked for.

An engine may be a class of the user's own, so its output is checked before anything is scored or trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sapo.data import Completion
from sapo.errors import ConfigError
from sapo.rollout.conversation import Conversation
from sapo.rollout.engine import Engine, Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams


def draw(
    engine: Engine,
    requests: Sequence[Request],
    params: SamplingParams,
    should_stop: Callable[[], bool] = lambda: False,
    experts: ExpertLog | None = None,
    conversation: Conversation | None = None,
) -> list[tuple[Completion, ...]]:
    """Return the completions of each request, in order; see `Engine.generate`.

    Args:
        conversation: with the engine, of which they are the next turns.

    Raises:
        ConfigError: the engine gave another number of groups, of samples or of log-probabilities than it was asked for.
        Interrupted: when `should_stop` says so between two tokens.
    """
    recorded: dict[str, Any] = {} if experts is None else {"experts": experts}
    generate = engine.generate if conversation is None else conversation.generate
    drawn = generate(requests, params, should_stop, **recorded)
    if not isinstance(drawn, Sequence):
        raise _wrong(engine, "a list with the completions of each request", type(drawn).__name__)
    if len(drawn) != len(requests):
        raise _wrong(engine, f"the completions of each of the {len(requests)} requests", f"those of {len(drawn)}")
    for place, (request, completions) in enumerate(zip(requests, drawn, strict=True)):
        _check_group(engine, place, request, completions)
    return drawn


def _check_group(engine: Engine, place: int, request: Request, completions: Any) -> None:
    where = f"request {place} (prompt {request.prompt.id})"
    if not isinstance(completions, Sequence):
        raise _wrong(engine, f"a tuple of completions for {where}", type(completions).__name__)
    if len(completions) != request.samples:
        raise _wrong(engine, f"{request.samples} completions for {where}", str(len(completions)))
    for sample, completion in enumerate(completions):
        if not isinstance(completion, Completion):
            raise _wrong(engine, f"a sapo.data.Completion as sample {sample} of {where}", type(completion).__name__)
        tokens, logprobs = len(completion.token_ids), len(completion.logprobs)
        if not tokens or tokens != logprobs:
            rule = f"a token or more and a log-probability of each in sample {sample} of {where}"
            raise _wrong(engine, rule, f"{tokens} tokens and {logprobs} log-probabilities")
        versions = completion.versions
        if versions and sum(count for count, _ in versions) != tokens:
            rule = f"versions of all {tokens} tokens of sample {sample} of {where}, or none"
            raise _wrong(engine, rule, f"{versions}")


def _wrong(engine: Engine, asked: str, came: str) -> ConfigError:
    name = f"{type(engine).__module__}:{type(engine).__qualname__}"
    return ConfigError(f"rollout.engine {name} must give {asked}; got {came}; mend its generate()")
