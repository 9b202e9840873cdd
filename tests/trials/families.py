"""The decoder families of transformers, and a tiny model of each, beyond whose windows a trial goes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from sapo.model.tiny import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+-*/=() abcdefghijklmnopqrstuvwxyz")

_ENCODERS = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie git
got_ocr2 marian mbart megatron-bert mllama moshi musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert
roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
_WRAPPERS = """
aria cpmant emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified gemma4_assistant gemma4_unified_assistant gpt-sw3 llama4
minimax_m3_vl phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp
"""
OTHERS = frozenset(_ENCODERS.split() + _WRAPPERS.split())
"""What transformers lists among causal language models and is no decoder of its own: encoders and encoder-decoders,
wrappers around a decoder that is listed by itself (most of them with a vision tower), and second names of one."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length"), 512),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups_"), 2),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 16
    ),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "top_k_experts": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    # With few heads the scores of an indexer are often 0 for several keys, and which it takes is left to the sort.
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "mamba_d_ssm": 128,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "use_cache": True,
    "vocab_size": len(TOKENIZER),
    "vocab_size_per_layer_input": len(TOKENIZER),
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": TOKENIZER.eos_token_id,
}
"""Every name that a config may have for a size, and the size."""

_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_WINDOWED = ["sliding_attention", "full_attention"] * 2
_CONVOLVED = ["conv", "full_attention"] * 2

_OWN: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "kimi_linear": {"layer_types": _HYBRID},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "gemma2": {"layer_types": _WINDOWED},
    "gemma3_text": {"layer_types": _WINDOWED},
    "gpt_oss": {"layer_types": _WINDOWED},
    "gemma4_text": {"layer_types": _WINDOWED, "global_head_dim": 16},
    "gemma4_unified_text": {"layer_types": _WINDOWED, "global_head_dim": 16},
    "gemma3n_text": {
        "layer_types": _WINDOWED,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16},
    "lfm2": {"layer_types": _CONVOLVED, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONVOLVED, "num_dense_layers": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 64,
    },
    "hunyuan_v1_moe": {"moe_topk": [2] * 4},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "lru_width": 64,
        "attention_window_size": 16,
        "num_hidden_layers": 3,
    },
    "opt": {"word_embed_proj_dim": 64},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "rotary_dim": 8,
        "index_n_heads": 4,
    },
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "modernbert-decoder": {"local_attention": 16},
    "dots1": {"n_shared_experts": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1},
    "cohere_compass_text": {
        "layer_types": _WINDOWED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": {
        "layer_types": [*_HYBRID[:3], "indexed_attention"],
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    },
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 16},
}
"""What a family needs beside the sizes."""


def families() -> list[str]:
    """Return the decoder families of the installed transformers, in alphabetical order."""
    return sorted(family for family in CLASSES if family not in OTHERS)


def build(family: str) -> Any:
    """Build a family's tiny model, its weights large enough that every part of it matters."""
    config = _config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        except ValueError as error:
            if "scaled_dot_product" not in str(error):
                raise
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0 if parameter.std() < 0.05 else 1.0)
            elif name.endswith(("sinks", "sink")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "A_log" not in name and "dt" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    default = kind()
    named = inspect.signature(kind.__init__).parameters
    chosen = {
        name: size
        for name, size in _SIZES.items()
        if (name in named or _has(default, name)) and not isinstance(_value(default, name), list | tuple)
        if not isinstance(getattr(kind, name, None), property)
    }
    if _has(default, "sliding_window") and _value(default, "sliding_window") is None:
        del chosen["sliding_window"]
    if _has(default, "qk_rope_head_dim") and "head_dim" in chosen:
        chosen["head_dim"] = chosen["qk_rope_head_dim"]
    if _has(default, "kv_lora_rank"):
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    drawn = {name: 0.0 for name in vars(default) if name.endswith(("dropout", "pdrop", "layerdrop"))}
    drawn = {name: value for name, value in drawn.items() if isinstance(_value(default, name), float)}
    return kind(**{**drawn, **chosen, **_OWN.get(family, {})})


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property that asks for more than a default config has
        return None


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:
        return True
