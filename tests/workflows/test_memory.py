"""The memory estimate: exact where it counts, and within 20% of what real processes take."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from sapo.config.recipes import load_recipe
from sapo.data import Prompt
from sapo.model.attention import TreeLayout
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.layouts import PrefillLayout
from sapo.training.batch import pack
from sapo.workflows.activations import Counts, full_length_group, kept_bytes, measure_activations
from sapo.workflows.memory import estimate_memory, measure_cache
from support.moe_cases import make_moe
from support.runs import write_recipe

ESTIMATE = """
import json, sys
from sapo.config.recipes import load_recipe
from sapo.workflows.train import dry_run
print(json.dumps(dry_run(load_recipe(sys.argv[1])).memory.to_json()))
"""
RUN = """
import sys
from pathlib import Path
from sapo.config.recipes import load_recipe
from sapo.workflows.train import train
train(load_recipe(sys.argv[1]))
[line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


def in_a_process(code: str, recipe: Path) -> Any:
    search = os.pathsep.join(filter(None, [str(recipe.parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", code, str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def middle_model(directory: Path) -> Path:
    """A random Llama of 35 million parameters that almost never draws its end token."""
    # One token for each of many characters, so that different tokens are different texts and get different rewards.
    tokenizer = character_tokenizer("0123456789+-*%=;#" + "".join(map(chr, range(0x4E00, 0x4E00 + 16_000))))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    prepare_policy(model, tokenizer).save(directory)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("size", ["tiny", "middle"])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(size: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rollout__max_new_tokens": 24, "train__steps": 2, "eval__every": 0}
    if size == "middle":
        model = middle_model(tmp_path / "middle")
        changes |= {"model__path": str(model), "rollout__samples_per_prompt": 8, "train__minibatches": 1}
        (tmp_path / "varied.py").write_text("def varied(completion):\n    return sum(map(ord, completion)) % 7 / 7\n")
    recipe = write_recipe(tmp_path, **changes)
    if size == "middle":
        settings = yaml.safe_load(recipe.read_text())
        settings["tasks"][0]["verifier"] = "varied:varied"
        recipe.write_text(yaml.safe_dump(settings))
    estimate, peak = in_a_process(ESTIMATE, recipe), in_a_process(RUN, recipe)
    assert 0.8 <= estimate["peak"] / peak <= 1.2, (estimate, peak / 2**20)
    if size == "middle":  # most of it is the model's, so the test is not of the libraries' size alone
        assert estimate["peak"] > 1.5 * estimate["phases"]["checkpoint"]["interpreter and libraries"]


def groups(prompts: int, prompt_tokens: int, samples: int, new_tokens: int) -> list[Any]:
    return [
        full_length_group(Prompt(i, "t", "", (i, *(0,) * (prompt_tokens - 1))), samples, new_tokens)
        for i in range(prompts)
    ]


def packed(parts: list[Any]) -> Any:
    options = {"normalizer": "sequence_mean", "tokens_per_microbatch": 10**6, "max_new_tokens": 99}
    return pack(parts, **options, include_all=True).microbatches[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
def test_activations_of_a_larger_batch_are_what_the_small_ones_say(
    architecture: str, checkpointing: bool, new_policy: Any
) -> None:
    policy = new_policy(architecture)
    cost = measure_activations(policy, checkpointing)
    for shape in ((2, 40, 4, 24), (3, 17, 5, 31), (1, 3, 8, 50)):
        batch = packed(groups(*shape))
        # Measured on that batch itself: counted storages, in bytes.
        assert cost.bytes(Counts.of_policy(policy, batch)) == pytest.approx(
            kept_bytes(policy, batch, checkpointing), rel=0.02
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hybrid_is_counted_to_within_a_few_percent(checkpointing: bool, new_policy: Any) -> None:
    policy = new_policy("qwen3_5")  # the first rectangle of a tree begins without a state, and keeps less for it
    cost = measure_activations(policy, checkpointing)
    for shape in ((2, 40, 4, 24), (1, 3, 8, 50), (1, 200, 2, 150)):
        batch = packed(groups(*shape))
        kept = kept_bytes(policy, batch, checkpointing)
        assert cost.bytes(Counts.of_policy(policy, batch)) == pytest.approx(kept, rel=0.1)


def test_a_mixture_of_experts_is_counted_to_within_a_few_percent(new_policy: Any) -> None:
    policy = new_policy("qwen3_moe")  # which expert computes what depends on the tokens
    batch = packed(groups(2, 40, 4, 24))
    cost = measure_activations(policy)
    assert cost.bytes(Counts.of(batch)) == pytest.approx(kept_bytes(policy, batch, False), rel=0.1)


def test_checkpointing_keeps_less_and_is_switched_off_again(new_policy: Any) -> None:
    policy = new_policy("qwen3")
    whole, less = measure_activations(policy), measure_activations(policy, checkpointing=True)
    assert less.per_token < whole.per_token / 3
    assert not policy.model.is_gradient_checkpointing
    assert not policy.model.training


def in_a_graph() -> list[torch.Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None]


def test_measuring_leaves_nothing_behind(new_policy: Any) -> None:
    policy = new_policy("qwen3")
    before = in_a_graph()  # of other tests: a traceback keeps what its frames held
    measure_activations(policy)
    assert all(p.grad is None for p in policy.model.parameters())
    assert len(in_a_graph()) <= len(before)


def test_counts_are_those_of_the_attention_buckets() -> None:
    # By hand: a prompt of 3 and two responses of 2 inputs are small enough to share one bucket of 3 rows, padded to the
    # longest of each: 3 queries and 5 keys a row.
    batch = packed([full_length_group(Prompt(0, "t", "", (1, 2, 3)), 2, 3)])
    assert [b.size for b in TreeLayout(batch.segments).buckets] == [(3, 3, 5)]
    assert Counts.of(batch) == Counts(tokens=7, queries=9, keys=15, pairs=45, masks=45)


def test_scanned_tokens_are_those_of_padded_chunks() -> None:
    # By hand: a prompt of 3 tokens fills one chunk of 4; two responses of 5 inputs, two chunks each.
    batch = packed([full_length_group(Prompt(0, "t", "", (1, 2, 3)), 2, 6)])
    assert Counts.of(batch, chunk=4).scanned == 4 + 2 * 8
    assert Counts.of(batch).scanned == 0


def test_states_of_rows_are_counted_by_what_the_engine_keeps(tmp_path: Path, new_policy: Any) -> None:
    policy = new_policy("qwen3_5")
    kept = measure_cache(policy)
    # By hand: of 2 layers one is recurrent, with windows of 3 tokens of 2 * 2 + 4 heads, and 4 states of 8 x 8; the
    # other keeps keys and values of 2 heads. Heads have 8 channels, all is float32.
    assert kept.states_of_row == 4 * (3 * 8 * 8 + 4 * 8 * 8)
    assert kept.keys_of_token == 2 * 2 * 8
    parts = estimate_of(policy, tmp_path)["generate"]
    assert parts["recurrent states of the rows"] % kept.states_of_row == 0
    assert "recurrent states of the rows" not in estimate_of(new_policy("llama"), tmp_path)["generate"]


def estimate_of(policy: Policy, tmp_path: Path, dtype: str = "float32", **changes: Any) -> dict[str, dict[str, int]]:
    config = load_recipe(write_recipe(tmp_path, **changes))
    prompts = [Prompt(i, "t", "", (i, 1, 2, 3, 4, 5)) for i in range(config.rollout.prompts_per_step)]
    return estimate_memory(config, policy, prompts, baseline=0).phases


def test_weights_moments_masters_and_gradients_are_counted_by_their_bytes(tmp_path: Path, new_policy: Any) -> None:
    policy = new_policy("llama")
    count = policy.num_parameters
    phases = estimate_of(policy, tmp_path)
    assert phases["update, backward"]["weights"] == 4 * count
    assert phases["update, backward"]["moments of AdamW"] == 8 * count
    assert phases["update, backward"]["gradients"] == 4 * count
    assert "float32 masters" not in phases["checkpoint"]
    narrow = estimate_of(new_policy("llama", dtype=torch.bfloat16), tmp_path)
    assert narrow["checkpoint"]["weights"] == 2 * count
    assert narrow["checkpoint"]["float32 masters"] == 4 * count
    assert narrow["checkpoint"]["moments of AdamW"] == 8 * count


def test_the_cache_is_counted_as_the_engine_allocates_it(tmp_path: Path, policies: Any) -> None:
    policy = policies("qwen3")
    phases = estimate_of(policy, tmp_path)
    config = policy.model.config
    # The recipe's 4 prompts of 6 tokens x 4 samples x 12 tokens; a row's last token is not kept.
    cache = KVCache(16, 12, [6] * 4, [4] * 4)
    for group in range(4):
        cache.admit(group)
    prefill = PrefillLayout(cache, range(4), torch.device("cpu"))
    heads = torch.zeros(24, config.num_attention_heads, config.head_dim)
    keys = torch.zeros(24, config.num_key_value_heads, config.head_dim)
    for layer in range(config.num_hidden_layers):
        prefill.attend(layer, heads, keys, keys, 1.0, None)
        cache.append(layer, 0, keys[:16], keys[:16])
    layers = [*cache.layers.values(), *(pair for pool in cache.pools for pair in pool.layers.values())]
    allocated = sum(t.numel() * t.element_size() for pair in layers for t in pair)
    assert phases["generate"]["cache of keys and values"] == allocated


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({}, 1),
        ({"rollout__zero_variance": "drop"}, 1),
        ({"rollout__zero_variance": "refill"}, 5),  # four further rounds are the default
        ({"rollout__zero_variance": "refill", "rollout__max_refills": 2}, 3),
    ],
)
def test_the_rollout_batch_counts_every_round_that_a_step_may_draw(
    changes: dict, batches: int, tmp_path: Path, policies: Any
) -> None:
    phases = estimate_of(policies("qwen3"), tmp_path, **changes)
    for phase in phases.values():  # by hand: 4 prompts x 4 samples x 12 tokens x 40 bytes are 7,680
        assert phase["rollout batch"] == batches * 7_680


def test_recorded_experts_and_a_gradient_to_compare_with_are_counted_where_there_are_some(tmp_path: Path) -> None:
    policy = make_moe()
    settings = {"rollout__staleness": 1, "model__routing_replay": True, "diagnostics": {"true_gradient_every": 2}}
    phases = estimate_of(policy, tmp_path, **settings)
    # By hand: 4 prompts of 6 tokens and 16 completions of 12, in 2 layers to 2 experts each, one byte; one batch ahead.
    assert phases["update, forward"]["recorded experts"] == 2 * (4 * 6 + 16 * 12) * 2 * 2
    for update in ("update, forward", "update, backward"):
        assert phases[update]["gradient to compare with"] == 4 * policy.num_parameters
    plain = estimate_of(policy, tmp_path)
    assert not any({"recorded experts", "gradient to compare with"} & parts.keys() for parts in plain.values())


def test_parts_that_do_not_train_have_neither_moments_nor_gradients(tmp_path: Path, new_policy: Any) -> None:
    policy = new_policy("llama")
    head = policy.head_weight
    head.requires_grad_(False)
    phases = estimate_of(policy, tmp_path)
    trained = policy.num_parameters - head.numel()
    assert phases["checkpoint"]["moments of AdamW"] == 8 * trained
    assert "gradient of the head" not in phases["update, forward"]


def test_smaller_microbatches_cost_fewer_activations_and_keep_gradients(tmp_path: Path, policies: Any) -> None:
    whole = estimate_of(policies("qwen3"), tmp_path)["update, forward"]
    cut = estimate_of(policies("qwen3"), tmp_path, train__tokens_per_microbatch=30)["update, forward"]
    assert cut["activations"] < whole["activations"] / 3
    assert cut["gradients of earlier micro-batches"] == 4 * policies("qwen3").num_parameters
    assert "gradients of earlier micro-batches" not in whole


def test_a_reference_policy_is_counted_beside_the_trained_one(tmp_path: Path, new_policy: Any) -> None:
    policy, reference = new_policy("llama"), new_policy("llama")
    config = load_recipe(write_recipe(tmp_path))
    prompts = [Prompt(i, "t", "", (i, 1, 2, 3)) for i in range(4)]
    alone, both = (estimate_memory(config, policy, prompts, 0, other).phases for other in (None, reference))
    for phase in alone:
        assert both[phase]["weights of the reference"] == 4 * reference.num_parameters
        assert "weights of the reference" not in alone[phase]
