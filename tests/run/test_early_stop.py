"""train.stop_when ends a run at an evaluation, with checkpoint and summary; a resume without it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapo.config.recipes import load_recipe, resolve_recipe
from sapo.errors import ConfigError
from sapo.run.directory import RunDirectory
from sapo.run.early_stop import note_judged
from sapo.run.state import RunState
from sapo.workflows.comparing.config import comparison_of
from sapo.workflows.train import resume, train
from support.runs import metrics, write_recipe


def test_a_run_ends_where_its_figure_has_reached_the_target_and_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the reward function is
    # Rewards are shares, never below 0: the first evaluation has reached 0, that of the untrained model.
    rule = {"metric": "reward/mean", "reaches": 0.0}
    recipe = write_recipe(tmp_path, train__stop_when=rule, train__steps=2, eval__every=1)
    run = train(load_recipe(recipe))
    assert run.stopped is None
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["steps"] == 0
    assert summary["ended_early"].startswith("reward/mean 0.")
    assert (run.directory / "checkpoints" / "step-000000").is_dir()
    assert resume(run.directory).summary["steps"] == 0, "the same rule ends it again"
    done = resume(run.directory, ["train.stop_when=null"])
    assert done.summary["steps"] == 2
    assert "ended_early" not in done.summary
    assert RunDirectory.read_config(run.directory).train.stop_when is None


def test_a_rule_of_another_figure_does_not_look_at_those_of_the_rule_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A completion has 12 tokens at most, and a reward is 1 at most: by its own figures the second rule, with a
    # reward that no run reaches, never ends the run, and by lengths of 1 or more it ends it at once.
    rule = {"metric": "length/mean", "reaches": 0.0}
    run = train(load_recipe(write_recipe(tmp_path, train__stop_when=rule, train__steps=2, eval__every=1))).directory
    (before,) = (r for r in metrics(run) if r["kind"] == "eval")
    assert before["length/mean"] >= 1
    done = resume(run, ["train.stop_when={metric: reward/mean, reaches: 1.0001}"])
    assert done.summary["steps"] == 2
    assert "ended_early" not in done.summary


def test_evaluations_without_a_rule_are_no_part_of_a_row_of_evaluations() -> None:
    settings = load_recipe("quickstart", ["train.stop_when={patience: 2}"])
    without = load_recipe("quickstart")
    state = RunState()
    for config, figure in ((settings, 0.4), (without, 0.3), (settings, 0.2), (settings, 0.1)):
        note_judged(config, state, {"pass@1": figure})
    assert (state.judged, state.judged_metric) == ([0.2, 0.1], "pass@1")
    assert RunState.deserialise(*state.serialise()) == state


def test_an_evaluation_that_could_not_be_judged_is_passed_over_by_the_rule() -> None:
    config, state = load_recipe("quickstart", ["train.stop_when={patience: 2}"]), RunState()
    for figures in ({"pass@1": 0.4}, {"status/environment_error": 8}, {"pass@1": 0.3}):
        note_judged(config, state, figures, some_failed="pass@1" not in figures)
    assert (state.judged, state.judged_metric) == ([0.4, 0.3], "pass@1")


def test_a_figure_that_evaluations_have_not_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, train__stop_when={"metric": "reward/maen", "patience": 1}, train__steps=1)
    with pytest.raises(ConfigError, match=r"metric must be a figure of the evaluations: .*'reward/maen'; did you mean"):
        train(load_recipe(recipe))


def test_a_rule_without_a_bound_and_one_of_a_comparison_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop_when needs reaches or patience; got neither"):
        load_recipe("quickstart", ["train.stop_when={metric: pass@1}"])
    settings = load_recipe("quickstart", ["train.stop_when={patience: 2}"]).model_dump(mode="json", exclude={"run_dir"})
    assert resolve_recipe(settings, [], "x").train.stop_when.metric == "pass@1"
    with pytest.raises(ConfigError, match=r"one budget of steps; got train.stop_when"):
        comparison_of("x", settings, seeds=1)
    with pytest.raises(ConfigError, match=r"train.stop_when .* needs eval.every above 0; got eval.every=0") as caught:
        load_recipe("quickstart", ["train.stop_when={patience: 2}", "eval.every=0"])
    assert "\n" not in str(caught.value)
