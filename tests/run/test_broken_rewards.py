"""A reward function that does not work: found before a run, and in a run by its exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapo
from sapo.errors import RewardError, TaskError
from sapo.workflows.train import dry_run
from support.kernels import fresh_cache
from support.runs import write_recipe

REWARDS = """
def breaks(completion):
    raise KeyError("answer")

def breaks_on_models(completion):
    if completion != "7":
        raise ZeroDivisionError("a length of nothing")
    return 1.0

def breaks_on_sevens(completion):
    if "7" in completion and len(completion) > 1:
        raise RuntimeError("no sevens")
    return 0.5
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))
    (tmp_path / "broken_rewards.py").write_text(REWARDS)
    return write_recipe(tmp_path)


def load(recipe: Path, function: str, *overrides: str) -> sapo.RunConfig:
    return sapo.load_recipe(recipe, [f"tasks.0.verifier=broken_rewards:{function}", "train.steps=2", *overrides])


@pytest.mark.parametrize("start", [sapo.train, dry_run])
def test_a_function_that_fails_on_a_made_completion_is_refused_before_a_run(recipe, start):
    with pytest.raises(TaskError, match=r"failed on a made completion, .*: KeyError: 'answer'; mend it"):
        start(load(recipe, "breaks"))
    assert not (recipe.parent / "run").exists()


def test_a_dry_run_shows_what_the_function_gives(recipe):
    (tried,) = dry_run(load(recipe, "breaks_on_sevens")).rewards
    assert tried.score.reward == 0.5
    assert tried.sentence.startswith(f"reward function of {tried.task}: 0.5 for the made completion ")
    assert dry_run(sapo.load_recipe(recipe, ["tasks.0.verifier=last_number"])).rewards == ()


def test_a_function_that_fails_on_every_completion_of_a_step_stops_the_run_with_its_exception(recipe):
    every = r"step 1: the verifier failed on (\d+) of \1 completions, .*ZeroDivisionError"
    with pytest.raises(RewardError, match=every):
        sapo.train(load(recipe, "breaks_on_models", "tasks.0.score_truncated=true"))


def test_a_function_that_fails_at_times_is_warned_of_with_its_first_exception_and_their_number(recipe):
    run = sapo.train(load(recipe, "breaks_on_sevens", "tasks.0.score_truncated=true")).directory
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    warnings = [line["text"] for line in lines if line["kind"] == "warning" and line["cause"] == "verifier_failed"]
    steps = [line for line in lines if line["kind"] == "step"]
    failed = [(int(s["status/verifier_error"]), 16) for s in steps if s["status/verifier_error"]]
    assert failed
    judged = [line for line in lines if line["kind"] == "eval" and line.get("status/verifier_error")]
    of_evaluations = [text for text in warnings if text.startswith("evaluation on prompts: ")]
    assert len(of_evaluations) == len(judged) > 0
    assert all("RuntimeError: no sevens; its figures are over the others" in text for text in of_evaluations)
    assert [text for text in warnings if text not in of_evaluations] == [
        f"the verifier failed on {n} of {of} completions, the first time with RuntimeError: no sevens"
        for n, of in failed
    ]
