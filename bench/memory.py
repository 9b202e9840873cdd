"""The memory estimate beside what real runs take: `python -m bench.memory [MODEL_DIRECTORY ...]`.

Every figure comes from a process of its own: one that only estimates (as `sapo train --dry-run` does) and one that runs
two steps of the recipe with evaluation and checkpoint. The peak is VmHWM of /proc/self/status, the most that was ever
resident; ru_maxrss would do but for a child, which inherits its parent's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer, tiny_model

MIB = 2**20
REWARD = '''
def last_token(completion):
    """Different within nearly every group, whatever the model says."""
    return sum(map(ord, completion)) % 7 / 7
'''


@dataclass(frozen=True)
class Case:
    """A model and the settings that shape its memory."""

    name: str
    model: Path
    rollout: dict[str, Any]
    train: dict[str, Any]
    dtype: str = "float32"


def save_tiny(directory: Path) -> Path:
    """The tiny Qwen3 of the quick start, untrained."""
    tokenizer = character_tokenizer("0123456789+-*%=;#")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    prepare_policy(tiny_model("qwen3", len(tokenizer), seed=0, **ids), tokenizer).save(directory)
    return directory


def save_middle(directory: Path) -> Path:
    """A random Llama of 56 million parameters, untied; it almost never draws its end token."""
    # One token for each of many characters, so that different tokens are different texts and get different rewards.
    tokenizer = character_tokenizer("0123456789+-*%=;#" + "".join(map(chr, range(0x4E00, 0x4E00 + 24_000))))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    prepare_policy(model, tokenizer).save(directory)
    return directory


def write_recipe(case: Case, directory: Path) -> Path:
    """A recipe of two steps for a case, with its prompts and its reward."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "reward_of_the_memory_bench.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i + 1}=" + "1+2=3;" * 4, "answer": "7"} for i in range(100, 200)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run_dir": str(directory / "run"),
        "threads": 1,
        "model": {"path": str(case.model), "dtype": case.dtype},
        "tasks": [
            {
                "name": "file",
                "path": str(directory / "prompts.jsonl"),
                "verifier": "reward_of_the_memory_bench:last_token",
                "score_truncated": True,
            }
        ],
        "rollout": case.rollout,
        "train": {"steps": 2, **case.train},
        "eval": {"every": 0, "problems": 2, "samples": 2},
    }
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def estimated(recipe: Path) -> dict[str, Any]:
    """What a fresh process estimates."""
    answer: dict[str, Any] = json.loads(_in_a_process("estimate", recipe))
    return answer


def measured(recipe: Path) -> int:
    """The peak of a fresh process that runs the recipe, in bytes."""
    return int(_in_a_process("run", recipe))


def cases(directory: Path, models: list[Path]) -> Iterator[Case]:
    """The built-in models, then those given."""
    short = {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": 24}
    yield Case("tiny Qwen3", save_tiny(directory / "tiny"), {**short, "max_new_tokens": 64}, {"minibatches": 2})
    middle = save_middle(directory / "middle")
    yield Case("Llama 56M", middle, short, {"minibatches": 2})
    yield Case("Llama 56M, 1024 tokens a micro-batch", middle, short, {"minibatches": 1, "tokens_per_microbatch": 1024})
    long = {"prompts_per_step": 4, "samples_per_prompt": 16, "max_new_tokens": 128}
    yield Case("Llama 56M, 128 tokens", middle, long, {"minibatches": 2})
    for model in models:
        name = model.resolve().name
        yield Case(name, model, short, {"minibatches": 2})
        yield Case(f"{name}, 600 tokens a micro-batch", model, short, {"minibatches": 1, "tokens_per_microbatch": 600})
        yield Case(f"{name}, checkpointing", model, short, {"minibatches": 2, "activation_checkpointing": True})
        yield Case(f"{name}, bfloat16", model, short, {"minibatches": 2}, "bfloat16")


def main(models: list[Path]) -> None:
    """Measure and print the table."""
    table = Table()
    for column in ("model", "largest phase", "estimate, MiB", "measured, MiB", "estimate / measured"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(cases(Path(scratch), models)):
            recipe = write_recipe(case, Path(scratch) / str(number))
            estimate, peak = estimated(recipe), measured(recipe)
            figures = (f"{estimate['peak'] / MIB:,.0f}", f"{peak / MIB:,.0f}", f"{estimate['peak'] / peak:.2f}")
            table.add_row(case.name, estimate["largest_phase"], *figures)
            print(case.name, estimate["largest_phase"], *figures, flush=True)
    Console().print(table)


def _in_a_process(what: str, recipe: Path) -> str:
    search = os.pathsep.join(filter(None, [str(recipe.parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "bench.memory", f"--{what}", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout.splitlines()[-1]


def _child(what: str, recipe: str) -> None:
    from sapo.config.recipes import load_recipe
    from sapo.workflows.train import dry_run, train

    if what == "--estimate":
        print(json.dumps(dry_run(load_recipe(recipe)).memory.to_json()))
        return
    train(load_recipe(recipe))
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    print(int(line.split()[1]) * 1024)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--estimate"], ["--run"]):
        _child(*sys.argv[1:])
    else:
        main([Path(argument) for argument in sys.argv[1:]])
