"""The same question and answer in the layouts of eight projects, as their documentations write rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}

EIGHT: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "verl": lambda question, answer: {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "train", "index": 7},
    },
    "trl": lambda question, answer: {"prompt": [{"role": "user", "content": question}], "solution": answer},
    "swift": lambda question, answer: {
        "messages": [
            {"role": "system", "content": "+"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "-"},
        ],
        "solution": answer,
    },
    "openai": lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "tools": [TOOL],
    },
    "openrlhf": lambda question, answer: {"input": [{"role": "user", "content": question}], "label": answer},
    "verifiers": lambda question, answer: {
        "question": question,
        "info": json.dumps({"answer": answer}),
        "task": "sums",
    },
    "alpaca": lambda question, answer: {"instruction": "+", "input": question, "output": answer},
    "sharegpt": lambda question, answer: {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    },
}
"""Functions of a question and its answer."""


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
