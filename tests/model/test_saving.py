"""What is saved loads as what was trained, or is refused before a run begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import sapo
from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.adapters import add_adapter
from sapo.model.attention import TreeLayout
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.tiny import character_tokenizer
from sapo.run.listener import Silent
from sapo.workflows.export import export_model
from sapo.workflows.rehearsal import rehearse_saving
from sapo.workflows.train import dry_run
from support.runs import REWARD, write_model, write_recipe


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("begin", [dry_run, sapo.train])
def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(begin, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = sapo.load_recipe(write_recipe(tmp_path, train__steps=1))
    rewrite(tmp_path / "model" / "generation_config.json", do_sample=False, temperature=0.9)
    with pytest.raises(
        ModelError, match=r"cannot be saved, so that its first checkpoint would fail.*generation_config"
    ) as e:
        begin(config)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_saves_other_weights_is_refused(policies, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies("qwen3")
    rehearse_saving(policy)
    original = type(policy.model).save_pretrained

    def save(self, directory: Path, **options: object) -> None:
        original(self, directory, **options)
        weights = load_file(Path(directory) / "model.safetensors")
        name = next(name for name in weights if "mlp" in name)
        save_file({**weights, name: weights[name] + 1}, Path(directory) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(policy.model), "save_pretrained", save)
    with pytest.raises(ModelError, match=r"must load as what was saved; got other values for .*mlp"):
        rehearse_saving(policy)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    rewrite(
        tmp_path / "m" / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    with pytest.raises(
        ModelError, match=r"must be plain floats to be trained and saved; got weights quantised by 'fp8'"
    ):
        load_policy(tmp_path / "m")


def test_weights_of_more_layers_than_the_config_names_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", layers=4)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    rewrite(tmp_path / "m" / "config.json", num_hidden_layers=2, layer_types=settings["layer_types"][:2])
    with pytest.raises(ModelError, match=r"tensors that the model has no place for, the first of them .*layers\.2\."):
        load_policy(tmp_path / "m")


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    policy = load_policy(write_model(tmp_path / "m"))
    policy.model.config.tie_word_embeddings = True
    policy.model.tie_weights()
    with pytest.raises(
        ModelError, match=r"model\.lora\.targets must leave the input embedding out where the model ties"
    ):
        add_adapter(policy, rank=2, alpha=2.0, targets=["embed_tokens", "q_proj"], seed=0)


def test_an_adapter_with_a_head_is_refused_in_terms_of_the_adapter(tmp_path: Path) -> None:
    import peft

    policy = load_policy(write_model(tmp_path / "m"))
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    policy.model.name_or_path = str(tmp_path / "m")
    peft.get_peft_model(policy.model, settings).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match=r"the adapter in .*a must leave the output embedding out") as refusal:
        load_policy(tmp_path / "a")
    assert "model.lora" not in str(refusal.value)


def test_an_export_ends_where_training_did_and_a_dry_run_says_what_an_adapter_trains(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"train__steps": 1, "rollout__stop_token_ids": [3, 5], "model__lora": {"rank": 2}, "eval__problems": 1}
    config = sapo.load_recipe(write_recipe(tmp_path, **settings))
    # q, k, v, o, gate, up and down of two layers.
    assert "the adapter trains" in (said := dry_run(config).model)
    assert "q_proj (2)" in said
    notes: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    run = sapo.train(config, listener=Listening()).directory
    assert len(notes) == 1
    assert said.endswith(notes[0])
    export_model(run, tmp_path / "exported")
    eos = load_policy(tmp_path / "exported").tokenizer.eos_token_id
    ends = json.loads((tmp_path / "exported" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted({3, 5, eos})


SAVE = """
import sys
from pathlib import Path
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
policy = load_policy(sys.argv[1])
add_adapter(policy, rank=2, alpha=2.0, targets="all-linear", seed=0)
Path(sys.argv[2]).mkdir()
policy.save(Path(sys.argv[2]))
"""


def test_an_adapter_is_saved_the_same_in_every_process_and_readable_by_all(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(
            [sys.executable, "-c", SAVE, str(tmp_path / "m"), str(tmp_path / seed)],
            env=environment,
            check=True,
            timeout=300,
        )
    names = sorted(f.name for f in (tmp_path / "1").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    mask = os.umask(0)
    os.umask(mask)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "1").iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("noise", [{"router_jitter_noise": 0.5}, {"attention_dropout": 0.5}])
def test_activation_checkpointing_draws_nothing_at_random(noise: dict) -> None:
    tokenizer = character_tokenizer("0123456789+=")
    torch.manual_seed(0)
    settings = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **noise,
    )
    policy = prepare_policy(MixtralForCausalLM(settings), tokenizer)
    policy.enable_checkpointing()
    ids = torch.tensor([[1, 2, 10, 3, 11, 5]])

    def loss(on: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy.checkpoint_activations(on)
        policy.model.zero_grad()
        policy.model.set_attn_implementation("sdpa")
        found = policy.model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        found.backward()
        gradient = policy.model.get_input_embeddings().weight.grad
        assert gradient is not None
        return found.detach(), gradient.clone()

    assert any(m.training for m in policy.model.modules()) is False
    plain, recomputed = loss(False), loss(True)
    assert any(m.training for m in policy.model.modules()), "nothing was recomputed"
    assert torch.equal(plain[0], recomputed[0])
    assert torch.allclose(plain[1], recomputed[1], atol=1e-6)


def test_noise_that_a_block_draws_by_its_own_mode_stays_off_where_it_is_recomputed(new_policy, monkeypatch) -> None:
    policy = new_policy("llama")
    block = policy.decoder.layers[0]
    forward, seen = type(block).forward, []

    def noisy(self: torch.nn.Module, hidden: torch.Tensor, *inputs: object, **options: object) -> torch.Tensor:
        seen.append(self.training)
        return forward(self, torch.nn.functional.dropout(hidden, 0.5, self.training), *inputs, **options)

    monkeypatch.setattr(type(block), "forward", noisy)
    policy.enable_checkpointing()
    layout = TreeLayout([Segment(0, 3, -1)], policy.device)
    found = []
    for on in (False, True):
        policy.checkpoint_activations(on)
        policy.model.zero_grad()
        hidden = policy.hidden(torch.tensor([3, 4, 5]), torch.arange(3), layout)
        hidden.square().sum().backward()
        found.append((hidden.detach(), policy.head_weight.grad))
        assert block.training is on
    assert len(seen) == 3 * len(policy.decoder.layers)  # once without, twice with recomputation
    assert not any(seen)
    assert torch.equal(found[0][0], found[1][0])


def test_functional_dropout_and_layers_left_out_are_switched_off(policies) -> None:
    policy = policies("llama")
    block = policy.decoder.layers[0]
    for name in ("dropout", "activation_dropout", "layerdrop", "jitter_noise", "drop_prob", "resid_pdrop"):
        setattr(block, name, 0.3)
    policy.make_deterministic()
    assert all(
        getattr(block, n) == 0.0 for n in ("dropout", "activation_dropout", "layerdrop", "jitter_noise", "drop_prob")
    )
    assert block.resid_pdrop == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"pad_token_id": 99}, "AssertionError Padding_idx must be within num_embeddings"),
        ({"max_position_embeddings": "x"}, r"its config.json gives .*max_position_embeddings.* mend it"),
        ({"dtype": "float8"}, "its config.json gives .*float8"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "KeyError 'nonsense'"),
        ({"vocab_size": 20}, r"got \(19, 32\) for lm_head.weight, which is \(20, 32\) by the config"),
    ],
    ids=str,
)
def test_settings_that_no_model_can_be_built_from_are_refused(
    settings: dict, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    rewrite(tmp_path / "model" / "config.json", **settings)
    capfd.readouterr()
    with pytest.raises(ModelError, match=words) as refusal:
        load_policy(tmp_path / "model")
    assert "\n" not in str(refusal.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_weights_without_a_mark_or_a_scale_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(file)
    save_file({**weights, name: (100 * weights[name]).to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"must be plain floats .* got {name} as .*save them dequantised"):
        load_policy(tmp_path / "model")
