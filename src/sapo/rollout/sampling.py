"""From logits and one uniform per row to a token and the log-probability it was really sampled with.

Temperature, then top-k, top-p and min-p in transformers' order; what is left is renormalised, and both the draw and the
log-probability are of that distribution. The draw inverts the cumulative distribution, so it is a pure function of
(logits, uniform).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
        """True when no token is cut off, so that the sampler's log-probabilities are the policy's."""
        return self.temperature > 0 and self.top_p == 1.0 and self.top_k == 0 and self.min_p == 0.0


def sample_tokens(logits_RV: Tensor, uniform_R: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_RV: raw logits of the model, float32; may be overwritten.
        uniform_R: float64 in (0, 1), not used when greedy.
        params: temperature and truncation.

    Returns:
        (R,) tokens and (R,) float32 log-probabilities under the distribution sampled from.
    """
    if params.temperature == 0.0:
        tokens_R = logits_RV.argmax(dim=-1)
        return tokens_R, torch.log_softmax(logits_RV, dim=-1).gather(1, tokens_R[:, None])[:, 0]
    logits_RV = truncate(logits_RV if params.temperature == 1.0 else logits_RV / params.temperature, params)
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    # float64: with 150,000 tokens the rounding of a float32 running sum would be visible in the tail.
    cumulative_RV = torch.cumsum(logprobs_RV.exp(), dim=-1, dtype=torch.float64)
    threshold_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    # The first token whose cumulative probability exceeds the threshold: it has a probability above 0.
    tokens_R = torch.searchsorted(cumulative_RV, threshold_R1, right=True)[:, 0].clamp_(max=logits_RV.shape[1] - 1)
    return tokens_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0]


def truncate(logits_RV: Tensor, params: SamplingParams) -> Tensor:
    """Set to -inf what top-k, top-p and min-p leave out, in that order, each on what the one before left."""
    if 0 < params.top_k < logits_RV.shape[1]:
        kth_R1 = torch.topk(logits_RV, params.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, float("-inf"))
    if params.top_p < 1.0:
        ascending_RV, order_RV = torch.sort(logits_RV, dim=-1)
        tail_RV = torch.softmax(ascending_RV, dim=-1).cumsum(dim=-1) <= 1.0 - params.top_p
        tail_RV[:, -1] = False  # the most likely token always stays
        logits_RV = logits_RV.masked_fill(tail_RV.scatter(1, order_RV, tail_RV), float("-inf"))
    if params.min_p > 0.0:
        floor_R1 = logits_RV.max(dim=-1, keepdim=True).values + math.log(params.min_p)
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R1, float("-inf"))
    return logits_RV
