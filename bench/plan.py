"""`sapo plan`'s memory beside what real runs take on one and two CPU ranks: `python -m bench.plan [CASE ...]`.

Every figure comes from runs as processes of their own. Measured is the peak of each rank (VmHWM of /proc/PID/status,
the most that was ever resident) above its baseline, which is what a process holds after the same imports and a model of
next to nothing. MALLOC_MMAP_THRESHOLD_=65536 has glibc give freed blocks back at once, and the plan is taken without
the share that glibc would keep of them; `--as-it-is` measures without the variable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from bench.memory import REWARD
from sapo.config.recipes import load_recipe
from sapo.model.loading import prepare_policy
from sapo.model.tiny import character_tokenizer
from sapo.workflows.memory import MemoryEstimate
from sapo.workflows.planning.plan import make_plan

MIB = 2**20
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
HELD_BACK = "held back by the allocator"

PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A model and the settings that shape its memory."""

    name: str
    model: str
    train: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)
    """Of `model`, beside its path."""


CASES = (
    Case("dense", "dense"),
    Case("dense, checkpointing", "dense", {"activation_checkpointing": True}),
    Case("dense, tied head", "tied"),
    Case("dense, LoRA", "dense", section={"lora": {"rank": 16, "alpha": 32}}),
    Case("dense, bfloat16", "dense", section={"dtype": "bfloat16"}),
    Case("mixture of experts", "moe"),
    Case("mixture of experts, checkpointing", "moe", {"activation_checkpointing": True}),
)


def save_model(kind: str, directory: Path) -> Path:
    """Save a random model of about sixty million parameters; it almost never draws its end token."""
    tokenizer = character_tokenizer("0123456789+-*%=;#" + "".join(map(chr, range(0x4E00, 0x4E00 + 16_000))))
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": kind == "tied",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if kind == "moe":
        shape |= {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 384, "moe_intermediate_size": 384}
        config: Any = Qwen3MoeConfig(**shape, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True)
    else:
        config = Qwen3Config(**shape, hidden_size=512, num_hidden_layers=12, intermediate_size=1536)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    prepare_policy(model, tokenizer).save(directory)
    return directory


def write_recipe(case: Case, model: Path, directory: Path, ranks: int) -> Path:
    """Write a recipe of one step, with two updates, for a case, with its prompts and its reward."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "reward_of_the_memory_bench.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i + 1}=" + "1+2=3;" * 4, "answer": "7"} for i in range(100, 200)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run_dir": str(directory / "run"),
        "threads": 1,
        "device": "cpu",
        "model": {"path": str(model), **case.section},
        "tasks": [
            {
                "name": "file",
                "path": str(directory / "prompts.jsonl"),
                "verifier": "reward_of_the_memory_bench:last_token",
                "score_truncated": True,
            }
        ],
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 8, "max_new_tokens": 32},
        "train": {"steps": 1, "minibatches": 2, "tokens_per_microbatch": 300, "ranks": ranks, **case.train},
        "eval": {"every": 0, "problems": 1, "samples": 1},
        "log": {"tensorboard": False, "rollouts_every": 0},
    }
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def peaks(recipe: Path, environment: dict[str, str]) -> list[int]:
    """Run a recipe and return the most that each of its processes ever held, the driver's first."""
    most: dict[int, int] = {}
    search = os.pathsep.join(filter(None, [str(recipe.parent), os.environ.get("PYTHONPATH")]))
    with (recipe.parent / "output.txt").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "sapo", "train", str(recipe)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search, **environment},
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parents[1],
        )
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            with suppress(psutil.Error, OSError, ValueError):  # it has just ended
                for process in [driver, *driver.children()]:
                    if process is driver or "sapo.workflows.training_group" in process.cmdline():
                        most[process.pid] = max(most.get(process.pid, 0), _high_water(process.pid))
            time.sleep(0.02)
    if run.returncode:
        raise RuntimeError((recipe.parent / "output.txt").read_text()[-2000:])
    return [most.pop(run.pid), *most.values()]


def baseline(case: Case) -> int:
    """Return what a process holds after the imports of a rank and the first step of an optimizer."""
    code = (
        "import sapo.workflows.train, sapo.workflows.training_group, torch.distributed.fsdp\n"
        "from sapo.workflows.memory import baseline_bytes\n"
        "from sapo.workflows.coldstart import fresh_policy\n"
        "from sapo.config import ColdStartConfig\n"
        f"policy = fresh_policy(ColdStartConfig(architecture={'qwen3_moe' if case.model == 'moe' else 'qwen3'!r}))\n"
        + ("import peft\n" if "lora" in case.section else "")
        + "print(baseline_bytes(policy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(result.stdout.split()[-1])


def planned(estimate: MemoryEstimate) -> int:
    """Return a plan's bytes without what glibc holds back."""
    return estimate.peak - estimate.phases[estimate.largest_phase].get(HELD_BACK, 0)


def rows(cases: list[Case], scratch: Path, environment: dict[str, str]) -> Iterator[str]:
    """Yield the rows of the table."""
    for case in cases:
        model = scratch / case.model
        if not model.exists():
            save_model(case.model, model)
        beyond = baseline(case)
        for ranks in (1, 2):
            recipe = write_recipe(case, model, scratch / f"{case.name}-{ranks}", ranks)
            planned_ranks = make_plan(load_recipe(recipe), prompt_tokens=PROMPT_TOKENS).memory.ranks.values()
            for place, (peak, estimate) in enumerate(zip(peaks(recipe, environment), planned_ranks, strict=True)):
                size = planned(estimate)
                who = "one process" if ranks == 1 else "the other of two" if place else "the driver of two"
                yield (
                    f"| {case.name} | {who} | {estimate.largest_phase} | {size / MIB:,.0f} | "
                    f"{(peak - beyond) / MIB:,.0f} | {size / (peak - beyond):.2f} |"
                )


def main(arguments: list[str]) -> None:
    """Measure and print the table."""
    names = [word for word in arguments if word != "--as-it-is"]
    environment = {} if "--as-it-is" in arguments else AT_ONCE
    print("| model | rank | largest phase | plan, MiB | measured, MiB | plan / measured |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows([c for c in CASES if not names or c.name in names], Path(scratch), environment):
            print(row, flush=True)


def _high_water(pid: int) -> int:
    [line] = [s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
