"""Decoders of many families: each runs as transformers runs it, on packed tokens or in rows, or is refused.

tests/trials/models.py tries every family of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.data import Prompt
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams

TOKENIZER = character_tokenizer("0123456789+-*=?")
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
WINDOW = {"sliding_window": 6}

RUN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": WINDOW,
    "phi": {},
    "phi3": WINDOW,
    "olmo2": {},
    "olmoe": EXPERTS,
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "cohere2": {**WINDOW, "logit_scale": 0.5},
    "smollm3": {},
    "glm4": {},
    "starcoder2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {**EXPERTS, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "diffllama": {},
}
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "stablelm": ({}, "without packed_layout="),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, "interface of attention"),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}, "interface of attention"),
}


def make_model(name: str, options: dict[str, Any]) -> Any:
    old = name in ("gpt2", "mpt", "gptj")  # with names of their own
    shape = {k: v for k, v in SHAPE.items() if not old or k.endswith("_id") or k == "vocab_size"}
    config = AutoConfig.for_model(name, **{**shape, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # fresh weights attend almost evenly: see conftest.make_policy
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module", params=[*RUN, *ROWS])
def pair(request: pytest.FixtureRequest) -> tuple[Policy, Any]:
    """A policy and a copy of its model with transformers' own attention."""
    options = RUN[request.param] if request.param in RUN else ROWS[request.param][0]
    model = make_model(request.param, options)
    policy = prepare_policy(copy.deepcopy(model), TOKENIZER)
    assert policy.path == ("packed" if request.param in RUN else "rows")
    return policy, model


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(15, (n,), generator=generator).tolist()) for n in (7, 3, 11)]
    return [Request(Prompt(id=i, task="t", text="", token_ids=p), 2) for i, p in enumerate(prompts)]


@torch.no_grad()
def test_sampled_logprobs_equal_the_models_own_forward(pair: tuple[Policy, Any]) -> None:
    policy, model = pair
    asked = requests()
    drawn = LocalEngine(policy).generate(asked, SamplingParams(max_new_tokens=10, temperature=0.8, seed=1))
    for request, completions in zip(asked, drawn, strict=True):
        for completion in completions:
            ids = torch.tensor([[*request.prompt.token_ids, *completion.token_ids]])
            logp_TV = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float() / 0.8, dim=-1)
            first = len(request.prompt.token_ids) - 1
            expected = logp_TV[range(first, first + len(completion)), list(completion.token_ids)]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_a_decoder_that_hides_its_attention_runs_in_rows_and_says_why(name: str) -> None:
    options, reason = ROWS[name]
    policy = prepare_policy(make_model(name, options), TOKENIZER)
    assert policy.path == "rows"
    assert reason in str(policy.path_reason)
    assert [n for n in policy.notices if "runs in padded rows" in n and reason in n]
