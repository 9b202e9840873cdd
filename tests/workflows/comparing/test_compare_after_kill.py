"""Whole comparisons in processes of their own: killed, stopped, broken, and taken up again.

What an uninterrupted one writes is compared bit by bit, but for the clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.processes import PATIENCE, finish, kill_when, last_line, start
from support.runs import fingerprint, write_recipe

STEPS = 12
RUNS = [f"{arm}-lr1e-3-seed{seed}" for seed in (0, 1) for arm in ("sapo", "grpo")]

pytestmark = pytest.mark.scale


def command(directory: Path, *more: str) -> list[str]:
    """Two arms of two seeds; the recipe is made when it is not there yet."""
    recipe = directory / "recipe.yaml"
    if not recipe.exists():
        write_recipe(
            directory,
            train__steps=STEPS,
            rollout__prompts_per_step=8,
            rollout__samples_per_prompt=8,
            rollout__max_new_tokens=40,
            eval__every=4,
            eval__problems=8,
            checkpoint__every=3,
        )
    return ["compare", str(recipe), "--objectives", "sapo,grpo", "--seeds", "2", "--jobs", "2", *more]


def without_the_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_the_clock(v) for k, v in value.items() if k != "timing"}
    return [without_the_clock(v) for v in value] if isinstance(value, list) else value


def results(comparison: Path) -> dict[str, Any]:
    return without_the_clock(json.loads((comparison / "results.json").read_text()))


def steps_done(comparison: Path) -> dict[str, int]:
    """The step of the last line of each run's metrics."""
    return {run: last_line(comparison / "runs" / run).get("step", 0) for run in RUNS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a comparison that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    output = finish(start(*command(directory), cwd=directory))
    assert f"4 runs of {STEPS} steps, 2 at a time" in output
    assert "\x1b" not in output, "no colours or cursor movements where there is no terminal"
    return directory / "comparisons" / "recipe"


def test_a_killed_comparison_goes_on_and_ends_as_one_that_was_not(tmp_path: Path, whole: Path) -> None:
    killed = tmp_path
    comparison = killed / "comparisons" / "recipe"

    def first_run_saved() -> bool:
        # This run alone: on a busy machine the one beside it may be many steps behind, and this one over by then.
        return steps_done(comparison)[RUNS[0]] >= 4

    assert kill_when(start(*command(killed), cwd=killed), first_run_saved)
    assert not (comparison / "results.json").exists()

    # Taken up, and stopped by Ctrl-C once the first seed is done.
    process = start(*command(killed), cwd=killed)
    deadline = time.monotonic() + PATIENCE
    first = comparison / "runs" / RUNS[0] / "summary.json"
    while not (first.exists() and max(steps_done(comparison)[run] for run in RUNS[2:]) >= 2):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert f"{RUNS[0]}: resumed from step" in output, "what the kill left behind was saved, and taken up"
    assert "next: sapo compare comparisons/recipe" in output
    assert "Traceback" not in output
    done = first.stat().st_mtime_ns
    assert "not ended, and in no figure: " in (comparison / "table.md").read_text()

    output = finish(start("compare", "comparisons/recipe", "--jobs", "2", cwd=killed))
    assert "already there" in output
    assert first.stat().st_mtime_ns == done, "a run that has ended is kept"
    for run in RUNS:
        assert fingerprint(comparison / "runs" / run, STEPS) == fingerprint(whole / "runs" / run, STEPS)
    assert results(comparison) == results(whole)
    one, other = (fingerprint(comparison / "runs" / run, STEPS)["model.safetensors"] for run in RUNS[:2])
    assert one != other, "the arms are not one and the same"


def test_arms_of_a_seed_share_their_prompts_and_the_start(whole: Path) -> None:
    # The first rollout of a run depends on prompts, draws and starting weights alone.
    first = {}
    for run in RUNS:
        lines = (whole / "runs" / run / "rollouts" / "step-000001.jsonl").read_text().splitlines()
        first[run] = [(r["prompt"], r["text"], r["logprobs"]) for r in map(json.loads, lines)]
    assert first[RUNS[0]] == first[RUNS[1]]
    assert first[RUNS[2]] == first[RUNS[3]]
    assert first[RUNS[0]] != first[RUNS[2]]


def test_a_run_that_breaks_is_a_result_and_is_not_tried_again(tmp_path: Path) -> None:
    arguments = command(tmp_path, "train.steps=3", "train.warmup_steps=0", "--objectives", "grpo", "--seeds", "0,")
    arguments += ["--learning-rates", "1e-3,1e30"]
    output = finish(start(*arguments, cwd=tmp_path))
    assert "grpo-lr1e30-seed0: failed: step " in output
    comparison = tmp_path / "comparisons" / "recipe"
    healthy, broken = results(comparison)["runs"]
    assert (healthy["state"], broken["state"]) == ("finished", "failed")
    assert broken["tasks"]["prompts"]["collapsed"]
    assert "finite" in broken["reason"]
    again = finish(start(*arguments, cwd=tmp_path))
    assert "all 2 runs have ended: nothing is run" in again, "what broke is not tried again"
    assert results(comparison)["runs"] == [healthy, broken]


def test_the_results_of_a_comparison_that_is_over_are_counted_again_without_its_data(
    tmp_path: Path, whole: Path
) -> None:
    copy = tmp_path / whole.name
    shutil.copytree(whole, copy)
    (copy / "results.json").write_text("{}")
    (copy / "table.md").unlink()
    written = (copy / "comparison.yaml").read_text()
    (copy / "comparison.yaml").write_text(written.replace("prompts.jsonl", "gone.jsonl"))
    assert "nothing is run" in finish(start("compare", str(copy), cwd=tmp_path))
    assert results(copy) == results(whole)
    assert (copy / "table.md").read_text() == (whole / "table.md").read_text()


def test_a_comparison_grown_by_a_seed_keeps_what_has_ended_and_equals_that_of_all(tmp_path: Path, whole: Path) -> None:
    small = [*command(tmp_path), "--seeds", "0,"]
    assert f"2 runs of {STEPS} steps" in finish(start(*small, cwd=tmp_path))
    comparison = tmp_path / "comparisons" / "recipe"
    ended = {run: (comparison / "runs" / run / "summary.json").stat().st_mtime_ns for run in RUNS[:2]}
    output = finish(start("compare", "comparisons/recipe", "--seeds", "2", "--jobs", "2", cwd=tmp_path))
    assert "4 runs of 12 steps, 2 at a time, 2 of them already there" in output
    assert ended == {run: (comparison / "runs" / run / "summary.json").stat().st_mtime_ns for run in ended}
    assert results(comparison) == results(whole)


def test_a_run_that_stops_for_a_collapse_counts_as_collapsed_and_warned(tmp_path: Path) -> None:
    # Any gradient above the median so far is called a collapse.
    rule = ["warnings.on_collapse=stop", "warnings.collapse_causes=[gradient_spike]", "warnings.gradient_spike=1.0001"]
    rule += ["warnings.gradient_updates=5", "checkpoint.every=1"]
    arguments = command(tmp_path, *rule, "--objectives", "sapo", "--seeds", "0,", "--jobs", "1")
    output = finish(start(*arguments, cwd=tmp_path))
    assert "sapo-lr1e-3-seed0: failed: step " in output
    assert output.splitlines()[-1] == "next: sapo report comparisons/recipe"
    found = results(tmp_path / "comparisons" / "recipe")
    [run] = found["runs"]
    assert (run["state"], run["tasks"]["prompts"]["final"]) == ("failed", None)
    assert "gradient_spike" in run["reason"]
    counted = {"collapsed": 1, "detected": 1, "in_time": 1, "healthy": 0, "false_alarms": 0}
    assert found["warnings"]["prompts"].items() >= counted.items()
    [collapse] = found["warnings"]["prompts"]["collapses"]
    assert (collapse["cause"], collapse["visible"], collapse["lead"]) == ("gradient_spike", run["steps"], 0)
    assert "nothing is run" in finish(start(*arguments, cwd=tmp_path)), "it is not tried again"


def test_a_run_that_is_refused_stops_the_comparison_in_one_line(tmp_path: Path) -> None:
    # No room is left for the prompt.
    arguments = command(tmp_path, "train.steps=2", "rollout.max_new_tokens=64", "--jobs", "1")
    output = finish(start(*arguments, cwd=tmp_path), code=2)
    assert output.splitlines()[-1].startswith("sapo: sapo-lr1e-3-seed0: rollout.max_new_tokens must leave room")
    assert "Traceback" not in output


FAILS_AT_TIMES = """
from sapo.data import Score


def share_of_sevens(completion, answer):
    if completion.startswith("7"):
        raise RuntimeError("no sevens")
    return Score(completion.count("7") / 8, figures={"length": len(completion)} if "1" in completion else {})
"""


def test_runs_whose_verifier_fails_at_times_are_compared_and_reported(tmp_path: Path) -> None:
    arguments = command(tmp_path, "train.steps=4", "eval.every=1", "--jobs", "2", "--seeds", "2")
    (tmp_path / "rewards_of_a_test.py").write_text(FAILS_AT_TIMES)
    output = finish(start(*arguments, cwd=tmp_path))
    assert "predict no collapse: " in output, output
    found = results(tmp_path / "comparisons" / "recipe")
    failed = [run["set_up_warnings"].get("verifier_failed", 0) for run in found["runs"]]
    assert any(failed), "no verifier failed, so nothing was shown"
    assert found["warnings"]["prompts"]["set_up"]["verifier_failed"] == sum(map(bool, failed))
    finish(start("report", "comparisons/recipe", cwd=tmp_path))
    assert "verifier_failed" in (tmp_path / "report.html").read_text()


def test_a_verifier_that_fails_on_all_of_a_step_stops_the_comparison_in_one_line(tmp_path: Path) -> None:
    arguments = command(tmp_path, "train.steps=2", "--jobs", "1")
    (tmp_path / "rewards_of_a_test.py").write_text(
        "def share_of_sevens(completion, answer):\n    assert completion == answer, 'not the answer'\n    return 1\n"
    )
    output = finish(start(*arguments, cwd=tmp_path), code=2)
    assert "sapo: sapo-lr1e-3-seed0: step 1: the verifier failed on 64 of 64 completions" in output, output
    assert "Traceback" not in output


def test_a_process_that_is_killed_from_outside_is_named_and_its_run_goes_on(tmp_path: Path) -> None:
    process = start(*command(tmp_path, "--jobs", "1"), cwd=tmp_path)
    comparison = tmp_path / "comparisons" / "recipe"
    deadline = time.monotonic() + PATIENCE
    while steps_done(comparison)[RUNS[0]] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    output = finish(process, code=1)
    assert f"sapo: the process of {RUNS[0]} was killed by signal 9" in output
    assert "Traceback" not in output
