"""The protocol of rollout engines: what an engine takes, what it gives, and what it can do.

Engines are found by name in registry.py. Whoever draws speaks to this protocol and knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import Tensor

from sapo.config import RolloutConfig
from sapo.data import Completion, Prompt
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams

# For the annotation only: the protocol needs no transformers.
if TYPE_CHECKING:
    from sapo.model.policy import Policy

Weights = Iterator[tuple[str, Tensor]]
"""Parameters by name, one after the other, so that no more than one needs a copy at a time."""


@dataclass(frozen=True)
class Request:
    """A prompt and how many completions of it to draw.

    >>> Request(Prompt(id=3, task="arithmetic", text="1+1=", token_ids=(1, 10, 1, 14)), samples=8).samples
    8
    """

    prompt: Prompt
    samples: int
    limits: tuple[int, ...] | None = None
    """Most new tokens of each sample, none above `SamplingParams.max_new_tokens`, which holds for all when None."""
    first_sample: int = 0
    """Number of the first sample. The noise of a sample is a function of the seed, the prompt's id and its number."""
    drawn: int = 0
    """Tokens that were drawn of the sample in earlier turns, which the prompt then holds. The noise goes on behind
    theirs, so that a later turn does not repeat that of the first."""
    top_logprobs: int = 0
    """How many of the likeliest tokens a stream gives beside each drawn one, from an engine that can
    (`Capabilities.top_logprobs`)."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.prompt.token_ids:
            raise ValueError(
                f"a request must ask for a sample or more of a prompt of a token or more; got {self.samples} of "
                f"{len(self.prompt.token_ids)} tokens; leave it out"
            )
        if self.limits is not None and (len(self.limits) != self.samples or min(self.limits) < 1):
            raise ValueError(
                f"limits must give each of the {self.samples} samples one token or more; got {self.limits}; "
                "leave them out to hold all to max_new_tokens"
            )


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, so that a recipe that asks for more is refused before the run begins.

    >>> Capabilities(records_experts=True).stop_strings
    True
    """

    records_experts: bool = False
    """`generate` fills the `ExpertLog` it is given. Routing replay R3 needs it."""
    stop_strings: bool = True
    """A completion ends at the strings of `Prompt.stop`."""
    exact_logprobs: bool = True
    """A token's log-probability is that of the distribution it was drawn from. Log pi_old can be taken from the engine,
    and objective.tis weigh by it, only where that holds."""
    top_logprobs: bool = False
    """`stream` gives the likeliest tokens beside each drawn one where a request asks for them."""
    copies_weights: bool = False
    """It samples with a copy of the weights in a form of its own, so that a run proves from time to time that the copy
    is the policy's (`rollout.parity_every`)."""


Likeliest = tuple[tuple[int, float], ...]
"""Tokens and log-probabilities in the distribution that a token was drawn from, the likeliest first. Those that cannot
be drawn are left out."""


@dataclass(frozen=True)
class Drawn:
    """New tokens of a sample that is being drawn.

    >>> Drawn(request=0, sample=2, token_ids=(17,), logprobs=(-0.25,)).completion is None
    True
    """

    request: int
    """Place of the sample's request among those asked for."""
    sample: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    completion: Completion | None = None
    """All of the sample, beside the last of its tokens."""
    likeliest: tuple[Likeliest, ...] = ()
    """Of each token, where the request asks for them; otherwise empty."""


def longest_request(requests: Sequence[Request], params: SamplingParams) -> tuple[int, int]:
    """Return the tokens of the prompt and the most new tokens of the request that may become the longest sequence."""
    lengths = ((len(r.prompt.token_ids), max(r.limits or (params.max_new_tokens,))) for r in requests)
    return max(lengths, key=sum)


def max_length_of(engine: Engine) -> int | None:
    """Return the longest sequence that an engine holds, prompt and completion; None where only the model limits it.

    An engine says so by an attribute `max_length`, which most have no need for.
    """
    length: int | None = getattr(engine, "max_length", None)
    return length


def check_lengths(requests: Sequence[Request], params: SamplingParams, limit: int | None) -> None:
    """Refuse requests that do not fit the positions of the model, or the sampling settings.

    Args:
        limit: positions of the model, None where its config does not say.

    Raises:
        ValueError: the rule, and the way out.
    """
    longest, new = longest_request(requests, params)
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"prompt and completion must fit the model's {limit} positions; got a prompt of {longest} tokens and "
            f"max_new_tokens {new}; shorten one of them"
        )
    most = max((max(r.limits) for r in requests if r.limits), default=0)
    if most > params.max_new_tokens:
        raise ValueError(
            f"a sample's limit must not exceed max_new_tokens; got {most} and {params.max_new_tokens}; raise that"
        )


class Engine(Protocol):
    """Draws completions.

    An engine samples with the weights it was given last. The driver of a run wakes it, gives it weights, draws, and
    lets it sleep again (`weights.loaded`), so that an engine may leave the device's memory to the trainer in between.
    In the free schedule it stays awake, draws again and again, and is given newer weights between two calls.
    """

    capabilities: ClassVar[Capabilities]
    version: int
    """Updates made by the weights it holds, skipped ones counted."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return the completions of each request, in order: token ids, log-probabilities and text, not yet scored.

        An engine that takes newer weights while it draws gives `Completion.versions`; others leave it empty.

        Args:
            experts: takes down which experts every token went through; given only to an engine that can record them.

        Raises:
            Interrupted: when `should_stop` says so between two tokens.
        """
        ...

    def set_weights(self, weights: Weights, version: int) -> None:
        """Take the weights to sample with, until the next ones are set.

        Args:
            weights: every parameter of the policy by its name there, tied ones once. The tensors may be the trainer's
                own: they are read, never written, and hold these values only until the next update.
            version: updates made by these weights.
        """
        ...

    def sleep(self) -> None:
        """Give back the memory of weights and cache; nothing is drawn until `wake`, after which weights are set."""
        ...

    def wake(self) -> None:
        """Make ready to take weights again."""
        ...

    def close(self) -> None:
        """End for good: give back all memory, processes and connections."""
        ...


class TokenStream(Protocol):
    """Draws of some requests: an iterator, as a generator is, that can be closed before its end."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> list[Drawn]: ...

    def close(self) -> None:
        """End the draws, and give their memory back."""
        ...


class StreamingEngine(Engine, Protocol):
    """An engine that gives tokens while it draws."""

    interleaves: ClassVar[bool]
    """Several streams may be open, each of them taken a step when it is asked for its next tokens. An engine may draw
    for all that are open in one step."""

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> TokenStream:
        """Yield the tokens of every sample as they are drawn, the same ones that `generate` returns."""
        ...


class RecipeEngine(Engine, Protocol):
    """An engine whose class a recipe can name in `rollout.engine`."""

    @classmethod
    def from_settings(cls, policy: Policy, settings: RolloutConfig) -> Self:
        """Make the engine of a recipe.

        Args:
            policy: the one trained. Its model, tokenizer and device may be read and are not to be changed.
            settings: the recipe's section `rollout`.
        """
        ...
