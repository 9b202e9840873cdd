"""From logits and one uniform per row to a token and the log-probability it was really sampled with.

Temperature, then top-k, top-p and min-p in transformers' order; what is left is renormalised, and both the draw and the
log-probability are of that distribution. The draw inverts the cumulative distribution, so it is a pure function of
(logits, uniform).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapo.rollout.engine import Likeliest, Request
from sapo.rollout.local.cpu.native import kernels
from sapo.rollout.local.cpu.packed import draw
from sapo.rollout.params import SamplingParams
from sapo.utils.rng import token_uniforms

# Of a large vocabulary top-p looks at so many tokens first: they hold .95 of nearly every distribution of a language
# model, and finding them is twenty times cheaper than sorting 49,152.
NUCLEUS_TOKENS = 256


def request_uniforms(request: Request, params: SamplingParams) -> NDArray[np.float64]:
    """Draw the uniforms of a request's samples, (samples, max_new_tokens), behind those of their earlier turns."""
    samples = np.arange(request.first_sample, request.first_sample + request.samples)
    drawn = request.drawn
    return token_uniforms(params.seed, request.prompt.id, samples, drawn + params.max_new_tokens)[:, drawn:]


def sample_tokens(
    logits_RV: Tensor, uniform_R: Tensor, params: SamplingParams, look: bool = True, unused_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_RV: raw logits of the model, float32; may be overwritten.
        uniform_R: float64 in (0, 1), not used when greedy.
        params: temperature and truncation.
        look: whether the host may read numbers of the device to save work. The same tokens are drawn without, and their
            log-probabilities are the same except for the rounding of the compiled draw.
        unused_K: token ids that are never drawn (`Policy.unused_tokens`).

    Returns:
        (R,) tokens and (R,) float32 log-probabilities under the distribution sampled from.
    """
    if unused_K is not None:
        logits_RV.index_fill_(1, unused_K, float("-inf"))
    if params.temperature == 0.0:
        tokens_R = logits_RV.argmax(dim=-1)
        return tokens_R, torch.log_softmax(logits_RV, dim=-1).gather(1, tokens_R[:, None])[:, 0]
    # The compiled draw reads the numbers themselves, which a step that is traced or captured must not.
    native = kernels(logits_RV.device, logits_RV.dtype) if look and logits_RV.dtype == torch.float32 else None
    if native is not None and not native.packed_precisions:
        native = None
    if native is not None and params.full_distribution:
        return draw(native, logits_RV, uniform_R, params.temperature)
    if params.temperature != 1.0:
        logits_RV = logits_RV.div_(params.temperature)
    logits_RV = truncate(logits_RV, params, look)
    if native is not None:
        return draw(native, logits_RV, uniform_R, 1.0)
    blocks = _Blocks(logits_RV.shape[1])
    top_R1, likeliest_R1 = blocks.reduce(torch.amax, logits_RV).max(dim=-1, keepdim=True)
    # From here on probabilities relative to the likeliest token's, in place of the logits.
    weight_RV = logits_RV.sub_(top_R1).exp_()
    tokens_R1, total_R1 = blocks.invert(weight_RV, likeliest_R1, uniform_R[:, None])
    drawn_R1 = weight_RV.gather(1, tokens_R1)
    return tokens_R1[:, 0], (drawn_R1.double().log_() - total_R1.log_())[:, 0].float()


def likeliest_tokens(
    logits_RV: Tensor, params: SamplingParams, count: int, unused_K: Tensor | None = None
) -> list[Likeliest]:
    """Return the likeliest tokens of each row in the distribution that `sample_tokens` draws from.

    Args:
        logits_RV: raw logits of the model, float32; left as they are.
        count: most tokens of a row; those that cannot be drawn are left out.
    """
    if unused_K is not None:
        logits_RV = logits_RV.index_fill(1, unused_K, float("-inf"))
    if params.temperature > 0.0:
        logits_RV = truncate(logits_RV / params.temperature, params)
    top_RK, token_RK = logits_RV.topk(min(count, logits_RV.shape[1]), dim=-1)
    logprob_RK = top_RK - torch.logsumexp(logits_RV, dim=-1, keepdim=True)
    rows = zip(token_RK.tolist(), logprob_RK.tolist(), strict=True)
    return [tuple((t, p) for t, p in zip(*row, strict=True) if p > float("-inf")) for row in rows]


class _Blocks:
    """The vocabulary in blocks of about its square root, for draws that never look at all of it in float64.

    A running sum over the vocabulary has to be float64, since with 150,000 tokens the rounding of a float32 one shows
    in the tail, and takes ten times as long as all else. Here the weights are summed in blocks, the running sum goes
    over blocks, and then over the tokens of the one block that a draw falls into.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.size = 1 << max(4, round(math.log2(vocabulary) / 2))
        self.whole = vocabulary // self.size

    def reduce(self, reduction: Callable[..., Tensor], source_RV: Tensor) -> Tensor:
        """Reduce each block, the last of which may be shorter: (R, blocks)."""
        covered = self.whole * self.size
        parts = []
        if covered:
            parts.append(reduction(source_RV[:, :covered].unflatten(1, (self.whole, self.size)), dim=-1))
        if covered < self.vocabulary:
            parts.append(reduction(source_RV[:, covered:], dim=-1, keepdim=True))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def invert(self, weight_RV: Tensor, likeliest_R1: Tensor, uniform_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Find the first token of each row whose cumulative weight exceeds uniform x total, and the total, (R, 1) each.

        Args:
            weight_RV: float32, at most 1.
            likeliest_R1: the block that holds a weight of 1.
        """
        sums_RB = self.reduce(torch.sum, weight_RV).double()
        # Beside a weight of 1 a float32 sum loses those of many unlikely tokens, so this block is summed in float64.
        sums_RB.scatter_(1, likeliest_R1, self._tokens(weight_RV, likeliest_R1).sum(dim=-1, keepdim=True))
        cumulative_RB = sums_RB.cumsum(dim=-1)
        total_R1 = cumulative_RB[:, -1:].contiguous()
        block_R1, rest_R1 = _cross(sums_RB, cumulative_RB, uniform_R1 * total_R1)
        inside_RS = self._tokens(weight_RV, block_R1)
        token_R1, _ = _cross(inside_RS, inside_RS.cumsum(dim=-1), rest_R1)
        return (block_R1 * self.size + token_R1).clamp_(max=self.vocabulary - 1), total_R1

    def _tokens(self, weight_RV: Tensor, block_R1: Tensor) -> Tensor:
        """Return (R, size) float64 weights of one block of each row; places beyond the vocabulary weigh nothing."""
        place_RS = block_R1 * self.size + torch.arange(self.size, device=weight_RV.device)
        if self.whole * self.size == self.vocabulary:
            return weight_RV.gather(1, place_RS).double()
        beyond_RS = place_RS >= self.vocabulary
        return weight_RV.gather(1, place_RS.clamp_(max=self.vocabulary - 1)).double().masked_fill_(beyond_RS, 0.0)


def _cross(weight_RK: Tensor, cumulative_RK: Tensor, threshold_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the cumulative weight first exceeds the threshold, and what of it lies within that place.

    A threshold that rounding put outside of what the row holds is moved inside, so that the place found always has a
    weight above 0.
    """
    total_R1 = cumulative_RK[:, -1:]
    threshold_R1 = threshold_R1.clamp_(min=0.0).minimum(total_R1.nextafter(torch.zeros_like(total_R1)))
    # A NaN in the row gives a place beyond the last one; the log-probability is then NaN too.
    place_R1 = torch.searchsorted(cumulative_RK, threshold_R1, right=True).clamp_(max=weight_RK.shape[1] - 1)
    return place_R1, threshold_R1 - (cumulative_RK.gather(1, place_R1) - weight_RK.gather(1, place_R1))


def truncate(logits_RV: Tensor, params: SamplingParams, look: bool = True) -> Tensor:
    """Set to -inf what top-k, top-p and min-p leave out, in that order, each on what the one before left."""
    if 0 < params.top_k < logits_RV.shape[1]:
        kth_R1 = torch.topk(logits_RV, params.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, float("-inf"))
    if params.top_p < 1.0:
        logits_RV = _nucleus(logits_RV, params.top_p, look)
    if params.min_p > 0.0:
        floor_R1 = logits_RV.max(dim=-1, keepdim=True).values + math.log(params.min_p)
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R1, float("-inf"))
    return logits_RV


def _nucleus(logits_RV: Tensor, top_p: float, look: bool) -> Tensor:
    """Set to -inf what top-p leaves out.

    Where the host may `look` at the numbers, only rows whose NUCLEUS_TOKENS likeliest tokens do not reach top_p are
    sorted whole.
    """
    vocabulary = logits_RV.shape[1]
    if vocabulary <= 4 * NUCLEUS_TOKENS:
        return _nucleus_by_sorting(logits_RV, top_p)
    top_RK, index_RK = torch.topk(logits_RV, NUCLEUS_TOKENS, dim=-1)
    share_RK = (top_RK - torch.logsumexp(logits_RV, dim=-1, keepdim=True)).exp_().double()
    reached_RK = share_RK.cumsum(dim=-1)
    # What comes before a token that is kept has not reached top_p yet; the most likely one is always kept.
    kept_RK = top_RK.masked_fill(reached_RK - share_RK >= top_p, float("-inf"))
    kept_RV = torch.full_like(logits_RV, float("-inf")).scatter_(1, index_RK, kept_RK)
    if not look:
        return torch.where(reached_RK[:, -1:] < top_p, _nucleus_by_sorting(logits_RV, top_p), kept_RV)
    flat = (reached_RK[:, -1] < top_p).nonzero()[:, 0]
    if len(flat):
        kept_RV[flat] = _nucleus_by_sorting(logits_RV[flat], top_p)
    return kept_RV


def _nucleus_by_sorting(logits_RV: Tensor, top_p: float) -> Tensor:
    ascending_RV, order_RV = torch.sort(logits_RV, dim=-1)
    tail_RV = torch.softmax(ascending_RV, dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    tail_RV[:, -1].fill_(False)  # the most likely token always stays
    return logits_RV.masked_fill(tail_RV.scatter(1, order_RV, tail_RV), float("-inf"))
