"""Rows in the form of the four benchmarks of Fig. 6, and a tiny Qwen3-VL that has tokens for all their characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from sapo.model.tiny_vision import picture_tokenizer, tiny_vision_model

PLAIN = {*map(chr, range(32, 127)), "\n"}


def write_vision_model(directory: Path, rows: Iterable[Path], max_length: int = 4096) -> Path:
    """Save an untrained tiny Qwen3-VL whose characters are those of files of rows."""
    texts = (json.loads(line) for file in rows for line in file.open(encoding="utf-8"))
    characters = {c for row in texts for c in json.dumps(row, ensure_ascii=False)}
    tokenizer = picture_tokenizer("".join(sorted(characters | PLAIN)))
    model, family = tiny_vision_model(
        "qwen3_vl", tokenizer, seed=0, hidden_size=32, heads=2, kv_heads=1, max_length=max_length
    )
    for part in (model, family.processor, tokenizer):
        part.save_pretrained(directory)
    return directory


def write_rows(directory: Path) -> Path:
    """Write a file of rows for each benchmark, two problems in each, with a picture beside those of MathVision."""
    (directory / "images").mkdir(parents=True)
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (24, 16), colour).save(directory / "images" / f"{number}.png")
    solution = {"header": ["House", "Name"], "rows": [["1", "Eve"], ["2", "Bob"]]}
    tests = json.dumps([{"input": "3\n", "output": "6", "testtype": "stdin"}])
    rows = {
        "aime25": [{"problem": f"What is {n} times 7?", "answer": str(7 * n)} for n in (3, 4)],
        "livecodebench": [
            {"question_title": f"Double {n}", "question_content": "Read n and print 2 n.", "starter_code": ""}
            | {"difficulty": "easy", "public_test_cases": tests, "question_id": str(n)}
            for n in (1, 2)
        ],
        "zebralogic": [
            {"id": str(n), "size": "2*1", "puzzle": f"Who lives where, {n}?", "solution": solution} for n in (1, 2)
        ],
        "mathvision": [
            {"id": "1", "question": "How many shapes?\n<image1>", "options": [], "answer": "1"}
            | {"subject": "counting", "image": "images/0.png"},
            {"id": "2", "question": "Which colour?\n<image1>", "options": ["red", "blue"], "answer": "B"}
            | {"subject": "counting", "image": "images/1.png"},
        ],
    }
    for name, lines in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return directory
