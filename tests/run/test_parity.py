"""The parity check: an engine with a copy of the weights that is not the policy's stops the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import sapo
from sapo.config import RolloutConfig
from sapo.config.recipes import parse_settings
from sapo.data import Picture, Prompt
from sapo.errors import ConfigError, ParityError
from sapo.rollout.vllm.engine import VllmEngine
from sapo.run.parity import ParityCheck, prompts_to_check
from support.copying_engine import CopyingEngine
from support.runs import REWARD, metrics, write_recipe

COPYING = "support.copying_engine:CopyingEngine"


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def train(directory: Path, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    return sapo.train(sapo.load_recipe(write_recipe(directory, **{"eval__every": 0, **changes}))).directory


def checked(run: Path) -> list[int]:
    return [m["step"] for m in metrics(run) if m["kind"] == "parity"]


def test_half_of_what_is_checked_has_pictures_where_a_batch_has_them() -> None:
    text = [Prompt(i, "t", "") for i in range(12)]
    pictured = [Prompt(i, "t", "", pictures=(Picture(str(i), (8, 8)),)) for i in range(12)]
    assert prompts_to_check(text + pictured) == [0, 1, 2, 3, 12, 13, 14, 15]
    assert prompts_to_check(text + pictured[:1]) == [*range(7), 12]
    assert prompts_to_check(pictured) == prompts_to_check(text) == list(range(8))
    assert prompts_to_check(pictured[:2] + text[:1]) == [0, 1, 2]


def test_the_first_batches_are_checked_and_then_every_nth(tmp_path: Path) -> None:
    # by hand: batches 0 to 3, then 5 of 0, 5, ...; steps count from 1
    assert checked(train(tmp_path, rollout__engine=COPYING, rollout__parity_every=5)) == [1, 2, 3, 4, 6]


def test_a_right_copy_passes_with_its_figures_in_the_metrics(tmp_path: Path) -> None:
    run = train(tmp_path, rollout__engine=COPYING)
    found = [m for m in metrics(run) if m["kind"] == "parity"]
    assert [m["step"] for m in found] == [1, 2, 3, 4]
    assert all(0 <= m["log_ratio/max_abs"] < 1e-5 and m["ratio/abs_dev"] < 1e-5 and m["tokens"] > 50 for m in found)


def test_an_engine_without_a_copy_is_checked_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    assert checked(train(tmp_path / "silent", train__steps=2)) == []
    assert checked(train(tmp_path / "asked", train__steps=2, rollout__parity_every=3)) == [1, 2]
    assert checked(train(tmp_path / "off", train__steps=2, rollout__parity_every=0, rollout__engine=COPYING)) == []


def test_the_check_changes_no_run(tmp_path: Path) -> None:
    with_checks = metrics(train(tmp_path / "with", rollout__parity_every=1))
    without = metrics(train(tmp_path / "without"))
    assert [m for m in with_checks if m["kind"] != "parity"] == without


@pytest.mark.parametrize(
    "changes", [{}, {"rollout__top_p": 0.9}, {"experiments__sampler_dtype": "float8_e4m3fn"}, {"rollout__staleness": 2}]
)
def test_an_engine_that_keeps_old_weights_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    monkeypatch.setattr(CopyingEngine, "stale_from", 1)
    with pytest.raises(ParityError) as stopped:
        train(tmp_path, rollout__engine=COPYING, train__learning_rate=3e-2, train__warmup_steps=0, **changes)
    message = str(stopped.value)
    assert "the engine does not sample with the policy's weights" in message
    assert f"by rollout.engine={COPYING}" in message
    assert "by the trainer (|log r| " in message
    assert "rollout.parity_tolerance allows 0.001 of largest |log r|" in message
    assert "\n" not in message
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["reason"] == message
    assert checked(tmp_path / "run"), "the first batch was drawn from the weights the run starts from"


def test_right_copies_pass_where_the_batch_itself_cannot_be_compared(tmp_path: Path) -> None:
    for name, changes in {
        "cut": {"rollout__top_p": 0.9, "rollout__min_p": 0.05},
        "rounded": {"experiments__sampler_dtype": "float8_e4m3fn"},
        "stale": {"rollout__staleness": 3},
    }.items():
        run = train(tmp_path / name, rollout__engine=COPYING, train__steps=4, **changes)
        assert len(checked(run)) == (6 if name == "stale" else 4), "under staleness two batches are drawn ahead"


@pytest.mark.parametrize(
    ("dtype", "tolerance", "largest", "mean", "passes"),
    [
        ("float32", None, 0.0009, 0.0, True),
        ("float32", None, 0.0011, 0.0, False),
        ("float32", 0.01, 0.009, 0.0, True),
        ("bfloat16", None, 2.0, 0.09, True),  # single tokens may differ by rounding
        ("bfloat16", None, 2.0, 0.11, False),
        ("bfloat16", 0.2, 2.0, 0.11, True),
        ("float32", None, float("nan"), 0.0, False),
    ],
)
def test_the_tolerance_is_of_single_tokens_in_float32_and_of_their_mean_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float | None, largest: float, mean: float, passes: bool
) -> None:
    import torch

    from sapo.run import parity
    from sapo.run.self_check import Comparison

    found = Comparison(largest, mean, 512, -1.5, -1.25)
    monkeypatch.setattr(parity, "compare_logprobs", lambda *_: found)
    collector = SimpleNamespace(
        engine=SimpleNamespace(capabilities=SimpleNamespace(copies_weights=True)),
        params=SimpleNamespace(full_distribution=True),
    )
    config = SimpleNamespace(
        rollout=RolloutConfig(parity_tolerance=tolerance),
        train=SimpleNamespace(minibatches=1),
        experiments=SimpleNamespace(sampler_dtype_at=lambda _: None),
    )
    check = ParityCheck(config, SimpleNamespace(dtype=getattr(torch, dtype)), collector, None, Path("run"))
    if passes:
        assert check.check([], 4, 0)["ratio/abs_dev"] == mean
    else:
        with pytest.raises(ParityError, match=r"step 5: .* log-probability -1\.5000 by .* and -1\.2500 by the trainer"):
            check.check([], 4, 0)


def test_settings_of_vllm_are_refused_beside_the_local_engine() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.vllm is for rollout\.engine=vllm; got engine local"):
        parse_settings(RolloutConfig, {"vllm": {"kv_cache_gib": 2}})
    assert parse_settings(RolloutConfig, {"engine": "vllm", "vllm": {"kv_cache_gib": 2}}).vllm is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.ranks=2", r"runs in the process that trains, which must be one; got train\.ranks=2"),
        ("device=cuda:3", r"draws on the first device it sees; got device=cuda:3; .*CUDA_VISIBLE_DEVICES=3"),
    ],
)
def test_what_the_engine_vllm_cannot_do_is_refused_without_vllm(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VllmEngine.check(sapo.load_recipe(write_recipe(tmp_path), [override]))
