"""The token view's data: what is embedded, what was left out, and what the other gates would have done."""

from __future__ import annotations

import base64
import gzip
import json
import math
from pathlib import Path

import pytest

from sapo.report.runs import read_runs
from sapo.report.tokens import Chunk, token_view
from support.report_cases import ATTACKS, END, default_rows, rollout_row, settings, write_run


def unpack(chunk: Chunk) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(chunk.data)))


def view_of(path: Path, budget: int | None = None, **options):
    return token_view(read_runs([write_run(path, **options)]), budget)


def test_a_step_is_embedded_with_every_token_and_its_numbers(tmp_path: Path) -> None:
    view = view_of(tmp_path / "a")
    assert [(c.step, c.samples, c.left_out) for c in view.chunks] == [(2, 8, 0), (4, 8, 0)]
    value = unpack(view.chunks[1])
    assert [len(p["samples"]) for p in value["prompts"]] == [2] * 4
    row, sample = default_rows()[3], value["prompts"][1]["samples"][1]
    assert [value["texts"][t] for t in sample["t"]] == ["1", "3", "\n", " twelve", ATTACKS[3], *"56789", "<end>"]
    assert sample["text"] == row["text"]
    assert sample["z"] == pytest.approx(row["log_ratio"], rel=1e-4)
    assert sample["w"] == pytest.approx(row["gate_weight"], rel=1e-4)
    assert sample["e"] == pytest.approx(row["entropy"], rel=1e-4)
    # SAPO's slope f'(r) r A with A = -1
    assert sample["a"] == pytest.approx(
        [-w * math.exp(z) for w, z in zip(row["gate_weight"], row["log_ratio"], strict=True)], rel=1e-4
    )
    assert (sample["update"], sample["off"], sample["low"]) == (1, True, min(row["gate_weight"]))


def test_the_verdicts_of_grpo_and_gspo_are_those_of_their_bands(tmp_path: Path) -> None:
    value = unpack(view_of(tmp_path / "a").chunks[0])
    better, worse = value["prompts"][1]["samples"]
    z = [0.1 * (t % 9 - 4) for t in range(11)]
    # A > 0: clipped above 1.27; A < 0: below 0.8.
    assert better["grpo"] == "".join("0" if math.exp(v) > 1.27 else "1" for v in z)
    assert worse["grpo"] == "".join("0" if math.exp(v) < 0.8 else "1" for v in z)
    assert "0" in better["grpo"]
    assert "0" in worse["grpo"]
    # mean z = (0 - .4 - .3) / 11 < -3e-4: too far down for A < 0, on the way back for A > 0
    assert (better["gspo"], worse["gspo"]) == (1, 0)


def test_a_sample_whose_group_taught_nothing_has_no_numbers(tmp_path: Path) -> None:
    sample = unpack(view_of(tmp_path / "a").chunks[0])["prompts"][3]["samples"][0]
    assert not {"z", "w", "a", "e", "grpo", "gspo", "low", "update"} & set(sample)
    assert len(sample["t"]) == len(sample["p"]) == 11


def test_the_reward_an_advantage_is_of_stands_beside_the_verifiers(tmp_path: Path) -> None:
    rows = [rollout_row(0, 0, [3, 4, END], shaped_reward=0.25), rollout_row(0, 1, [3, END])]
    shaped, plain = unpack(view_of(tmp_path / "a", rollouts={1: rows}).chunks[0])["prompts"][0]["samples"]
    assert (shaped["reward"], shaped["shaped"]) == (1.0, 0.25)
    assert "shaped" not in plain, "there is one reward alone"


def test_advantages_of_turns_make_the_slopes_of_their_tokens(tmp_path: Path) -> None:
    """At r = 1 the slope is the advantage."""
    said = [[2, [4], "1;", None], [3, [5], "2;", None]]
    row = rollout_row(0, 0, [1, 2, 3, 4], update=0, observations=said, turn_advantages=[1.0, -0.5, 0.25])
    value = unpack(view_of(tmp_path / "a", rollouts={4: [row]}).chunks[0])
    (shown,) = value["prompts"][0]["samples"]
    assert shown["a"] == [1.0, 1.0, -0.5, 0.25]
    assert shown["turns"] == [1.0, -0.5, 0.25]
    assert shown["heard"] == [[2, [["environment", "1;"]], 0], [3, [["environment", "2;"]], 0]]


def test_a_run_without_entropy_or_a_known_objective_leaves_them_out(tmp_path: Path) -> None:
    rows = [{k: v for k, v in r.items() if k != "entropy"} for r in default_rows()]
    config = settings(name="of_another_version")
    sample = unpack(view_of(tmp_path / "a", rollouts={1: rows}, config=config).chunks[0])["prompts"][0]["samples"][0]
    assert "e" not in sample
    assert "a" not in sample
    assert "z" in sample


def test_a_budget_keeps_the_last_step_and_whole_prompts_and_counts_the_rest(tmp_path: Path) -> None:
    rollouts = {step: default_rows() for step in range(1, 11)}  # 88 tokens a step
    runs = read_runs([write_run(tmp_path / "a", rollouts=rollouts)])
    few = token_view(runs, 3 * 88)
    assert [c.step for c in few.chunks] == [1, 5, 10]
    assert few.logged_steps == 10
    tight = token_view(runs, 50)
    assert [(c.step, c.samples, c.tokens, c.left_out) for c in tight.chunks] == [(10, 4, 44, 4)]
    assert [c.step for c in token_view(runs, None).chunks] == list(range(1, 11))


def test_the_budget_counts_what_was_said_to_the_model(tmp_path: Path) -> None:
    heard = [[2, [4] * 30, "4" * 30, None]]
    rows = [rollout_row(prompt, sample, [1, 2, 3, END], observations=heard) for prompt in (0, 1) for sample in (0, 1)]
    runs = read_runs([write_run(tmp_path / "a", rollouts={4: rows})])
    assert [(c.samples, c.tokens, c.left_out) for c in token_view(runs, 4 * 34).chunks] == [(4, 4 * 34, 0)]
    assert [(c.samples, c.tokens, c.left_out) for c in token_view(runs, 4 * 34 - 1).chunks] == [(2, 2 * 34, 2)]


def test_one_response_longer_than_the_budget_is_shown_all_the_same(tmp_path: Path) -> None:
    view = view_of(tmp_path / "a", 100, rollouts={1: [rollout_row(0, 0, [1] * 4000), rollout_row(0, 1, [1] * 4000)]})
    assert [(c.samples, c.tokens, c.left_out) for c in view.chunks] == [(1, 4000, 1)]


def test_without_a_tokenizer_tokens_are_numbers_and_the_view_says_whose(tmp_path: Path) -> None:
    view = view_of(tmp_path / "a", tokenizer=False)
    assert view.numbers_only == (0,)
    assert unpack(view.chunks[0])["texts"][:2] == ["[0]", "[3]"]
    assert f"[{END}]" in unpack(view.chunks[0])["texts"]
    assert view_of(tmp_path / "b").numbers_only == ()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a")])
    assert token_view(runs, None) == token_view(runs, None)
