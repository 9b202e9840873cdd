"""Every setting of a recipe reaches the part that it is a setting of."""

from __future__ import annotations

from pathlib import Path

import pytest

import sapo
from sapo.config import RunConfig
from sapo.errors import TaskError
from sapo.model.loading import load_policy
from sapo.run.directory import RunDirectory
from sapo.run.loop import TrainingRun
from sapo.run.preflight import load_tasks
from support.runs import metrics, write_recipe


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(*overrides: str) -> tuple[TrainingRun, RunConfig]:
        config = sapo.load_recipe(write_recipe(tmp_path), list(overrides))
        policy = load_policy(config.model.path, config.model.dtype)
        return TrainingRun(config, RunDirectory.create(config), policy, load_tasks(config)), config

    return make


def test_the_objective_and_its_hyperparameters_reach_the_trainer(build) -> None:
    run, _ = build("objective={name: sapo, tau_pos: 3.0, tau_neg: 4.0, gate: erf, side: drift, normalizer: token_mean}")
    objective = run.trainer.settings.objective
    assert (objective.tau_pos, objective.tau_neg, objective.gate, objective.side) == (3.0, 4.0, "erf", "drift")
    assert run.packer.normalizer == "token_mean"


def test_sampling_settings_reach_the_engine_and_the_loss(build) -> None:
    run, _ = build(
        "rollout={max_new_tokens: 7, temperature: 0.6, top_p: 0.9, top_k: 5, min_p: 0.01, stop_token_ids: [3], "
        "prompts_per_step: 4, samples_per_prompt: 4, max_rows: 9}"
    )
    params = run.collector.params
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (
        (7, 0.6, 0.9, 5, 0.01)
    )
    assert params.stop_token_ids == {3} | run.policy.stop_token_ids
    assert run.trainer.settings.temperature == 0.6
    assert run.packer.max_new_tokens == 7
    assert run.engine.max_rows == 9
    assert run.collector.engine is run.held_out.engine is run.engine


def test_optimizer_settings_reach_the_optimizer(build) -> None:
    run, _ = build(
        "train={steps: 3, minibatches: 2, betas: [0.7, 0.8], adam_eps: 1e-5, weight_decay: 0.3, grad_clip: 0.25, "
        "tokens_per_microbatch: 77, entropy: false}"
    )
    defaults = run.trainer.optimizer.inner.defaults
    assert (defaults["betas"], defaults["eps"], defaults["weight_decay"]) == ((0.7, 0.8), 1e-5, 0.3)
    assert run.trainer.optimizer.grad_clip == 0.25
    assert run.packer.tokens_per_microbatch == 77
    assert run.trainer.settings.entropy is False


def test_the_learning_rates_of_a_run_are_those_of_its_schedule(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ["train.schedule=linear", "train.min_learning_rate=1e-4", "train.warmup_steps=2"]
    run = sapo.train(sapo.load_recipe(write_recipe(tmp_path), settings)).directory
    rates = [m["learning_rate"] for m in metrics(run) if m["kind"] == "update"]
    # by hand: two steps up to 1e-3, then from 1e-3 towards 1e-4 in quarters; both updates of a step share its rate
    steps = [5e-4, 1e-3, 1e-3, 1e-4 + 9e-4 * 0.75, 1e-4 + 9e-4 * 0.5, 1e-4 + 9e-4 * 0.25]
    assert rates == pytest.approx([rate for rate in steps for _ in range(2)])


def test_the_advantage_setting_reaches_the_groups(build) -> None:
    run, _ = build("objective.advantage=group_mean")
    for group in run.rollout().groups:
        mean = sum(group.rewards) / len(group.rewards)
        assert group.advantages == pytest.approx([r - mean for r in group.rewards])


def test_a_prompt_met_again_draws_anew_and_another_seed_asks_another_order(build, tmp_path: Path) -> None:
    run, _ = build()
    first, second = (run.collector.selector.first_prompts(step, run.state.position) for step in (0, 1))
    assert not {p.id for p in first} & {p.id for p in second}
    other = load_tasks(sapo.load_recipe(tmp_path / "recipe.yaml", ["seed=1"]))
    assert [other.train[0].train_prompt(i).text for i in range(8)] != [
        run.tasks.train[0].train_prompt(i).text for i in range(8)
    ]
    assert [p.text for p in other.held_out[0].held_out(9)] == [p.text for p in run.tasks.held_out[0].held_out(9)]


def test_a_cut_distribution_is_recomputed_even_where_the_first_step_cannot_tell(build) -> None:
    run, _ = build("rollout.min_p=1e-9")
    run.rollout()
    assert run.state.old_logprobs == "trainer"


def test_a_mistake_in_the_last_row_of_a_file_is_found_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    from sapo.errors import ModelError

    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "what?", "answer": "1"}\n')
    with pytest.raises(ModelError, match="cannot encode the prompt 'what"):
        sapo.train(sapo.load_recipe(recipe))
    assert not (tmp_path / "run").exists()


def test_training_on_a_benchmark_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    config = sapo.load_recipe(write_recipe(tmp_path), ["tasks.0.held_out_fraction=1"])
    with pytest.raises(TaskError, match="prompts: all 24 rows are held out for evaluation"):
        sapo.train(config)
    assert not (tmp_path / "run").exists()


def test_greedy_and_the_best_constant_answer_are_judged_when_asked_for(build) -> None:
    run, _ = build("eval.greedy=true", "eval.constant=true", "train.steps=1", "tasks.0.verifier=last_number")
    run.run()
    first, last = [m for m in metrics(run.directory.path) if m["kind"] == "eval"]
    # Every answer of the tests' file is 7, so that the constant 7 is always right, whatever the model has learned.
    assert first["constant"] == last["constant"] == 1.0
    assert 0.0 <= first["greedy"] <= 1.0
    plain, _ = build("train.steps=1", f"run_dir={run.directory.path}-plain")
    plain.run()
    assert "constant" not in metrics(plain.directory.path)[0]
    assert "greedy" not in metrics(plain.directory.path)[0]
