"""Small real runs for the tests: an untrained model, a reward that varies in every group, and how to compare runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model

REWARD = '''
def share_of_sevens(completion, answer):
    """Dense, so that an untrained model has something to learn in every group."""
    return completion.count("7") / 8


def enough_sevens(completion, metadata):
    """All or nothing, so that some groups have zero variance; harder the more a row asks for."""
    return 1.0 if completion.count("7") >= metadata["sevens"] else 0.0
'''


def write_model(directory: Path, architecture: str = "qwen3", seed: int = 0, **shape: Any) -> Path:
    """Save an untrained tiny model."""
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    size = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 48, "max_length": 64}
    model = tiny_model(
        architecture,
        len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**size, **shape},
    )
    prepare_policy(model, tokenizer).save(directory)
    return directory


def write_recipe(directory: Path, **changes: Any) -> Path:
    """Write recipe.yaml with its model, data and reward into a directory; `a__b=1` sets a.b."""
    write_model(directory / "model")
    (directory / "rewards_of_a_test.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i + 1}=", "answer": "7"} for i in range(24)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "threads": 1,
        "model": {"path": str(directory / "model")},
        "tasks": [
            {
                "name": "file",
                "path": str(directory / "prompts.jsonl"),
                "verifier": "rewards_of_a_test:share_of_sevens",
                "score_truncated": True,
            }
        ],
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 12},
        "train": {"steps": 6, "minibatches": 2, "learning_rate": 1e-3, "warmup_steps": 2},
        "eval": {"every": 3, "problems": 2, "samples": 2},
        "checkpoint": {"every": 2},
        "log": {"tensorboard": False, "rollouts_every": 2},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def make_each_once(run: Callable[..., Path], factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a run of given settings the first time, and returns its directory every time.

    Args:
        run: makes a run in a directory, with settings.
    """
    made: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = run(factory.mktemp("whole"), **changes)
        return made[key]

    return get


def write_mixture(directory: Path, **changes: Any) -> Path:
    """Write a recipe that mixes three tasks 2:1:1, of 16 rows each, harder from task to task."""
    file = write_recipe(directory, **{"rollout__prompts_per_step": 8, "log__rollouts_every": 1, **changes})
    recipe = yaml.safe_load(file.read_text())
    recipe["tasks"] = []
    for name, weight, sevens in (("one", 2, 1), ("two", 1, 2), ("three", 1, 3)):
        rows = [{"prompt": f"{sevens}*{i}=", "answer": "7", "sevens": sevens} for i in range(16)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        recipe["tasks"].append(
            {
                "name": "file",
                "label": name,
                "weight": weight,
                "path": str(directory / f"{name}.jsonl"),
                "verifier": "rewards_of_a_test:enough_sevens",
                "score_truncated": True,
            }
        )
    file.write_text(yaml.safe_dump(recipe))
    return file


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def fingerprint(run: Path, step: int) -> dict[str, Any]:
    """Everything of a finished run that must be equal bit for bit: metrics, weights, optimizer, completions."""
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    assert list(checkpoint.glob("optimizer*.safetensors"))
    files = [
        *sorted(checkpoint.glob("*.safetensors")),
        *sorted((run / "rollouts").iterdir()),
    ]
    return {
        "metrics": metrics(run),
        **{f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
