"""Queries, keys and values at random, and attention by its definition."""

from __future__ import annotations

import torch


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def query_key_value(num_tokens, dtype=torch.float64, heads=4, kv_heads=2):
    shapes = ((num_tokens, heads, 8), (num_tokens, kv_heads, 8), (num_tokens, kv_heads, 8))
    return tuple(normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))


def attention_by_definition(query, key, value, visible, scaling, sinks=None, softcap=None):
    """softmax(q k / scale) v over what each token sees, one N x N matrix, query heads in groups per key head.

    A sink is one score more of each head, whose weight no value gets; a cap makes a score c tanh(x / c).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(key)], value)
