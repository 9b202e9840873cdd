"""The proof at loading: what leaks, differs, overflows or fails is found, and the reason is the true one."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.positions import fixed_length
from sapo.model.proof import NARROWED, WIDEST, make_probe, reaches, within_reach
from sapo.model.tiny import character_tokenizer
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.proof import CACHED, WHOLE

TOKENIZER = character_tokenizer("0123456789+-*=?")
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make(family: str, scale: float = 5.0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny model of a family; `scale` multiplies its matrices, which begin at .02."""
    config = AutoConfig.for_model(family, **{**SHAPE, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(scale)
    return model.to(dtype).eval()


class Mixer(nn.Module):
    """A layer that adds part of the token before, as a convolution over packed tokens does."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = torch.roll(hidden_states, 1, dims=1)
        before[:, 0] = 0.0
        return self.inner(hidden_states + self.share * before, *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1e-3, 1.0])
def test_a_leak_is_found_however_small_it_is(share: float, dtype: torch.dtype) -> None:
    # At a share of .001 log-probabilities differ by less than both tolerances, so that size would not tell.
    model = make("llama", dtype=dtype)
    model.model.layers[0].mlp = Mixer(model.model.layers[0].mlp, share)
    policy = prepare_policy(model, TOKENIZER)
    assert policy.path == "rows"
    assert "one response flows into another" in str(policy.path_reason)


def test_a_convolution_with_small_weights_leaks_where_it_does_not_take_its_states_from_the_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With weights of .02 the leak is 5e-5 in log-probability, and was accepted once.
    options: dict[str, Any] = {"scale": 1.0, "layer_types": ["conv", "full_attention"]}
    assert prepare_policy(make("lfm2", **options), TOKENIZER).path == "packed"
    monkeypatch.setattr("sapo.model.policy.use_states", lambda decoder: None)
    policy = prepare_policy(make("lfm2", **options), TOKENIZER)
    assert policy.path == "rows"
    assert "one response flows into another" in str(policy.path_reason)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_experts_of_a_mixture_do_not_pass_for_a_leak(family: str) -> None:
    # An exchanged response sends other rows to the experts, whose products may round otherwise for all of them.
    assert prepare_policy(make(family, **EXPERTS), TOKENIZER).path == "packed"


@pytest.mark.parametrize(("family", "path"), [("llama", "packed"), ("stablelm", "rows")])
def test_what_only_rounds_otherwise_from_call_to_call_is_no_leak(family: str, path: str) -> None:
    # As experts of a mixture do when other rows come to them: bits change, and there is no derivative.
    model = make(family)
    own, calls = type(model.model.norm).forward, []

    def rounding(module: nn.Module, hidden: Tensor) -> Tensor:
        calls.append(None)
        return own(module, hidden) * (1.0 + 1e-6 * len(calls))

    model.model.norm.forward = MethodType(rounding, model.model.norm)
    assert prepare_policy(model, TOKENIZER).path == path


@torch.no_grad()
def test_another_response_changed_leaves_the_hidden_states_of_the_rest_the_same_to_the_bit() -> None:
    policy = prepare_policy(make("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4), TOKENIZER)
    segments = (Segment(0, 9, -1), Segment(9, 6, 0), Segment(15, 5, 0))
    ids = torch.randint(14, (20,), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[9:15] = (ids[9:15] + 1) % 14
    positions = torch.tensor([*range(9), *range(9, 15), *range(9, 14)])
    one, two = (policy.hidden(x, positions, TreeLayout(segments)) for x in (ids, other))
    assert torch.equal(one[:9], two[:9])
    torch.testing.assert_close(one[15:], two[15:], rtol=0, atol=1e-6)  # experts round by their rows
    assert not torch.equal(one[9:15], two[9:15])


def test_a_window_that_only_the_mask_has_is_found_beyond_it() -> None:
    model = make("llama4_text", **{
        "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 16,
        "no_rope_layers": [1, 1], "layer_types": ["chunked_attention"] * 2,
    })  # fmt: skip
    policy = prepare_policy(model, TOKENIZER)
    assert policy.path == "rows"
    assert "from the model's own" in str(policy.path_reason)


@pytest.mark.parametrize(("window", "proven"), [(16, 16), (100, NARROWED)])
def test_the_proof_goes_beyond_windows_and_narrows_wide_ones(window: int, proven: int) -> None:
    # 100 is more than WIDEST.
    assert window <= WIDEST or proven == NARROWED
    model = make("mistral", sliding_window=window)
    with within_reach(model) as widest:
        assert widest == proven
        assert {tokens for _, _, tokens in reaches(model)} == {proven}
        assert make_probe(model, TOKENIZER, widest, 256).segments[0].length > widest
    assert model.config.sliding_window == window


def test_an_indexer_that_keeps_blocks_of_keys_is_found_beyond_them() -> None:
    # 16 blocks of 128 keys are 2,048 tokens: with fewer its attention is the full one, which a packed forward computes.
    options = {"index_n_heads": 4, "index_head_dim": 8, "rotary_dim": 4, "layer_types": ["minimax_m3_sparse"] * 2}
    model = make("minimax_m3_vl_text", num_local_experts=4, num_experts_per_tok=2, **options)
    policy = prepare_policy(model, TOKENIZER)
    assert policy.path == "rows"
    assert {tokens for _, name, tokens in reaches(model) if name == "topk_blocks"} == {16}


def test_end_tokens_that_are_a_list_are_left_out_of_the_proof() -> None:
    model = make("llama", eos_token_id=[14, 15])
    assert not {14, 15} & set(make_probe(model, TOKENIZER, 0, None).ids_N.tolist())


def test_a_short_model_is_proven_within_its_positions() -> None:
    probe = make_probe(make("llama"), TOKENIZER, 16, 16)
    assert max(map(len, probe.paths)) == 16
    assert prepare_policy(make("llama", max_position_embeddings=4), TOKENIZER).path == "packed"


def test_weights_that_are_not_numbers_are_named() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r"got 1 of 1536 of model\.layers\.1\.mlp\.up_proj\.weight that are NaN"):
        prepare_policy(model, TOKENIZER)


def test_a_precision_that_overflows_is_named() -> None:
    model = make("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * float("inf"))
    with pytest.raises(ModelError, match=r"although its weights are; in float32 it overflows"):
        prepare_policy(model, TOKENIZER)


def test_what_fails_in_the_model_itself_is_a_refusal_with_its_own_words() -> None:
    model = make("llama")

    def fail(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        raise AttributeError("no such buffer")

    model.model.layers[1].mlp.forward = MethodType(fail, model.model.layers[1].mlp)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot compute a sequence of text: no such buffer"):
        prepare_policy(model, TOKENIZER)


def test_what_is_exact_neither_packed_nor_in_rows_is_refused_with_both_reasons() -> None:
    model = make("llama")
    calls = []

    def drift(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(None)
        output[0].mul_(1.0 + 0.1 * len(calls)) if isinstance(output, tuple) else output.mul_(1.0 + 0.1 * len(calls))

    model.model.layers[0].self_attn.register_forward_hook(drift)
    with pytest.raises(ModelError, match=r"exact neither on packed tokens \(.*\) nor in padded rows \(.*\)"):
        prepare_policy(model, TOKENIZER)


def test_a_cap_that_the_head_does_not_know_is_found_in_eight_bits_too() -> None:
    # The cap moves log-probabilities by less than bfloat16's tolerance of .25.
    model = make("llama", dtype=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda module, args, logits: 3.0 * torch.tanh(logits / 3.0))
    with pytest.raises(ModelError, match="between its last hidden states and its logits"):
        prepare_policy(model, TOKENIZER)


def test_a_small_difference_that_is_more_than_rounding_is_said() -> None:
    model = make("llama")
    shift = {"on": 0.0}
    model.lm_head.register_forward_hook(lambda module, args, logits: logits)
    policy = prepare_policy(model, TOKENIZER)
    assert policy.notices == []
    model = make("llama")
    own = type(model.model.norm).forward

    def drifting(module: nn.Module, hidden: Tensor) -> Tensor:
        shift["on"] += 1
        return own(module, hidden) * (1.0 + (4e-4 if shift["on"] > 2 else 0.0))

    model.model.norm.forward = MethodType(drifting, model.model.norm)
    assert [n for n in prepare_policy(model, TOKENIZER).notices if "more than the rounding of float32" in n]


@pytest.mark.parametrize(("broken", "way"), [(False, CACHED), (True, WHOLE)])
def test_an_engine_that_is_not_exact_gives_way_to_rows_and_then_to_whole_rows(
    broken: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import DynamicCache

    from sapo.rollout.local import engine as packed

    if broken:  # a cache that is not put in the order of the rows
        monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, index: None)
    monkeypatch.setattr(packed.KVCache, "append", lambda self, *_: 1 / 0)
    monkeypatch.setenv("SAPO_NATIVE", "0")
    policy = prepare_policy(make("gemma2", query_pre_attn_scalar=8, attn_logit_softcapping=2.0), TOKENIZER)
    engine = LocalEngine(policy)
    assert engine.way == way
    assert policy.engine_paths["packed"] == "division by zero"
    assert [n for n in policy.notices if "is decoded in" in n]


@pytest.mark.parametrize(
    ("rope", "positions", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, (64, "dynamic")),
        (
            {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            96,
            (24, "longrope"),
        ),
    ],
    ids=["default", "dynamic", "longrope"],
)
def test_sequences_end_where_the_rotary_embedding_would_change_for_all_of_them(
    rope: dict[str, Any], positions: int, expected: tuple[int, str] | None
) -> None:
    original = {"original_max_position_embeddings": 24} if rope["rope_type"] == "longrope" else {}
    model = make("phi3" if original else "llama", rope_parameters=rope, max_position_embeddings=positions, **original)
    policy: Policy = prepare_policy(model, TOKENIZER)
    assert fixed_length(policy.model.config) == expected
    if expected is None:
        return
    limit = expected[0]
    assert policy.max_length == limit
    ids = torch.randint(14, (limit + 1,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        policy.hidden(ids[:limit], torch.arange(limit), TreeLayout((Segment(0, limit, -1),)))
        with pytest.raises(ModelError, match=f"at most {limit} tokens in a model of {expected[1]} rotary"):
            policy.hidden(ids, torch.arange(limit + 1), TreeLayout((Segment(0, limit + 1, -1),)))


@torch.no_grad()
def test_a_long_row_does_not_move_the_others_of_its_micro_batch() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    options = {"rope_parameters": rope, "max_position_embeddings": 96, "original_max_position_embeddings": 24}
    policy = prepare_policy(make("phi3", **options), TOKENIZER)
    assert [n for n in policy.notices if "at most 24 tokens, of 96 positions" in n]
    ids = torch.randint(14, (32,), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([*range(8), *range(24)])
    alone = policy.hidden(ids[:8], positions[:8], TreeLayout((Segment(0, 8, -1),)))
    beside = policy.hidden(ids, positions, TreeLayout((Segment(0, 8, -1), Segment(8, 24, -1))))
    torch.testing.assert_close(alone, beside[:8], rtol=0, atol=1e-5)


def test_positions_inside_a_composite_config_are_found() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SHAPE, "max_position_embeddings": 64, "sliding_window": 8}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    assert prepare_policy(model, TOKENIZER).max_length == 64
