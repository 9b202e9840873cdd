"""What every rollout engine answers to, and the requests it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sapo.data import Completion, Prompt
from sapo.rollout.params import SamplingParams


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


class Engine(Protocol):
    """Draws completions from the current policy."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order; token ids, log-probabilities and text, not yet scored.

        Raises:
            Interrupted: when `should_stop` says so between two tokens.
        """
        ...
