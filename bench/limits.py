"""How fast the machine could be: the arithmetic and bytes that a measure cannot avoid, at the rates of the same run.

Counted: every product of a weight with a token that must be seen (a prompt once per group, the output embedding on
response tokens alone), attention, the backward pass as twice the forward, each weight and each cached key and value
read once per decoding step, AdamW's seven passes over the weights. Not counted: norms, sampling, softmax, copies,
Python. A decoding step takes the longer of its arithmetic and its reading. Rates are of sides/machine.py: its best way
of multiplying in the dtype, and its reading bandwidth.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What of a decoder's shape its cost depends on.

    >>> Shape(layers=1, block=10, block_read=10, head=8, heads=1, kv_heads=1, head_dim=2).cache_bytes(4)
    16
    """

    layers: int
    block: int
    """Weights of one block that a token is multiplied with."""
    block_read: int
    """Weights of one block: with experts, more."""
    head: int
    """Weights of the output embedding."""
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the config.json of a model."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv, dim = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
        attention = 2 * hidden * dim * (heads + kv)
        experts = config.get("num_experts", 0)
        if experts:
            expert = 3 * hidden * config["moe_intermediate_size"]
            router = hidden * experts
            block, read = config["num_experts_per_tok"] * expert + router, experts * expert + router
        else:
            block = read = 3 * hidden * config["intermediate_size"]
        head = hidden * config["vocab_size"]
        return cls(config["num_hidden_layers"], attention + block, attention + read, head, heads, kv, dim)

    def cache_bytes(self, width: int) -> int:
        """Bytes of keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def attention_flops(self, context: float) -> float:
        """Of one token that attends to `context` positions."""
        return 4.0 * self.layers * self.heads * self.head_dim * context


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second."""

    flops: float
    read: float


def rates_of(result: dict[str, Any], dtype: str) -> Rates:
    """Medians over the rounds of a contest."""
    facts = result["machine"]
    return Rates(statistics.median(f[dtype] for f in facts), statistics.median(f["read"] for f in facts))


def least_seconds(result: dict[str, Any], dtype: str) -> float | None:
    """What the measure takes at the machine's limit; None where no limit is worked out."""
    kind, settings = result["limit"], result["settings"]
    if kind is None:
        return None
    rates = rates_of(result, dtype)
    if kind == "head":
        return 6.0 * settings["tokens"] * settings["hidden"] * settings["vocabulary"] / rates.flops
    shape, prompts, limits = Shape(**settings["shape"]), settings["prompt_lengths"], settings["limits"]
    seconds = 0.0
    if kind in ("decode", "step"):
        seconds += decode_seconds(shape, prompts, limits, rates, BYTES[dtype])
    if kind in ("train", "step"):
        seconds += train_seconds(shape, prompts, limits, rates, settings["minibatches"])
    return seconds


def decode_seconds(shape: Shape, prompts: list[int], limits: list[list[int]], rates: Rates, width: int) -> float:
    """Prefill, then step by step; the first token of a row comes of its prompt's prefill."""
    weights = shape.layers * shape.block
    prefill = sum(n * (2.0 * weights + shape.attention_flops(n / 2)) for n in prompts)
    seconds = prefill / rates.flops
    rows = [(prompt, n) for prompt, group in zip(prompts, limits, strict=True) for n in group]
    read = (shape.layers * shape.block_read + shape.head) * width
    cache = shape.cache_bytes(width)
    for step in range(max(n for _, n in rows)):
        active = [prompt for prompt, n in rows if n > step]
        flops = len(active) * 2.0 * (shape.head + (weights if step else 0))
        shared = sum(p for p, group in zip(prompts, limits, strict=True) if max(group) > step)
        if step:
            flops += sum(shape.attention_flops(prompt + step) for prompt in active)
        seconds += max(flops / rates.flops, (read + cache * (shared + step * len(active))) / rates.read)
    return seconds


def train_seconds(shape: Shape, prompts: list[int], limits: list[list[int]], rates: Rates, minibatches: int) -> float:
    """Forward and backward of every token once, and the optimizer's passes over the weights."""
    weights = shape.layers * shape.block
    flops = 0.0
    for prompt, group in zip(prompts, limits, strict=True):
        flops += 3 * prompt * (2.0 * weights + shape.attention_flops(prompt / 2))
        for n in group:
            flops += 3 * (n - 1) * (2.0 * weights + shape.attention_flops(prompt + n / 2)) + 6.0 * n * shape.head
    parameters = shape.layers * shape.block_read + shape.head
    return flops / rates.flops + 7.0 * 4 * parameters * minibatches / rates.read
