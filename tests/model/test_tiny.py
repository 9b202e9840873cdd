"""The tiny decoders and their tokenizer: sizes by hand, seeds, and a round trip through transformers' loaders."""

import pytest
import torch
from transformers import AutoTokenizer

from sapo.model.tiny import ARCHITECTURES, character_tokenizer, tiny_model

VOCABULARY = 19


def default_model(architecture, **options):
    return tiny_model(architecture, VOCABULARY, **{"seed": 0, "eos_token_id": 17, "pad_token_id": 18, **options})


def count(model):
    return sum(p.numel() for p in model.parameters())


def attention_by_hand(hidden=64, heads=4, kv_heads=2):
    head = hidden // heads
    return 2 * hidden * heads * head + 2 * hidden * kv_heads * head  # queries and output, keys and values


EMBEDDINGS = 2 * VOCABULARY * 64
FINAL_NORM = 64
TWO_NORMS = 2 * 64
QUERY_KEY_NORMS = 2 * 16
MLP = 3 * 64 * 128
ROUTER = 64 * 8


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("qwen3", attention_by_hand() + QUERY_KEY_NORMS + MLP + TWO_NORMS),
        ("qwen3_moe", attention_by_hand() + QUERY_KEY_NORMS + ROUTER + 8 * MLP + TWO_NORMS),
        ("llama", attention_by_hand() + MLP + TWO_NORMS),
        ("mistral", attention_by_hand() + MLP + TWO_NORMS),
    ],
)
def test_parameter_counts_by_hand(architecture, layer):
    assert count(default_model(architecture)) == EMBEDDINGS + 2 * layer + FINAL_NORM
    assert count(default_model(architecture, tie_embeddings=True)) == EMBEDDINGS // 2 + 2 * layer + FINAL_NORM
    assert count(default_model(architecture, layers=5)) == EMBEDDINGS + 5 * layer + FINAL_NORM


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_seed_alone_makes_the_weights(architecture):
    state = torch.get_rng_state()
    first, same, other = (default_model(architecture, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert {p.dtype for p in first.parameters()} == {torch.float32}


# By hand, heads of 16: queries and keys of 2 heads and values of 4 are projected and convolved together, the gate z has
# the width of the values, a and b one number a head; A_log and dt_bias likewise; the norm is of one head.
DELTA_NET = 64 * (2 * 32 + 64) + 4 * (2 * 32 + 64) + 64 * 64 + 2 * 64 * 4 + 2 * 4 + 16 + 64 * 64
# The queries come with a gate of their size.
GATED_ATTENTION = attention_by_hand() + 64 * 64 + QUERY_KEY_NORMS
SHARED_EXPERT = MLP + 64


@pytest.mark.parametrize(
    ("architecture", "mixture"), [("qwen3_5", MLP), ("qwen3_5_moe", ROUTER + 8 * MLP + SHARED_EXPERT)]
)
def test_parameter_counts_of_hybrids_by_hand(architecture, mixture):
    both = mixture + TWO_NORMS
    model = default_model(architecture)
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    assert count(model) == EMBEDDINGS + DELTA_NET + GATED_ATTENTION + 2 * both + FINAL_NORM
    # Of five layers the fourth attends, and the last.
    model = default_model(architecture, layers=5)
    assert count(model) == EMBEDDINGS + 3 * DELTA_NET + 2 * GATED_ATTENTION + 5 * both + FINAL_NORM


def test_the_window_and_the_ends_reach_the_config():
    config = default_model("mistral", sliding_window=7, max_length=99).config
    assert (config.sliding_window, config.max_position_embeddings) == (7, 99)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (17, 18, None)
    assert default_model("mistral").config.sliding_window is None


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown architecture 'gpt2'; known: qwen3, qwen3_moe, llama, mistral, qwen3_5"
    ):
        default_model("gpt2")


def test_the_character_tokenizer_survives_a_round_trip_through_transformers(tmp_path):
    alphabet = "0123456789+-*= \n"
    character_tokenizer(alphabet).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(alphabet) + 2
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (16, 17)
    for text in ("12+34=", "  7 * 8\n=", alphabet, "-"):
        ids = tokenizer(text)["input_ids"]
        assert ids == [alphabet.index(c) for c in text]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, 16, 17], skip_special_tokens=True) == text


def test_a_repeated_character_is_refused():
    with pytest.raises(ValueError, match="must not repeat a character; got '0120'"):
        character_tokenizer("0120")
