"""What was written apart, in one run: an old and rounded sampler, its correction, routing replay, refilled groups, a
penalty, an adapter, recomputed activations, true gradients, a profile, and a collapse that is gone back from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sapo
import sapo.loop
from runs import REWARD, fingerprint, metrics, write_model, write_recipe
from sapo.session import resume

STEPS = 10
EVERYTHING: dict[str, Any] = {
    "model__lora": {"rank": 4},
    "model__routing_replay": True,
    "objective__name": "sapo",
    "objective__tis": {"mode": "token"},
    "objective__kl": {"coefficient": 0.01},
    "rollout__staleness": 3,
    "rollout__sampler_dtype": "float8_e4m3fn",
    "rollout__zero_variance": "refill",
    "rollout__max_refills": 1,
    "train__steps": STEPS,
    "train__learning_rate": 0.1,
    "train__warmup_steps": 0,
    "train__activation_checkpointing": True,
    "eval__every": 5,
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
    "diagnostics": {"true_gradient_every": 3, "counterfactuals_every": 2, "distributions_every": 2},
    "warnings": {"on_collapse": "rollback", "rollback_learning_rate": 0.001},
    "profile": True,
}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Three calm steps, then one that ruins the policy.
    monkeypatch.setattr(sapo.loop, "learning_rate_at", lambda step, peak, **_: min(peak, 0.001) if step < 3 else peak)


def run_recipe(directory: Path, should_stop=lambda: False, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    recipe = write_recipe(directory, **{**EVERYTHING, **changes})
    write_model(directory / "model", "qwen3_moe", experts=6, experts_per_token=2)
    return sapo.train(sapo.load_recipe(recipe), should_stop=should_stop).directory


@pytest.mark.parametrize("replay", [True, "R3"])
def test_a_run_of_everything_stopped_anywhere_goes_on_bit_for_bit(tmp_path: Path, replay: bool | str) -> None:
    whole = run_recipe(tmp_path / "whole", model__routing_replay=replay)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    run_recipe(tmp_path / "counted", count, model__routing_replay=replay)
    for share in (0.2, 0.6, 0.85):
        calls = iter(range(10**6))
        stopped = run_recipe(
            tmp_path / f"stopped-{share}", lambda c=calls, s=share: next(c) >= s * asked, model__routing_replay=replay
        )
        assert not (stopped / "summary.json").exists()
        resume(stopped)
        assert fingerprint(stopped, STEPS) == fingerprint(whole, STEPS)


def test_a_run_of_everything_measures_everything_and_goes_back(tmp_path: Path) -> None:
    run = run_recipe(tmp_path)
    records = metrics(run)
    print([ (m['step'],m['cause'],m['collapse']) for m in records if m['kind']=='warning'], [m for m in records if m['kind']=='rollback'])
    print([m['reward/mean'] for m in records if m['kind']=='step'])
    ups = [m for m in records if m["kind"] == "update"]
    print(sorted({k for m in ups for k in m}))
    print([(m['step'], m['update'], m['on_policy'], m['skipped'], m.get('kl')) for m in ups])
