"""LoRA: the identity at first, the only thing trained, one and the same in engine and trainer, whole after a save."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sapo.data import Completion, Group, Prompt, Score
from sapo.errors import ModelError
from sapo.model.adapters import adapter_off, add_adapter, folded_weights, merged, unfoldable
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from support.trainer_cases import make_trainer

ARCHITECTURES = ("qwen3", "llama", "qwen3_moe", "qwen3_5")


def with_adapter(policy: Policy, *, moved: bool = True, **options) -> Policy:
    """Give a policy an adapter; `moved` also sets B, which begins as 0, to something that tells."""
    add_adapter(policy, **{"rank": 4, "alpha": 8.0, "targets": "all-linear", "seed": 0, **options})
    if moved:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def completions(policy: Policy, samples: int = 4) -> tuple[Prompt, tuple[Completion, ...]]:
    prompt = Prompt(id=3, task="t", text="", token_ids=(1, 10, 2, 13))
    drawn = LocalEngine(policy).generate([Request(prompt, samples)], SamplingParams(max_new_tokens=9, seed=2))
    return prompt, drawn[0]


def assert_same_completions(policy: Policy, other: Policy) -> None:
    """The same tokens, and log-probabilities up to the rounding of the general forward, which adapters take."""
    (_, drawn), (_, expected) = completions(policy), completions(other)
    assert [c.token_ids.tolist() for c in drawn] == [c.token_ids.tolist() for c in expected]
    for got, want in zip(drawn, expected, strict=True):
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_weights_are_those_of_the_merged_model_by_its_names(new_policy, architecture: str) -> None:
    options = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} if architecture == "qwen3_moe" else {}
    policy = with_adapter(new_policy(architecture), **options)
    assert unfoldable(policy) is None
    streamed = {name: tensor.clone() for name, tensor in folded_weights(policy, policy.weights())}
    before = {name: tensor.clone() for name, tensor in new_policy(architecture).weights()}
    expected = dict(merged(policy).named_parameters())  # by peft
    assert streamed.keys() == expected.keys() == before.keys()
    for name, tensor in streamed.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-6)
    assert sum(not torch.equal(streamed[name], before[name]) for name in before) > 4


def test_adapters_of_experts_and_routers_are_named_as_ones_that_do_not_fold(new_policy, policies) -> None:
    assert unfoldable(policies("qwen3_moe")) is None
    assert unfoldable(with_adapter(new_policy("qwen3_moe"))) == "model.layers.0.mlp.experts"


def test_folded_weights_of_a_policy_without_adapter_are_its_own(policies) -> None:
    policy = policies("qwen3")
    for (name, tensor), (expected_name, expected) in zip(
        folded_weights(policy, policy.weights()), policy.weights(), strict=True
    ):
        assert (name, tensor.data_ptr()) == (expected_name, expected.data_ptr())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_adapter_changes_nothing_yet(new_policy, policies, architecture: str) -> None:
    assert_same_completions(with_adapter(new_policy(architecture), moved=False), policies(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_engine_samples_with_the_adapter_and_its_logprobs_are_the_trainers(
    new_policy, policies, architecture
) -> None:
    policy = with_adapter(new_policy(architecture))
    prompt, drawn = completions(policy)
    assert drawn != completions(policies(architecture))[1]
    group = Group(prompt, drawn, (0.0,) * len(drawn))
    (ours,) = make_trainer(policy).groups.compute([group])
    for completion, logprobs in zip(drawn, ours, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(completion.logprobs), rtol=0, atol=1e-5)


def test_an_update_moves_the_adapter_and_nothing_else(new_policy) -> None:
    policy = with_adapter(new_policy("qwen3"))
    prompt, drawn = completions(policy)
    scored = tuple(
        Completion(c.token_ids, c.logprobs, c.finish_reason, score=Score(float(i % 2))) for i, c in enumerate(drawn)
    )
    group = Group(prompt, scored, (-1.0, 1.0, -1.0, 1.0))
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    trainer = make_trainer(policy)
    trainer.update(trainer.pack([group]), 1e-2)
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    assert len(moved) == 2 * 7 * 2  # A and B of the seven linear layers of each of two blocks


def test_switched_off_it_is_the_model_it_was(new_policy, policies) -> None:
    policy = with_adapter(new_policy("qwen3"))
    with adapter_off(policy):
        assert_same_completions(policy, policies("qwen3"))
    (_, drawn), (_, of_the_model) = completions(policy), completions(policies("qwen3"))
    assert [c.token_ids.tolist() for c in drawn] != [c.token_ids.tolist() for c in of_the_model]


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_merged_weights_give_the_same_logprobs(new_policy, tmp_path: Path, architecture: str) -> None:
    policy = with_adapter(new_policy(architecture))
    prompt, drawn = completions(policy)
    tokenizer = policy.tokenizer
    model = merged(policy)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # no trace of peft is left in it
    assert not any("lora" in n or "base_layer" in n for n, _ in plain.named_parameters())
    for completion in drawn:
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            logp = torch.log_softmax(plain(input_ids=ids).logits[0], -1)
        first = len(prompt.token_ids) - 1
        expected = logp[range(first, first + len(completion)), list(completion.token_ids)]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


def test_a_saved_adapter_is_small_names_its_model_and_comes_back_bit_for_bit(new_policy, tmp_path: Path) -> None:
    new_policy("qwen3").save(tmp_path / "base")
    policy = with_adapter(load_policy(tmp_path / "base"))
    policy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    again = load_policy(tmp_path / "adapter")
    expected = dict(policy.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad == ("lora_" in name)


def test_the_first_weights_of_an_adapter_are_those_of_its_seed(new_policy) -> None:
    def first(seed: int) -> torch.Tensor:
        policy = with_adapter(new_policy("qwen3"), moved=False, seed=seed)
        return next(p for n, p in policy.model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_adapters_of_a_bfloat16_model_are_kept_in_float32(new_policy) -> None:
    policy = with_adapter(new_policy("qwen3", dtype=torch.bfloat16))
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora_" in n} == {torch.float32}
    prompt, drawn = completions(policy)
    (ours,) = make_trainer(policy).groups.compute([Group(prompt, drawn, (0.0,) * len(drawn))])
    for completion, logprobs in zip(drawn, ours, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(completion.logprobs), rtol=0, atol=0.25)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_prj"], "fit no layer"), (["lm_head"], "must leave the output embedding out")],
)
def test_targets_that_cannot_be_are_refused(new_policy, targets: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        with_adapter(new_policy("qwen3"), targets=targets)


def test_an_adapter_of_another_model_is_refused(new_policy, tmp_path: Path) -> None:
    new_policy("qwen3").save(tmp_path / "base")
    with_adapter(load_policy(tmp_path / "base")).save(tmp_path / "adapter")
    new_policy("qwen3", hidden_size=48).save(tmp_path / "base")
    with pytest.raises(ModelError, match="does not fit its model"):
        load_policy(tmp_path / "adapter")


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", "1 that its layers need are missing, the first of them .*layers.1.*lora_A"),
        ("add", "1 have no place in the model, the first of them .*layers.9.*lora_A"),
    ],
)
def test_an_adapter_with_missing_or_left_over_tensors_is_refused(
    new_policy, tmp_path: Path, architecture: str, change: str, message: str
) -> None:
    new_policy(architecture).save(tmp_path / "base")
    with_adapter(load_policy(tmp_path / "base")).save(tmp_path / "adapter")
    load_policy(tmp_path / "adapter")  # whole, it is taken
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if "layers.1" in n and "q_proj" in n and "lora_A" in n)
    tensor = tensors.pop(name) if change == "drop" else tensors[name]
    if change == "add":
        tensors[name.replace("layers.1", "layers.9")] = tensor.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_policy(tmp_path / "adapter")


def test_without_peft_the_message_names_the_extra(new_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    with pytest.raises(ModelError, match=r"pip install 'sapo-rl\[lora\]'"):
        with_adapter(copy.copy(new_policy("qwen3")))
