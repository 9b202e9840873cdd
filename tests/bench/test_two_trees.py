"""Two trees beside each other: what counts as a difference of results, and what a token costs as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.same_results import CASES, Side, compare_case, compare_tensors, first_difference
from bench.token_data import Rows, measure_checkpoint, measure_memory, measure_pack, table_row
from safetensors.torch import save_file

CASE = CASES[0]


def write_run(scratch: Path, *, loss: float = 0.5, token: int = 7, weight: float = 1.0, skipped: bool = False) -> Side:
    """A run directory with one update, one completion and one tensor."""
    run = scratch / "runs" / CASE.directory
    checkpoint = run / "checkpoints" / "step-000003"
    for directory in (run / "rollouts", checkpoint):
        directory.mkdir(parents=True)
    update = {"kind": "update", "skipped": skipped, "loss": loss, "timing": {"seconds": len(scratch.name)}}
    (run / "metrics.jsonl").write_text(json.dumps(update) + "\n")
    (run / "rollouts" / "step-000001.jsonl").write_text(json.dumps({"token_ids": [3, token], "detail": scratch.name}))
    save_file({"w": torch.full((2,), weight)}, checkpoint / "model.safetensors")
    save_file({"ids": torch.tensor([len(scratch.name)])}, checkpoint / "batches.safetensors")
    return Side(scratch, scratch)


def test_runs_that_differ_in_clocks_wording_and_state_files_are_equal(tmp_path: Path) -> None:
    row, wrong = compare_case(CASE, write_run(tmp_path / "a"), write_run(tmp_path / "other"))
    assert row == "| quickstart | 3 | 1/1 | 1/1 | 1/1 |"
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"loss": 0.5 + 2**-53}, "quickstart: metrics.jsonl line 1: loss: 0.5 and 0.5000000000000001"),
        ({"token": 8}, "quickstart: step-000001.jsonl line 1: token_ids[1]: 7 and 8"),
        ({"weight": 1 + 2**-23}, "quickstart: model.safetensors w: torch.float32 [2], 2 bytes differ"),
    ],
)
def test_one_bit_is_a_difference_and_its_place_is_named(tmp_path: Path, change: dict[str, float], first: str) -> None:
    _, wrong = compare_case(CASE, write_run(tmp_path / "a"), write_run(tmp_path / "b", **change))
    assert wrong == [first]


def test_runs_that_trained_nothing_or_wrote_nothing_prove_nothing(tmp_path: Path) -> None:
    sides = [write_run(tmp_path / name, skipped=True) for name in "ab"]
    for side in sides:
        (side.scratch / "runs" / CASE.directory / "rollouts" / "step-000001.jsonl").unlink()
    row, wrong = compare_case(CASE, *sides)
    assert "| 0/0 |" in row
    assert [line.split(":")[1].split(" to ")[0].strip() for line in wrong] == [
        "no completions",
        "no update of BASE moved the weights, so that the comparison shows little",
    ]


def test_values_written_differently_differ() -> None:
    assert first_difference({"a": 1}, {"a": 1.0}) == "a: 1 and 1.0"
    assert first_difference({"a": 0.0}, {"a": -0.0}) == "a: 0.0 and -0.0"
    assert first_difference({"a": None}, {}) == "a: None and Ellipsis"
    assert first_difference([1], [1, 2]) == "record: [1] and [1, 2]"
    assert first_difference({"a": [{"b": 2}]}, {"a": [{"b": 3}]}) == "a[0].b: 2 and 3"


def test_tensors_are_compared_by_their_bits() -> None:
    nan = torch.tensor(float("nan"), dtype=torch.bfloat16)
    assert compare_tensors({"x": nan}, {"x": nan.clone()}).first is None
    assert (
        compare_tensors({"x": torch.zeros(3)}, {"x": -torch.zeros(3)}).first == "x: torch.float32 [3], 3 bytes differ"
    )
    assert compare_tensors({"x": torch.zeros(3)}, {"x": torch.zeros(1, 3)}).equal == 0
    assert compare_tensors({}, {"x": torch.zeros(3)}).first == "x: only in HEAD"


def test_token_data_are_measured_on_this_tree() -> None:
    rows = Rows.draw(8)
    figures = measure_memory(rows) | measure_pack(rows) | measure_checkpoint(rows)
    assert set(figures) == {"traced", "resident", "pack", "write", "size", "read"}
    # A token id and two log-probs of four bytes each are the least that can be kept.
    assert figures["traced"] >= 12
    assert figures["size"] >= 12
    assert min(figures[name] for name in ("pack", "write", "read")) > 0


def test_a_goal_is_judged_by_the_medians_and_a_missing_side_by_nothing() -> None:
    rounds = [[{"pack": base}, {"pack": head}] for base, head in ((10.0, 1.0), (12.0, 1.0), (50.0, 2.0))]
    assert table_row("pack", rounds) == (
        "| `pack`, CPU us a token | 12 (10 .. 50) | 1 (1 .. 2) | 12 | 10 times as fast: met |"
    )
    assert "| not measured |  | 10 times as fast |" in table_row("pack", [[{"pack": 1.0}, {}]])
