"""`sapo diagnose`: its verdict, what it leaves out, what the command prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapo
from sapo.errors import ConfigError
from sapo.model.loading import load_policy
from sapo.model.rounding import Rounding
from sapo.objectives import make_objective
from sapo.workflows.evaluation_plan import plan_evaluations
from sapo.workflows.sampler_mismatch import PARTS, SYMMETRIC, Force, MismatchDiagnosis, diagnose
from support.commands import call
from support.runs import REWARD, write_recipe


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_without_a_right_answer_there_is_no_gradient_to_compare_with(tmp_path: Path) -> None:
    model = Path(str(sapo.load_recipe(write_recipe(tmp_path)).model.path))
    policy = load_policy(model)
    before = policy.fingerprint()
    asked = plan_evaluations(model, ["arithmetic"], ["digits=1"], problems=4, samples=2, max_new_tokens=8)
    found = diagnose(policy, asked, Rounding("float8_e5m2", "none"), {"grpo": make_objective("grpo")})
    assert policy.fingerprint() == before
    assert found.completions == 8
    assert found.dose > 0
    assert found.gradient_norm is None, "an untrained model is never right"
    assert all(force.force is None for force in found.forces)
    assert "force" not in found.to_json()["forces"][0], "what was not measured is left out"


@pytest.mark.parametrize(
    ("dose", "verdict"),
    [
        (0.001, "harmless"),
        (0.005, "nearly harmless"),
        (0.008, "between what was nearly harmless and what was harmful"),
        (0.011, "harmful to sharp clips"),
    ],
)
def test_the_verdict_is_by_the_doses_that_were_tried(dose: float, verdict: str) -> None:
    forces = (Force("sapo", 1.0, 0.0, 0.01), Force("grpo", 0.99, 0.01, 1.4), Force(SYMMETRIC, 0.9, 0.1, 0.0))
    found = MismatchDiagnosis("m", "float8_e4m3fn", "none", False, ("t",), 8, 100, dose, 10 * dose, 0.5, 1.0, forces)
    assert found.verdict == verdict
    assert ("sapo would not chase the mismatch" in found.recommendation) == (dose > 0.006)
    assert ("grpo would" in found.recommendation) == (dose > 0.006)
    assert ("objective.tis" in found.recommendation) == (dose > 0.006)


def test_the_command_measures_a_run_on_its_own_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objective = {"name": "sapo", "tau_pos": 8.0, "tau_neg": 9.0}
    config = sapo.load_recipe(write_recipe(tmp_path, train__steps=1, objective=objective))
    run = sapo.train(config).directory
    capsys.readouterr()
    sizes = ("--problems", "2", "--samples", "4")
    assert call("diagnose", str(run), "--sampler-dtype", "float8_e5m2", *sizes, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [f["objective"] for f in told["forces"]] == ["sapo of the run", "sapo", "grpo", "gspo", "cispo", SYMMETRIC]
    assert told["completions"] == 8
    assert told["dose"] > 1e-3
    forces = {f["objective"]: f["force"] for f in told["forces"]}
    assert forces["sapo of the run"] > forces["sapo"] > forces["cispo"] == 0
    assert call("diagnose", str(run), *sizes) == 0
    shown = capsys.readouterr().out
    assert "mean |r - 1|" in shown
    assert "recommendation: " in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler-dtype", "fp8"], "--sampler-dtype must be one of bfloat16, float8_e4m3fn, float8_e5m2; got 'fp8'"),
        (["--sampler-scaling", "row"], "--sampler-scaling must be one of none, tensor, channel; got 'row'"),
        (["--objectives", "grop"], "--objectives: objective must be one of"),
        (["--objectives", ","], "--objectives names objectives between commas"),
        (["--temperature", "0"], "a diagnosis needs a sampler that draws; got temperature 0"),
        ([], "is not a run directory, so it has no tasks of its own; name one with --task"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    write_recipe(tmp_path)
    task = ["--task", "arithmetic", "--max-new-tokens", "8"] if words else []
    assert call("diagnose", str(tmp_path / "model"), *task, *words) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert len(said.strip().splitlines()) == 1


def test_two_problems_are_the_least(tmp_path: Path) -> None:
    model = Path(str(sapo.load_recipe(write_recipe(tmp_path)).model.path))
    asked = plan_evaluations(model, ["arithmetic"], [], problems=1, samples=2, max_new_tokens=8)
    with pytest.raises(ConfigError, match="needs 2 problems and 2 samples of each; got 1 and 2"):
        diagnose(load_policy(model), asked, Rounding("bfloat16"), {})
    assert PARTS >= 2
