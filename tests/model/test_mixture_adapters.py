"""Adapters of mixtures: all-linear means the same in every family, and what is saved comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.config.model import LoraConfig
from sapo.model.adapters import add_adapter, trained_sentence
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+-*%=;#")
SHAPE: dict[str, Any] = {
    **{"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    **{"shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 0},
    **{"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None},
}

# By hand, of two layers and rank 2: a layer's attention trains 2 (64 + 48 + 48 + 64) = 448, its router 2 (32 + 4) = 72.
ATTENTION, ROUTER = 896, 144
# 4 experts: 2 x 4 x (32 + 32) for gate and up of width 16 and 2 x 4 x (16 + 32) for down; of width 32: 768 and 512.
NARROW, WIDE = 2 * (512 + 384), 2 * (768 + 512)
# Three linear layers between 32 and 16, and the gate of qwen2_moe's shared expert, from 32 to 1.
SHARED = 2 * (3 * 96)
EXPECTED = {
    "qwen3_moe": (ATTENTION, NARROW),
    "qwen2_moe": (ATTENTION + SHARED + 2 * 66, NARROW),
    "granitemoe": (ATTENTION, WIDE),
    "phimoe": (ATTENTION, WIDE),
    # A first layer that is dense, three linear layers between 32 and 32, and one mixture.
    "glm4_moe": (ATTENTION + 3 * 128 + SHARED // 2, NARROW // 2),
}


def small(family: str) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
    return prepare_policy(model, TOKENIZER)


def trained(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", EXPECTED)
def test_all_linear_is_one_rule_for_every_mixture(family: str, tmp_path: Path) -> None:
    small(family).save(tmp_path / "base")
    common, experts = EXPECTED[family]
    router = ROUTER // 2 if family == "glm4_moe" else ROUTER
    counts = {"all": common + experts + router, "experts": common + experts, "router": common + router, "none": common}
    for mixture, count in counts.items():
        policy = load_policy(tmp_path / "base")
        add_adapter(policy, rank=2, alpha=4.0, targets="all-linear", seed=0, mixture=mixture)
        assert sum(p.numel() for p in trained(policy).values()) == count, mixture
        assert f"the adapter trains {count:,} parameters, of " in trained_sentence(policy)
        for name, parameter in trained(policy).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        policy.save(tmp_path / mixture)
        again = trained(load_policy(tmp_path / mixture))
        assert again.keys() == trained(policy).keys()
        assert all(torch.equal(again[name], parameter) for name, parameter in trained(policy).items())


def test_names_of_layers_and_a_choice_of_all_linear_exclude_each_other() -> None:
    assert LoraConfig(targets=["q_proj"]).mixture == "all"
    with pytest.raises(ValidationError, match="mixture=none says what targets=all-linear includes"):
        LoraConfig(targets=["q_proj"], mixture="none")
