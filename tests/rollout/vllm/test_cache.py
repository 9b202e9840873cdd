"""The key-value cache of vLLM: sequences that find no room are put off, and draw what they would have drawn."""

from __future__ import annotations

from contextlib import closing

import pytest

from sapo.config import VllmConfig
from sapo.errors import ConfigError
from sapo.rollout.vllm.engine import VllmEngine
from support.engine_cases import assert_same, flat, params, random_ids, request
from support.vllm_cases import needs_vllm, wide_policy

pytestmark = needs_vllm

BLOCK_BYTES = 2 * 2 * 32 * 4 * 128
"""Keys and values of 128 tokens in float32: two layers, one head of 32 channels."""


def test_preempted_sequences_draw_what_they_would_have_drawn() -> None:
    policy = wide_policy("qwen3")
    # Ten sequences grow from one block to two; a cache of eight blocks must put some of them off in the middle.
    requests = [request(random_ids(100, seed=i), 2, prompt_id=i) for i in range(5)]
    settings = params(max_new_tokens=60, stop_token_ids=frozenset())
    drawn = []
    for blocks in (64, 8):
        with closing(VllmEngine(policy, settings=VllmConfig(kv_cache_gib=blocks * BLOCK_BYTES / 2**30))) as engine:
            engine.set_weights(policy.weights(), 0)
            drawn.append(flat(engine.generate(requests, settings)))
    for small, large in zip(*drawn, strict=True):
        assert_same(small, large)


def test_a_sequence_that_no_cache_holds_is_refused_in_one_line() -> None:
    policy = wide_policy("qwen3")
    with closing(VllmEngine(policy, settings=VllmConfig(max_model_len=32))) as engine:
        engine.set_weights(policy.weights(), 0)
        assert len(engine.generate([request(random_ids(16, 0))], params())) == 1
        with pytest.raises(ConfigError, match=r"got 33 tokens and a cache for 32; raise rollout\.vllm\.kv_cache_gib"):
            engine.generate([request(random_ids(17, 0))], params())
