"""Tiny decoders with a character tokenizer: real transformers architectures in ordinary Hugging Face directories.

They are what the quick start cold-starts and what the tests run; nothing in the package treats them differently from a
pretrained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

PAD, EOS = "<pad>", "<eos>"

ARCHITECTURES = ("qwen3", "qwen3_moe", "llama", "mistral", "qwen3_5", "qwen3_5_moe", "gpt_oss")

ATTENTION_EVERY = 4
"""Every fourth layer of the hybrids attends, as in Qwen3.5, and the last one of a stack that has fewer."""


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


@dataclass(frozen=True)
class TinyShape:
    """Give the size of a tiny decoder.

    >>> TinyShape(hidden_size=32, heads=2).settings(14, eos_token_id=12, pad_token_id=13)["head_dim"]
    16
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 128
    """Hidden units of an MLP, or of one expert of a mixture."""
    experts: int = 8
    """Experts in each layer of a mixture."""
    experts_per_token: int = 2
    """Experts of a mixture that each token goes through."""
    max_length: int = 512
    """Most tokens of a sequence."""

    def settings(self, vocabulary: int, *, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
        """Return what the config of every architecture has, under the names of transformers."""
        return {
            "vocab_size": vocabulary,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden_size // self.heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_length,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "bos_token_id": None,
        }

    def mixture(self) -> dict[str, Any]:
        """Return what the config of a mixture of experts has beside them."""
        return {
            "moe_intermediate_size": self.intermediate_size,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
        }


def tiny_model(
    architecture: str,
    vocabulary: int,
    *,
    seed: int,
    eos_token_id: int,
    pad_token_id: int,
    sliding_window: int | None = None,
    tie_embeddings: bool = False,
    **shape: int,
) -> Any:
    """Build a randomly initialised decoder of a transformers architecture.

    Args:
        architecture: one of ARCHITECTURES.
        seed: of the initial weights.
        sliding_window: of mistral, and of every second layer of gpt_oss, where None is 32.
        shape: fields of `TinyShape`.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    made = TinyShape(**shape)
    settings = made.settings(vocabulary, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    config = _config(architecture, {**settings, "tie_word_embeddings": tie_embeddings}, made.mixture(), sliding_window)
    # Forked, so that a caller's own random stream is not moved.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # transformers has no fused attention with sinks.
        attention = "eager" if architecture == "gpt_oss" else "sdpa"
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def _config(architecture: str, shape: dict[str, Any], mixture: dict[str, Any], sliding_window: int | None) -> Any:
    if architecture == "qwen3":
        return Qwen3Config(**shape)
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(**shape, **mixture, norm_topk_prob=True)
    if architecture in ("qwen3_5", "qwen3_5_moe"):
        return _hybrid_config(architecture, shape, mixture)
    if architecture == "gpt_oss":
        return GptOssConfig(
            **shape,
            num_local_experts=mixture["num_experts"],
            num_experts_per_tok=mixture["num_experts_per_tok"],
            sliding_window=sliding_window or 32,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    if architecture == "llama":
        return LlamaConfig(**shape)
    return MistralConfig(**shape, sliding_window=sliding_window)


def _hybrid_config(architecture: str, shape: dict[str, Any], mixture: dict[str, Any]) -> Any:
    """Return a Qwen3.5 whose recurrent layers have as many heads, as wide, as its attention."""
    layers = shape["num_hidden_layers"]
    attends = [(i + 1) % ATTENTION_EVERY == 0 or i == layers - 1 for i in range(layers)]
    recurrent = {
        "layer_types": ["full_attention" if a else "linear_attention" for a in attends],
        "linear_num_key_heads": shape["num_key_value_heads"],
        "linear_num_value_heads": shape["num_attention_heads"],
        "linear_key_head_dim": shape["head_dim"],
        "linear_value_head_dim": shape["head_dim"],
    }
    if architecture == "qwen3_5":
        return Qwen3_5TextConfig(**shape, **recurrent)
    del shape["intermediate_size"]  # of dense layers, which it has none of
    width = mixture["moe_intermediate_size"]
    return Qwen3_5MoeTextConfig(**shape, **recurrent, **mixture, shared_expert_intermediate_size=width)
