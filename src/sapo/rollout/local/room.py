"""How many rows the free memory of a GPU has room for.

The cache keeps the tokens of every row up to the longest completion: 30 GB for 256 rows of 1024 tokens of Qwen3-0.6B.
Fewer rows take more steps and draw the same. On a CPU `rollout.max_rows` alone decides: memory there is not a card's.
"""

from __future__ import annotations

from typing import Any

import torch

from sapo.model.policy import Policy
from sapo.rollout.local.cache import SLOTS_PER_GROUP

SHARE = 0.8
"""Of the free memory: the rest is for logits, prefills, graphs, and fragments."""

TABLE_BYTES = 8 + 8 + 4
"""Of a token in the tables of a row: uniform, token, log-probability."""


def rows_with_room(policy: Policy, rows: int, new_tokens: int, prompt_tokens: int, samples: int) -> int:
    """Return how many rows to decode together, at most `rows` and at least `samples`.

    Fewer than asked for are rounded down to a power of two or one and a half of it, so that a little more or less of
    free memory does not change the shapes of a run.

    Args:
        prompt_tokens: of the longest prompt, without what all share.
        samples: rows of the largest group.
    """
    free, of_token = free_bytes(policy.device), token_bytes(policy)
    if free is None or of_token is None:
        return rows
    slots = SLOTS_PER_GROUP * prompt_tokens / samples
    of_row = of_token * (new_tokens + slots) + TABLE_BYTES * new_tokens
    fitting = int(SHARE * free / of_row)
    if fitting >= rows:
        return rows
    power = 1 << max(0, fitting.bit_length() - 1)
    return max(samples, min(rows, power * 3 // 2 if fitting >= power * 3 // 2 else power))


def free_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU that is free or that torch holds unused; None of a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def token_bytes(policy: Policy) -> int | None:
    """Return the bytes of keys and values of one token, over all layers; None where the config does not tell."""
    config: Any = policy.model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    kv_heads, hidden = getattr(config, "num_key_value_heads", None) or heads, getattr(config, "hidden_size", None)
    if not (layers and heads and kv_heads and hidden):
        return None
    size = getattr(config, "head_dim", None) or hidden // heads
    return int(2 * layers * kv_heads * size * policy.dtype.itemsize)
