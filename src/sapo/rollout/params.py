"""How completions are drawn: the settings of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sapo.config import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a completion is drawn.

    >>> SamplingParams(max_new_tokens=8).full_distribution
    True
    """

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy: the most likely token, whose log-probability is that of the untempered distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, rollout: RolloutConfig, seed: int, stop_token_ids: Iterable[int]) -> SamplingParams:
        """Make the sampling settings of a recipe under a seed.

        Args:
            stop_token_ids: the model's own; the recipe's are added.
        """
        return cls(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            seed=seed,
            stop_token_ids=frozenset(stop_token_ids) | set(rollout.stop_token_ids),
        )

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "be finite and not negative (0 is greedy)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "lie in (0, 1]; 1 keeps every token"),
            ("top_k", self.top_k >= 0, "not be negative; 0 keeps every token"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "lie in [0, 1]; 0 keeps every token"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must {rule}; got {getattr(self, name)}")

    @property
    def full_distribution(self) -> bool:
        """Return whether no token is cut off, so that the sampler's log-probabilities are the policy's."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0
