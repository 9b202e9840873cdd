"""A policy: what it loads, what it refuses and how it says so, and the directory it saves."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.attention import ATTENTION_NAME, TreeLayout
from sapo.model.loading import load_policy, prepare_policy
from sapo.model.tiny import character_tokenizer
from sapo.utils.text import first_line

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


@torch.no_grad()
def packed_logits(policy, ids_N=IDS):
    layout = TreeLayout((Segment(0, len(ids_N), -1),))
    return policy.logits(policy.hidden(ids_N, torch.arange(len(ids_N)), layout))


@pytest.fixture
def directory(policies, tmp_path):
    """A saved tiny qwen3, to be spoilt."""
    policies("qwen3").save(tmp_path / "model")
    return tmp_path / "model"


def assert_refused(directory, *parts, dtype="float32"):
    with pytest.raises(ModelError) as caught:
        load_policy(directory, dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    for part in parts:
        assert part in message


def test_a_saved_policy_is_an_ordinary_directory_with_equal_logits_and_generate(policy, plain, tmp_path):
    policy.save(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    assert policy.model.config._attn_implementation == ATTENTION_NAME
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(input_ids=IDS[None]).logits[0]
        torch.testing.assert_close(logits, plain(policy)(input_ids=IDS[None]).logits[0], rtol=0, atol=0)
    torch.testing.assert_close(packed_logits(policy), logits, rtol=0, atol=1e-4)
    tokens = model.generate(IDS[None], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=16)
    assert tokens.shape == (1, len(IDS) + 5)
    assert AutoTokenizer.from_pretrained(tmp_path)("12+3=")["input_ids"] == [1, 2, 10, 3, 13]


def test_a_loaded_policy_is_the_policy_that_was_saved(policy, tmp_path):
    policy.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert torch.equal(packed_logits(loaded), packed_logits(policy))
    assert loaded.num_parameters == policy.num_parameters
    assert loaded.encode("12+3=") == (1, 2, 10, 3, 13)
    assert (loaded.dtype, loaded.device.type, loaded.max_length) == (torch.float32, "cpu", 512)
    loaded.save(tmp_path / "again")
    assert torch.equal(packed_logits(load_policy(tmp_path / "again")), packed_logits(policy))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_load(directory, policies, dtype):
    loaded = load_policy(directory, dtype)
    assert loaded.dtype == getattr(torch, dtype)
    # bfloat16 keeps 8 bits of logits of size 10; float64 differs by what float32 rounds.
    tolerance = {"bfloat16": 0.3, "float64": 1e-4}[dtype]
    torch.testing.assert_close(
        packed_logits(loaded).double(), packed_logits(policies("qwen3")).double(), rtol=0, atol=tolerance
    )


def test_a_missing_directory_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "no model directory")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer*", "has no tokenizer (none of tokenizer.json"),
        ("*.safetensors", "has no weights (*.safetensors)"),
    ],
)
def test_a_missing_file_is_named(directory, pattern, message):
    missing = list(directory.glob(pattern))
    assert missing
    for path in missing:
        path.unlink()
    assert_refused(directory, message)


def test_a_broken_config_is_named(directory):
    (directory / "config.json").write_text('{"model_type": "qwen3",\n')
    assert_refused(directory, "config.json is not valid JSON", "line 2")


def test_an_unknown_architecture_is_named(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "none_such"}))
    assert_refused(directory, "none_such")


def test_a_broken_tokenizer_is_named(directory):
    (directory / "tokenizer.json").write_text("{")
    assert_refused(directory, "tokenizer")


def test_broken_weights_are_named(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(directory, "cannot be loaded")


def test_weights_of_another_shape_are_named(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    assert_refused(directory, "cannot be loaded")


def test_weights_that_lack_a_layer_are_refused_rather_than_made_up(directory):
    config = json.loads((directory / "config.json").read_text())
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps({**config, **more}))
    assert_refused(directory, "model.layers.2")


def test_a_tied_output_embedding_does_not_count_as_missing(new_policy, tmp_path):
    policy = new_policy("qwen3", tie_embeddings=True)
    policy.save(tmp_path)
    assert torch.equal(packed_logits(load_policy(tmp_path)), packed_logits(policy))


def test_a_tokenizer_without_an_end_is_refused_unless_the_model_names_one(directory, new_policy):
    policy = new_policy("qwen3")
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = None
    policy.model.config.eos_token_id = None
    shutil.rmtree(directory)
    policy.save(directory)
    assert_refused(directory, "no end-of-sequence token", "eos_token")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert load_policy(directory).stop_token_ids == {4, 5}


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, {15}), (15, {15}), (3, {3, 15}), ([3, 5], {3, 5, 15})], ids=str
)
def test_stop_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(new_policy, configured, expected):
    policy = new_policy("llama")
    policy.model.generation_config.eos_token_id = configured
    assert policy.stop_token_ids == expected


def gemma2(**options):
    config = Gemma2Config(
        vocab_size=17,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


TOKENIZER = character_tokenizer("0123456789+-*=?")


@pytest.mark.parametrize("scores", [None, 2.0], ids=["scores free", "scores capped"])
@pytest.mark.parametrize("logits", [None, 3.0], ids=["logits free", "logits capped"])
def test_soft_capping_is_computed_as_the_model_does(scores, logits):
    # Gemma2 also scales its embeddings, norms twice and has a window in every second layer: all within the decoder.
    model = gemma2(attn_logit_softcapping=scores, final_logit_softcapping=logits)
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(packed_logits(prepare_policy(model, TOKENIZER)), expected, rtol=1e-5, atol=1e-4)


def test_a_step_between_decoder_and_logits_is_refused(new_policy):
    model = new_policy("llama").model
    model.lm_head.register_forward_hook(lambda module, args, logits: 0.9 * logits)
    with pytest.raises(ModelError, match="LlamaForCausalLM does something between its last hidden"):
        prepare_policy(model, TOKENIZER)


def test_dropout_is_turned_off_in_training_too():
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.5))
    policy = prepare_policy(model, TOKENIZER)
    assert not model.training
    before = packed_logits(policy)
    model.train()
    assert torch.equal(packed_logits(policy), before)


def test_only_parameters_that_require_gradients_are_trained(new_policy):
    policy = new_policy("llama")
    everything = policy.num_parameters
    policy.model.lm_head.weight.requires_grad_(False)
    assert sum(p.numel() for p in policy.parameters()) == everything - 17 * 32
    assert policy.num_parameters == everything


def test_an_unknown_character_is_a_model_error_that_quotes_the_prompt(policies):
    with pytest.raises(ModelError, match=r"cannot encode the prompt '12\+x='"):
        policies("qwen3").encode("12+x=")
    with pytest.raises(ModelError, match="at least one token; got none from ''"):
        policies("qwen3").encode("")


def test_messages_go_through_the_chat_template_or_are_refused(new_policy):
    policy = new_policy("qwen3")
    with pytest.raises(ModelError, match="no chat template"):
        policy.encode_messages([{"role": "user", "content": "1+1"}])
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    assert policy.encode_messages([{"role": "user", "content": "1+"}, {"role": "user", "content": "2"}]) == (
        1,
        10,
        2,
        13,
    )


def test_decode_leaves_special_tokens_out(policies):
    assert policies("qwen3").decode([4, 6, 16, 13, 15]) == "46="


def test_the_first_line_of_a_message_is_quoted():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
