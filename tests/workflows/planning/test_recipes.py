"""The recipes of the paper's sizes pass a dry run with a stand-in of the same architecture, and have its settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sapo.config.recipes import load_recipe
from sapo.model.known import model_config
from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer
from sapo.workflows.planning.plan import make_plan
from sapo.workflows.train import dry_run

RECIPES = {"qwen3_4b_sapo": "Qwen3ForCausalLM", "qwen3_30b_a3b_sapo": "Qwen3MoeForCausalLM"}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}="


def stand_in(recipe: str, directory: Path) -> Path:
    """Save a model of the config class of the recipe's model, with two narrow layers."""
    config = model_config(str(load_recipe(recipe).model.path))
    tokenizer = character_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    tokenizer.chat_template = CHAT
    narrow = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "moe_intermediate_size": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config.update({k: v for k, v in narrow.items() if hasattr(config, k)})
    config.layer_types = config.layer_types[:2] if getattr(config, "layer_types", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    prepare_policy(model, tokenizer).save(directory)
    return directory


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stand_in_of_the_same_architecture_passes_the_dry_run(recipe: str, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"prompt": f"{i}+{i}?", "answer": str(2 * i)}) + "\n" for i in range(600)))
    changes = [
        f"model.path={stand_in(recipe, tmp_path / 'model')}",
        f"tasks.0.path={queries}",
        "threads=1",
        "device=cpu",
    ]
    seen = dry_run(load_recipe(recipe, [*changes, f"run_dir={tmp_path / 'run'}"]))
    assert seen.model.startswith(RECIPES[recipe])
    assert seen.prompts[0].text.endswith("\\boxed{}.=")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settings_are_the_papers(recipe: str) -> None:
    config = load_recipe(recipe)
    # arXiv 2511.20347: temperatures, four mini-batches, no KL penalty; SAPO needs no routing replay.
    assert config.objective.hyperparameters == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert config.train.minibatches == 4
    assert config.objective.kl is None
    assert config.model.routing_replay is False
    # Pass@1 is the mean over 16 samples.
    assert config.eval.samples == 16
    assert config.eval.k == [1]


@pytest.mark.parametrize(("recipe", "gpus"), [("qwen3_4b_sapo", 8), ("qwen3_30b_a3b_sapo", 64)])
def test_the_recipes_fit_the_gpus_that_they_name(recipe: str, gpus: int) -> None:
    assert make_plan(load_recipe(recipe, [f"train.ranks={gpus}"])).fits
