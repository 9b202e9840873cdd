"""Recipes on pictures and text, 1:1, from an untrained tiny vision-language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sapo.model.tiny_vision import picture_tokenizer, tiny_vision_model
from support.pictures import encoded, noise
from support.runs import write_recipe


def write_vision_recipe(
    directory: Path, architecture: str = "qwen3_vl", more: dict[str, int] | None = None, **changes: Any
) -> Path:
    """Write the model, whose shape may be given, and the recipe."""
    directory.mkdir(exist_ok=True)
    recipe = write_recipe(directory, **{"log__rollouts_every": 1, "rollout__prompts_per_step": 8, **changes})
    tokenizer = picture_tokenizer("0123456789+-*%=;#")
    shape = {"hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 48, "max_length": 64, "experts": 6}
    model, family = tiny_vision_model(architecture, tokenizer, seed=0, **{**shape, **(more or {})})
    for part in (model, family.processor, tokenizer):
        part.save_pretrained(directory / "model")
    settings = yaml.safe_load(recipe.read_text())
    settings["tasks"].insert(0, {"name": "picture_sums", "jitter": 1})
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def write_pictured_rows(directory: Path, architecture: str = "qwen3_vl", **changes: Any) -> Path:
    """Write a recipe on rows of files: half of them show a picture that lies beside them."""
    recipe = write_vision_recipe(directory, architecture, **changes)
    rows = []
    for i in range(30):
        (directory / f"{i}.png").write_bytes(encoded(noise(i, 48, 32)))
        rows.append({"prompt": "<image>=", "image": f"{i}.png", "answer": "7"})
    (directory / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load(recipe.read_text())
    judged = {"verifier": "rewards_of_a_test:share_of_sevens", "score_truncated": True}
    settings["tasks"][0] = {"name": "file", "path": "pictures.jsonl", **judged}
    settings["tasks"][1]["path"] = "prompts.jsonl"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe
