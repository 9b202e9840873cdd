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
    copies_weights: bool = False
    """It samples with a copy of the weights in a form of its own, so that a run proves from time to time that the copy
    is the policy's (`rollout.parity_every`)."""


def check_lengths(requests: Sequence[Request], params: SamplingParams, limit: int | None) -> None:
    """Refuse requests that do not fit the positions of the model, or the sampling settings.

    Args:
        limit: positions of the model, None where its config does not say.

    Raises:
        ValueError: the rule, and the way out.
    """
    longest = max(len(r.prompt.token_ids) for r in requests)
    if limit is not None and longest + params.max_new_tokens > limit:
        raise ValueError(
            f"prompt and completion must fit the model's {limit} positions; got a prompt of {longest} tokens and "
            f"max_new_tokens {params.max_new_tokens}; shorten one of them"
        )
    most = max((max(r.limits) for r in requests if r.limits), default=0)
    if most > params.max_new_tokens:
        raise ValueError(
            f"a sample's limit must not exceed max_new_tokens; got {most} and {params.max_new_tokens}; raise that"
        )


class Engine(Protocol):
    """Draws completions. A class that a recipe names in `rollout.engine` has all of this.

    An engine samples with the weights it was given last. The driver of a run wakes it, gives it weights, draws, and
    lets it sleep again (`weights.loaded`), so that an engine may leave the device's memory to the trainer in between.
    """

    capabilities: ClassVar[Capabilities]
    version: int
    """Updates made by the weights it holds, skipped ones counted."""

    @classmethod
    def from_settings(cls, policy: Policy, settings: RolloutConfig) -> Self:
        """Make the engine of a recipe.

        Args:
            policy: the one trained. Its model, tokenizer and device may be read and are not to be changed.
            settings: the recipe's section `rollout`.
        """
        ...

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return the completions of each request, in order: token ids, log-probabilities and text, not yet scored.

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
