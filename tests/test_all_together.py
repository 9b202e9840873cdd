"""What was written apart, in one run: an old and rounded sampler, its correction, routing replay, refilled groups, a
penalty, an adapter, recomputed activations, true gradients, a profile, and a collapse that is gone back from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sapo
import sapo.diagnostics.warnings
from sapo.diagnostics.warnings import Finding
from sapo.workflows.train import resume
from support.runs import REWARD, fingerprint, metrics, write_model, write_recipe

STEPS = 7
EVERYTHING: dict[str, Any] = {
    "model__lora": {"rank": 4},
    "model__routing_replay": True,
    "objective__name": "gspo",  # a coupled one: the correction's slopes are then those of autograd
    "objective__tis": {"mode": "token"},
    "objective__kl": {"coefficient": 0.01},
    "rollout__staleness": 3,
    "experiments__sampler_dtype": "float8_e4m3fn",
    "rollout__zero_variance": "refill",
    "rollout__max_refills": 1,
    "train__steps": STEPS,
    "train__learning_rate": 0.02,
    "train__warmup_steps": 0,
    "train__activation_checkpointing": True,
    "eval__every": 5,
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
    "diagnostics": {
        "true_gradient_every": 3,
        "counterfactuals": [{"name": "sapo"}, {"name": "grpo"}],
        "distributions_every": 2,
    },
    "warnings": {"on_collapse": "rollback", "collapse_causes": ["gradient_spike"]},
    "log__rollouts_every": 1,
    "profile": True,
}


def collapse_of_step_5(health: Any, record: Any, settings: Any) -> list[Finding]:
    """A rule that the fifth step breaks, unless it has come back at half of the learning rate."""
    bad = record["step"] == 5 and record["learning_rate"] > 0.01
    return [Finding("gradient_spike", bad, record["learning_rate"], 0.01, "broken on purpose")]


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sapo.diagnostics.warnings, "update_findings", collapse_of_step_5)


def run_everything(directory: Path, should_stop: Callable[[], bool] = lambda: False, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    recipe = write_recipe(directory, **{**EVERYTHING, **changes})
    write_model(directory / "model", "qwen3_moe", experts=6, experts_per_token=2)
    return sapo.train(sapo.load_recipe(recipe), should_stop=should_stop).directory


@pytest.mark.slow
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_a_run_of_everything_measures_it_goes_back_and_resumes_bit_for_bit(tmp_path: Path, replay: str) -> None:
    asked = 0

    def counted() -> bool:
        nonlocal asked
        asked += 1
        return False

    whole = run_everything(tmp_path / "whole", counted, model__routing_replay=replay)
    records = metrics(whole)
    [back] = [m for m in records if m["kind"] == "rollback"]
    # Step 4's checkpoint would have been proven by step 5; that of step 3 was.
    assert (back["step"], back["to"], back["learning_rate_scale"]) == (5, 3, 0.5)
    updates = [m for m in records if m["kind"] == "update"]
    assert [(u["step"], u["update"]) for u in updates] == [(s, u) for s in range(1, STEPS + 1) for u in range(2)]
    # Three updates old, two a step: the first batch alone meets the weights that sampled it.
    assert [u["on_policy"] for u in updates] == [True] + [False] * (2 * STEPS - 1)
    assert [m.get("rollout/age") for m in records if m["kind"] == "step"] == [None, 2, *[3] * (STEPS - 2)]
    assert updates[0]["ratio/abs_dev"] < 1e-5, "log pi_old is the trainer's"
    assert updates[0]["mismatch/abs_dev"] > 1e-4, "and mu another's"
    for update in updates:
        assert {"kl", "tis/mean", "routing/changed_share", "theory/variance_mean"} <= update.keys()
        # Of an update whose tokens the clip has all silenced there is no gradient to compare with.
        asked_for_gradients = update["step"] in (1, 3, 6) and update["gate/effective_tokens"] > 0
        assert ("true_gradient/grpo/cosine" in update) == asked_for_gradients
    rows = [json.loads(line) for f in sorted((whole / "rollouts").iterdir()) for line in f.open()]
    measured = {(r["update"], r["on_policy"]) for r in rows if "log_ratio" in r}
    assert measured == {(0, True), (0, False), (1, False)}
    for share in (0.25, 0.7):  # before it goes back and after
        calls = iter(range(10**6))
        stop_at = int(share * asked)
        stopped = run_everything(
            tmp_path / f"stopped-{share}",
            lambda calls=calls, stop_at=stop_at: next(calls) >= stop_at,
            model__routing_replay=replay,
        )
        assert not (stopped / "summary.json").exists()
        resume(stopped)
        assert fingerprint(stopped, STEPS) == fingerprint(whole, STEPS)
