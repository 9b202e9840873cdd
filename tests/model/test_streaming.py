"""A model copied tensor by tensor is the model that transformers would have saved, byte for byte where it can be.

The reference is what `save_pretrained` writes of the model loaded whole, merged and cast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo.errors import ConfigError
from sapo.model.adapters import add_adapter, merged
from sapo.model.loading import load_policy
from sapo.model.policy import DTYPES, Policy
from sapo.model.streaming import copy_model, parse_size
from support.runs import write_model

WHOLE = 10**9
IDS = torch.tensor([[1, 2, 11, 3, 5, 7]])


def copy(source: Path, target: Path, dtype: str = "float32", trained: str = "float32", size: int = WHOLE) -> Any:
    target.mkdir()
    return copy_model(source, target, dtype=DTYPES[dtype], trained_dtype=DTYPES[trained], max_shard_size=size)


def saved_whole(source: Path, target: Path, dtype: str = "float32", trained: str = "float32") -> Policy:
    policy = load_policy(source, trained)
    if policy.adapter is not None:
        policy = Policy(merged(policy), policy.tokenizer)
    policy.model.to(DTYPES[dtype])
    policy.model.save_pretrained(target)
    return policy


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def logprobs(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS).logits.log_softmax(-1)


def with_adapter(directory: Path, targets: Any = "all-linear", **shape: Any) -> Path:
    write_model(directory / "base", **shape)
    policy = load_policy(directory / "base")
    add_adapter(policy, rank=2, alpha=4, targets=targets, seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number)).mul_(0.1)
    policy.save(directory / "adapter")
    return directory / "adapter"


SHAPES = [
    {},
    {"tie_embeddings": True},
    {"architecture": "qwen3_moe"},
    {"architecture": "qwen3_moe", "tie_embeddings": True},
    {"architecture": "llama"},
    {"architecture": "mistral", "sliding_window": 8},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_copied_as_transformers_saves_it_byte_for_byte(
    shape: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model", **shape)
    copied = copy(source, tmp_path / "copied", dtype)
    policy = saved_whole(source, tmp_path / "saved", dtype)
    assert files(tmp_path / "copied") == files(tmp_path / "saved")
    assert (copied.architecture, copied.num_parameters) == (type(policy.model).__name__, policy.num_parameters)


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}], ids=str)
def test_an_adapter_is_folded_into_the_weights_as_peft_merges_it(shape: dict[str, Any], tmp_path: Path) -> None:
    source = with_adapter(tmp_path, **shape)
    assert copy(source, tmp_path / "copied") is not None
    saved_whole(source, tmp_path / "saved")
    mine, theirs = files(tmp_path / "copied"), files(tmp_path / "saved")
    assert mine.keys() == theirs.keys()
    assert mine["config.json"] == theirs["config.json"]
    tensors, expected = (load_file(tmp_path / d / "model.safetensors") for d in ("copied", "saved"))
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        assert torch.equal(tensor, start[name]) == ("_proj" not in name), name


def test_an_adapter_is_added_in_float32_where_bfloat16_was_trained_and_the_sum_is_rounded_once(tmp_path: Path) -> None:
    source = with_adapter(tmp_path)
    copy(source, tmp_path / "wide", "float32", trained="bfloat16")
    copy(source, tmp_path / "rounded", "bfloat16", trained="bfloat16")
    wide, rounded = (load_file(tmp_path / d / "model.safetensors") for d in ("wide", "rounded"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    adapter = load_file(source / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    by_hand = base[f"{name}.weight"].bfloat16().float() + 2.0 * b @ a  # alpha / rank = 4 / 2
    torch.testing.assert_close(wide[f"{name}.weight"], by_hand, rtol=0, atol=1e-6)
    assert torch.equal(rounded[f"{name}.weight"], wide[f"{name}.weight"].bfloat16())


def test_attention_of_a_mixture_is_folded_and_its_experts_are_left_to_peft(tmp_path: Path) -> None:
    attention = with_adapter(tmp_path / "attention", ["q_proj", "v_proj"], architecture="qwen3_moe")
    assert copy(attention, tmp_path / "copied") is not None
    saved_whole(attention, tmp_path / "saved")
    torch.testing.assert_close(logprobs(tmp_path / "copied"), logprobs(tmp_path / "saved"), rtol=0, atol=1e-5)
    experts = with_adapter(tmp_path / "experts", "all-linear", architecture="qwen3_moe")
    if copy(experts, tmp_path / "refused") is None:
        assert not files(tmp_path / "refused")
    else:  # a peft whose all-linear leaves the experts out
        saved_whole(experts, tmp_path / "reference")
        torch.testing.assert_close(logprobs(tmp_path / "refused"), logprobs(tmp_path / "reference"), rtol=0, atol=1e-5)


def test_a_model_above_the_largest_size_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", layers=3)
    copy(source, tmp_path / "cut", size=20_000)
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 25_000 for shard in shards)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    tensors = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / "cut" / index["weight_map"][name])[name], tensor)
    assert torch.equal(logprobs(tmp_path / "cut"), logprobs(source))


def test_a_model_in_several_files_is_read_and_written_as_one(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    model.save_pretrained(tmp_path / "cut", max_shard_size=20_000)
    tokenizer.save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    copy(tmp_path / "cut", tmp_path / "copied")
    assert files(tmp_path / "copied")["model.safetensors"] == (source / "model.safetensors").read_bytes()


def test_a_model_whose_weights_are_a_pickle_is_left_to_be_loaded_whole(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert copy(source, tmp_path / "copied") is None
    assert not files(tmp_path / "copied")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KB", 1500)])
def test_a_size_is_read_in_powers_of_1000(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "-1GB", "0GB", "0.5KB", "five GB", "5GiB"])
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size must be a number with KB, MB or GB, at least 1KB; got"):
        parse_size(text)
