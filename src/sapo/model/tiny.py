"""Tiny decoders with a character tokenizer: real transformers architectures in ordinary Hugging Face directories.

They are what the quick start cold-starts and what the tests run; nothing in the package treats them differently from a
pretrained model.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

PAD, EOS = "<pad>", "<eos>"

ARCHITECTURES = ("qwen3", "qwen3_moe", "llama", "mistral")


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per character of the alphabet, then end and padding; other characters raise.

    >>> tokenizer = character_tokenizer("0123456789+=")
    >>> tokenizer("12+3=")["input_ids"]
    [1, 2, 10, 3, 11]
    >>> tokenizer.decode([4, 6, 12]), len(tokenizer)
    ('46<eos>', 14)
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"the alphabet must not repeat a character; got {alphabet!r}")
    vocabulary = {token: i for i, token in enumerate([*alphabet, EOS, PAD])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))  # no unknown token: an unknown character is an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def tiny_model(
    architecture: str,
    vocabulary: int,
    *,
    seed: int,
    eos_token_id: int,
    pad_token_id: int,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 128,
    experts: int = 8,
    experts_per_token: int = 2,
    max_length: int = 512,
    sliding_window: int | None = None,
    tie_embeddings: bool = False,
) -> Any:
    """Build a randomly initialised decoder of a transformers architecture.

    Args:
        architecture: one of ARCHITECTURES.
        intermediate_size: of the MLP, or of one expert of the mixture.
        experts, experts_per_token: qwen3_moe only.
        sliding_window: mistral only.
        seed: of the initial weights.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden_size // heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": tie_embeddings,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "bos_token_id": None,
    }
    config = _config(architecture, shape, experts, experts_per_token, sliding_window)
    # Forked, so that a caller's own random stream is not moved.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def _config(
    architecture: str, shape: dict[str, Any], experts: int, experts_per_token: int, sliding_window: int | None
) -> Any:
    if architecture == "qwen3":
        return Qwen3Config(**shape)
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(
            **shape,
            moe_intermediate_size=shape["intermediate_size"],
            num_experts=experts,
            num_experts_per_tok=experts_per_token,
            norm_topk_prob=True,
        )
    if architecture == "llama":
        return LlamaConfig(**shape)
    return MistralConfig(**shape, sliding_window=sliding_window)
