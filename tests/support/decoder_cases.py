"""The models that fast decoding is tried on."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer

SHAPE = {
    "vocab_size": 21,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "eos_token_id": 19,
    "pad_token_id": 20,
    "bos_token_id": None,
}


MOE = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


MODELS = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, one key-value head": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama, no sharing of heads": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama, linear rope": (LlamaConfig, {"rope_scaling": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama, llama3 rope": (LlamaConfig, {"rope_scaling": LLAMA3}),
    "llama, yarn": (LlamaConfig, {"rope_scaling": YARN}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral, window": (MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, windows": (Qwen2Config, WINDOWED),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3, wide heads": (Qwen3Config, {"head_dim": 32}),
    "qwen3, windows": (Qwen3Config, {"head_dim": 16, **WINDOWED}),
    "qwen3_moe": (Qwen3MoeConfig, {**MOE, "norm_topk_prob": True}),
    "qwen3_moe, shares left": (Qwen3MoeConfig, {**MOE, "norm_topk_prob": False}),
    "qwen3_moe, one dense layer": (Qwen3MoeConfig, {**MOE, "mlp_only_layers": [1]}),
}


def make(name, dtype=torch.float32, **options):
    """A model whose every weight and bias matters: norms and biases are not 1 and 0, attention is not even."""
    kind, own = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **own, **options}), attn_implementation="sdpa")
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                elif "embed" not in parameter_name or model.config.tie_word_embeddings:
                    parameter.mul_(5.0)
    return prepare_policy(model.to(dtype), character_tokenizer("0123456789+-*=?abcd"))
