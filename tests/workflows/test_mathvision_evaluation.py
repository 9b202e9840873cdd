"""MathVision from the command line: rows and pictures of a directory, a tiny vision-language model, the results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sapo.data import Completion
from support.list_engine import ListEngine
from support.vision_rows import write_vision_model
from support.zygote import run_forked

ROWS = Path(__file__).parents[2] / ".." / "shared" / "benchdata" / "mathvision_testmini_40.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROWS.is_file(), reason="the benchmark rows (../shared/benchdata) are not here"),
]


class ReferenceEngine(ListEngine):
    """Answers with the reference of each problem, or with junk to every second sample."""

    def _draw(self, prompt, sample, params):
        text = f"The answer is {prompt.answer}" if sample % 2 == 0 else "I cannot see it"
        tokens = (*self.policy.encode(text), self.policy.tokenizer.eos_token_id)
        return Completion(tokens, (-1.0,) * len(tokens), "stop", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("model"), [ROWS])


@pytest.mark.parametrize("engine", ["local", "workflows.test_mathvision_evaluation:ReferenceEngine"])
def test_the_benchmark_runs_end_to_end_and_references_are_right(model, engine, tmp_path):
    """In another directory than the rows, whose paths begin at their file."""
    tests = Path(__file__).parents[1]
    command = [
        "eval",
        str(model),
        "--task",
        "mathvision",
        f"path={ROWS.resolve()}",
        "--engine",
        engine,
        "--samples",
        "2",
    ]
    command += ["--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = run_forked(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    figures = json.dumps(results)
    assert "answered_by_letter" in figures
    lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert all(len(line["pictures"]) == 1 for line in lines)
    if engine != "local":
        rewards = [[sample["reward"] for sample in line["samples"]] for line in lines]
        assert rewards == [[1.0, 0.0]] * 40
