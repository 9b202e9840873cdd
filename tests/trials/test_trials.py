"""A seeded part of the trials of faults; `make trials` runs them in full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from scripts.models import RECORDS

from support.kernels import fresh_cache
from trials import calls, damage, models, recipes, rewards
from trials.families import families
from trials.harness import Tally


@pytest.mark.parametrize(
    ("kind", "share", "least"),
    [(calls.run, 0.05, 20), (damage.run, 0.01, 20), (recipes.run, 0.1, 400), (rewards.run, 0.05, 1)],
    ids=["calls", "damage", "recipes", "rewards"],
)
def test_a_part_of_the_trials_holds(
    kind: Callable[..., Tally], share: float, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path.cwd()
    (tmp_path / "place").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "place"))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))
    try:
        tally = kind(tmp_path / "place", share=share, seed=7)
    finally:
        os.chdir(here)
    assert tally.broken == []
    assert tally.tried >= least


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "stablelm", "mpt"])
def test_a_family_is_what_the_page_of_models_says(family: str) -> None:
    recorded = models.load(RECORDS)[family]
    record = models.try_family(family)
    assert not record.wrong
    assert (record.verdict, record.engine, record.targets) == (recorded.verdict, recorded.engine, recorded.targets)


def test_the_page_of_models_has_every_family_and_none_that_is_wrong() -> None:
    recorded = models.load(RECORDS)
    made_with = json.loads(RECORDS.read_text())["transformers"]
    if made_with == transformers.__version__:
        assert sorted(recorded) == families()
    assert [family for family, record in recorded.items() if record.wrong] == []
    assert sum(bool(record.path) for record in recorded.values()) >= 100
