"""Normalizers: the weight of each token of a response in the loss, fixed once for the whole mini-batch.

| name | weight of a token of y_i | source |
|---|---|---|
| sequence_mean | 1 / (&#124;y_i&#124; x sequences) | equation (5) of https://arxiv.org/abs/2511.20347 |
| token_mean | 1 / tokens | DAPO, https://arxiv.org/abs/2503.14476 |
| constant_length | 1 / (max_length x sequences) | Dr.GRPO, https://arxiv.org/abs/2503.20783 |
| sequence_sum | 1 / sequences | the plain policy gradient; MiniRL, https://arxiv.org/abs/2512.01374 |

The denominators are those of the mini-batch, and every micro-batch is given them. Any split of the mini-batch then adds
up to the same gradient; the mean of micro-batch means would not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapo.objectives.checks import unknown_option

NORMALIZERS = ("sequence_mean", "token_mean", "constant_length", "sequence_sum")


def sequence_weights(
    lengths_B: Tensor,
    normalizer: str,
    *,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Compute the weight of EACH token of sequence i in the loss, (B,) float64.

    Args:
        lengths_B: response tokens of each sequence, integers, (B,). A sequence of length 0 has weight 0. It was
            sampled, so it counts in `num_sequences`.
        normalizer: a name in NORMALIZERS.
        num_sequences: sequences of the whole mini-batch, when these are one micro-batch of it; default B.
        num_tokens: response tokens of the whole mini-batch, when these are one micro-batch of it; default the sum of
            `lengths_B`.
        max_length: the constant of constant_length: the longest response the sampler allows.

    Raises:
        ValueError: unknown normalizer, constant_length without a positive max_length, lengths that are not (B,)
            non-negative integers, or a mini-batch said to be smaller than this part of it.
    """
    if normalizer not in NORMALIZERS:
        raise unknown_option("normalizer", normalizer, NORMALIZERS)
    if lengths_B.dim() != 1 or lengths_B.is_floating_point() or bool((lengths_B < 0).any()):
        raise ValueError(
            f"lengths must be (B,) integers >= 0; got {lengths_B.dtype} of shape {tuple(lengths_B.shape)}; "
            "count the response tokens of each sequence"
        )
    if normalizer == "constant_length" and (max_length is None or max_length <= 0):
        raise ValueError(
            f"constant_length needs a positive max_length; got {max_length!r}; "
            "pass the longest response the sampler allows"
        )
    sequences = _whole("num_sequences", num_sequences, lengths_B.numel())
    tokens = _whole("num_tokens", num_tokens, int(lengths_B.sum()))
    lengths = lengths_B.double()
    if normalizer == "sequence_mean":
        weights = 1 / (lengths * sequences)
    elif normalizer == "token_mean":
        weights = torch.full_like(lengths, 1 / max(tokens, 1))
    elif normalizer == "sequence_sum":
        weights = torch.full_like(lengths, 1 / max(sequences, 1))
    else:
        assert max_length is not None
        weights = torch.full_like(lengths, 1 / (max_length * max(sequences, 1)))
    return torch.where(lengths_B > 0, weights, torch.zeros_like(weights))


def _whole(name: str, given: int | None, own: int) -> int:
    """Return the count of the mini-batch: the one given, else this batch's own."""
    if given is None:
        return own
    if given < own:
        raise ValueError(
            f"{name} counts the whole mini-batch, so it is at least the {own} here; got {given}; "
            "pass the count of the mini-batch, not of the micro-batch"
        )
    return given
