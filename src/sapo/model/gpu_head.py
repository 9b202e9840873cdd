"""One chunk of the policy head on a GPU: few large kernels, where head.py works in blocks that a cache holds.

A kernel of a GPU costs microseconds to launch whatever it does, and its matrix units want thousands of tokens. So a
chunk here is all of it at once: float32 logits of 16-bit factors without a rounding between them (products.py), then

    G = d loss / d logits = c / temperature (onehot(y) - p)     in the model's dtype
    d hidden = G W,    d W += G^T hidden                        the second summed in float32, in place

The one-hot entries are written into G, one a row: no float is added by atomics, whose order is another each time.
`tests/model/test_gpu_head.py` holds this against autograd on a CPU and counts the kernels; no GPU has run it yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Float32 logits of one chunk: 1 GiB. Two of that size and one of half are held at a time, of capped logits one more.
CHUNK_BYTES = 2**30
TILE = 128
"""Rows of a tile of the GPU's products: chunks are whole tiles."""


def takes_whole_chunks(device: torch.device) -> bool:
    """Return whether the head computes on a device as this file does."""
    return device.type not in ("cpu", "meta")


def chunk_tokens(vocabulary: int) -> int:
    """Return the tokens of a chunk: its float32 logits stay within CHUNK_BYTES, but it has one tile at least.

    >>> chunk_tokens(151936), chunk_tokens(32000), chunk_tokens(10**9)
    (1664, 8320, 128)
    """
    return max(1, min(65536, CHUNK_BYTES // (vocabulary * 4)) // TILE) * TILE


def chunk_bytes(vocabulary: int, targets: int, itemsize: int) -> int:
    """Return the memory of one chunk at work: logits, log-probabilities and G.

    Capped logits (`softcap`) take their steepness beside these, which is not counted: as much as the logits once more.

    >>> round(chunk_bytes(151936, 8192, itemsize=2) / 2**30, 2)
    2.35
    """
    return min(chunk_tokens(vocabulary), targets) * vocabulary * (2 * max(4, itemsize) + itemsize)


@dataclass(frozen=True)
class Distribution:
    """Hold the distributions of a chunk of tokens, and of each the figures that are wanted.

    Of two tokens and five token ids: probability and steepness (2, 5), the others (2,).
    """

    logprob_M: Tensor
    entropy_M: Tensor | None
    probability_MV: Tensor | None
    """None unless asked for."""
    steepness_MV: Tensor | None
    """d capped / d raw of each logit; None where logits are not capped."""


def distribution(
    logits_MV: Tensor,
    target_M: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    unused_K: Tensor | None,
    entropy: bool,
    gradient: bool,
) -> Distribution:
    """Compute log pi of the targets from raw float32 logits, which are overwritten.

    Args:
        gradient: the probabilities are wanted too.
    """
    if bias_V is not None:
        logits_MV.add_(bias_V)
    steepness = None
    if softcap is not None:
        logits_MV.div_(softcap).tanh_()
        if gradient:
            steepness = 1 - logits_MV.square()
        logits_MV.mul_(softcap)
    if temperature != 1.0:
        logits_MV.div_(temperature)
    if unused_K is not None:
        logits_MV.index_fill_(1, unused_K, torch.finfo(logits_MV.dtype).min)
    logprob_MV = torch.log_softmax(logits_MV, -1)
    if bias_V is not None:  # of -inf, 0 times it would make the entropy NaN
        logprob_MV.clamp_(min=torch.finfo(logprob_MV.dtype).min)
    logprob_M = logprob_MV.gather(1, target_M[:, None])[:, 0]
    if not (entropy or gradient):
        return Distribution(logprob_M, None, None, None)
    probability = torch.exp(logprob_MV, out=logits_MV)
    entropy_M = torch.linalg.vecdot(probability, logprob_MV).neg_() if entropy else None
    return Distribution(logprob_M, entropy_M, probability if gradient else None, steepness)


def slopes(found: Distribution, target_M: Tensor, coefficient_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute G, (M, V) d loss / d raw logits, in a dtype.

    Args:
        coefficient_M: c / temperature.
    """
    assert found.probability_MV is not None, "the probabilities were not asked for"
    slope_MV = torch.empty_like(found.probability_MV, dtype=dtype)
    torch.mul(found.probability_MV, -coefficient_M[:, None], out=slope_MV)
    # c (1 - p), from log p: of p near 1 the difference would be rounding alone.
    at_target_M = torch.expm1(found.logprob_M).mul_(-coefficient_M)
    slope_MV.scatter_(1, target_M[:, None], at_target_M.to(dtype)[:, None])
    return slope_MV if found.steepness_MV is None else slope_MV.mul_(found.steepness_MV)
