"""Rollout: the local engine beside transformers' generate, same weights, prompts, stop tokens and threads.

The model is untrained, so each token is one of the stop tokens with nearly the same chance and lengths are spread as a
geometric distribution cut off at 64. The engine lets a row go when it stops; generate decodes all rows until the last
one has. Both are given in tokens of completions per second: the two draw different completions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from bench.pairs import measure_pairs
from sapo.data import Prompt
from sapo.model.attention import ATTENTION_NAME
from sapo.model.policy import Policy, prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.engine import Request
from sapo.rollout.local import LocalEngine
from sapo.rollout.sampling import SamplingParams

PROMPTS, SAMPLES, PROMPT_TOKENS, LONGEST, VOCABULARY = 32, 8, 9, 64, 512
STOPS = list(range(20))  # one token in 25: a mean length near 24


def measure(architecture: str = "qwen3") -> Iterator[dict[str, Any]]:
    """One row for each architecture: seconds per token of both, and the ratio."""
    policy = _policy(architecture)
    generator = random.Random(0)
    prompts = [tuple(generator.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)) for _ in range(PROMPTS)]
    requests = [Request(Prompt(i, "bench", "", p), SAMPLES) for i, p in enumerate(prompts)]
    params = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=frozenset(STOPS))
    engine = LocalEngine(policy, max_rows=PROMPTS * SAMPLES)
    ids = torch.tensor([p for p in prompts for _ in range(SAMPLES)])
    config = GenerationConfig(
        do_sample=True, max_new_tokens=LONGEST, top_k=0, eos_token_id=STOPS, pad_token_id=VOCABULARY - 1
    )

    def ours() -> int:
        policy.model.set_attn_implementation(ATTENTION_NAME)
        return sum(len(c) for group in engine.generate(requests, params) for c in group)

    def peer() -> int:
        policy.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            output = policy.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = output[:, PROMPT_TOKENS:]
        stopped = torch.isin(new, torch.tensor(STOPS))
        first_stop = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, new.shape[1])
        return int(first_stop.sum())

    yield {
        "measure": f"rollout, tiny {architecture}, {PROMPTS} x {SAMPLES}, lengths to {LONGEST}",
        "peer": "transformers generate",
        "unit": "s/token",
        **measure_pairs(ours, peer).row(),
    }


def _policy(architecture: str) -> Policy:
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    model = tiny_model(
        architecture,
        VOCABULARY,
        seed=0,
        eos_token_id=17,
        pad_token_id=18,
        hidden_size=128,
        layers=4,
        heads=8,
        kv_heads=4,
        intermediate_size=256,
    )
    return prepare_policy(model, tokenizer)
