"""Tiny decoders with recurrent layers, each family with its own kind of mixer, and the same computed in float64."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sapo.data import Segment
from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer
from support.tree_cases import chain, leaves_of, path_of, positions_of

TOKENIZER = character_tokenizer("0123456789+-*=?")
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA2 = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8, "mamba_expand": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR | EXPERTS,
    "qwen3_next": LINEAR | EXPERTS,
    "olmo_hybrid": LINEAR,
    "kimi_linear": LINEAR
    | EXPERTS
    | {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1} | EXPERTS,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    | EXPERTS,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "rope",
        "shared_intermediate_size": 32,
    }
    | MAMBA2
    | EXPERTS,
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64, "head_dim": 8},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
    },
    "jamba": MAMBA
    | {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | EXPERTS,
}
"""The mixers: Gated DeltaNet in the first four, Kimi's delta attention, short convolutions, Mamba-2 in the next six,
Mamba-1 in the last. (Mamba and Falcon-Mamba by themselves hand no layout to their blocks, and run in rows.)"""

# A preamble, two prompts behind it, and responses of 30, 25 and 1 token; a second root, as where prompts share nothing.
TREE = chain([20, 9, 30, 25, 1, 2, 30, 1, 7, 3, 5], [-1, 0, 1, 1, 1, 0, 5, 5, -1, 8, 8])


def make_model(family: str, cls: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """An untrained decoder whose tokens depend on all that came before them.

    Args:
        cls: its class, where that is not transformers' own.
    """
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})
    # Decoders without attention have no other than their own.
    options = {"attn_implementation": "eager" if "mamba" in family else "sdpa", "dtype": dtype}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = (
            AutoModelForCausalLM.from_config(config, **options) if cls is None else cls._from_config(config, **options)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3)
            elif "A_log" not in name and "dt" not in name:  # those begin at 0 or 1, and would hide a mistake
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    # torch's grouped product has no float64, and rounds by how many tokens an expert has.
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@cache
def make_pair(family: str) -> tuple[Policy, Any]:
    """A policy and a copy of its model as transformers runs it, for tests that change neither."""
    model = make_model(family)
    policy = prepare_policy(copy.deepcopy(model), TOKENIZER)
    assert policy.path == "packed"
    return policy, model


def make_model_in_double(family: str) -> Any:
    """A float64 decoder whose modeling file has every cast to float32 replaced by one to float64."""
    name = family.removesuffix("_text")
    original = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text(encoding="utf-8")
    for narrow, wide in (
        ("torch.float32", "torch.float64"),
        (".float()", ".double()"),
        ("torch.float)", "torch.float64)"),
    ):
        source = source.replace(narrow, wide)
    source = source.replace("dtype=torch.float,", "dtype=torch.float64,")
    module = types.ModuleType(f"{original.__name__}_in_double")
    module.__file__, module.__package__ = original.__file__, original.__package__
    sys.modules[module.__name__] = module
    exec(compile(source, original.__file__, "exec"), module.__dict__)
    cls = getattr(module, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    model = make_model(family, cls, torch.float64)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.double()
    return model


def random_ids(segments: tuple[Segment, ...], seed: int = 3) -> Tensor:
    return torch.randint(15, (segments[-1].stop,), generator=torch.Generator().manual_seed(seed))


def packed_logprobs(policy: Policy, ids_N: Tensor, segments: tuple[Segment, ...] = TREE) -> Tensor:
    """(N, V) of one packed forward, in the precision of the weights."""
    hidden_NH = policy.hidden(ids_N, positions_of(segments), TreeLayout(segments))
    return torch.log_softmax(hidden_NH @ policy.head_weight.T, dim=-1)


def plain_logprobs(model: Any, ids_N: Tensor, segments: tuple[Segment, ...] = TREE) -> dict[tuple[int, ...], Tensor]:
    """(T, V) of the model's own forward over each path from a root to a leaf, by its packed positions."""
    paths = [path_of(segments, leaf) for leaf in leaves_of(segments)]
    return {
        tuple(path): torch.log_softmax(model(input_ids=ids_N[path][None], use_cache=False).logits[0], dim=-1)
        for path in paths
    }
