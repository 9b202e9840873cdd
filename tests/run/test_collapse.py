"""Runs that do collapse: what they say, where they stop, how they go back, all to the bit when interrupted.

The untrained model of these tests learns at a learning rate of 0.02. It is 0.001 here for three steps and then 0.3: the
fourth step's updates ruin the policy, and from the fifth on every completion is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sapo
import sapo.run.loop
from sapo.config.diagnostics import WarningsConfig
from sapo.diagnostics import replay_warnings
from sapo.errors import CollapseError, NonFiniteError
from sapo.model.loading import load_policy
from sapo.report import make_report
from sapo.run.collapse import restore
from sapo.training.checkpoint import list_checkpoints
from sapo.training.optimizer_files import OptimizerFiles
from sapo.training.trainer import Trainer
from sapo.workflows.train import resume
from support.kernels import fresh_cache
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_recipe
from support.trainer_cases import make_trainer

STEPS = 10
COLLAPSING = {
    "train__steps": STEPS,
    "train__learning_rate": 0.3,
    "train__warmup_steps": 0,
    "eval__every": 5,
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
}
# After three steps weights of 1e30, which no forward pass survives; going back, a learning rate of 0.01.
BREAKING = {**COLLAPSING, "train__learning_rate": 1e30}
BREAKING["warnings"] = {"on_collapse": "rollback", "rollback_learning_rate": 1e-32}
ROLLBACK = {**COLLAPSING, "warnings": {"on_collapse": "rollback", "rollback_learning_rate": 0.04}}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))
    monkeypatch.setattr(
        sapo.run.loop, "learning_rate_at", lambda step, peak, **_: min(peak, 0.001) if step < 3 else peak
    )


def run_recipe(directory: Path, should_stop=lambda: False, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    return sapo.train(sapo.load_recipe(write_recipe(directory, **changes)), should_stop=should_stop).directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_recipe, tmp_path_factory)


def warnings_of(run: Path) -> list[dict]:
    return [m for m in metrics(run) if m["kind"] == "warning"]


def test_a_collapse_is_named_and_the_checkpoint_before_it_outlives_pruning(whole: Callable[..., Path]) -> None:
    run = whole(**COLLAPSING)
    flood = next(w for w in warnings_of(run) if w["cause"] == "zero_variance_flood")
    # No completion of steps 5, 6 and 7 is right: three steps on end.
    assert (flood["step"], flood["value"], flood["collapse"]) == (7, 1.0, True)
    tail = warnings_of(run)[0]
    assert (tail["step"], tail["cause"], tail["collapse"]) == (4, "ratio_tail", False), "the early warning"
    # keep is 1. The ratios of step 4 ran away, so step 3 was the last in which no rule was broken: it proved step 2's.
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [STEPS, 2]


def test_a_run_that_learns_is_not_warned(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, **{**COLLAPSING, "train__learning_rate": 0.02})
    rewards = [m["reward/mean"] for m in metrics(run) if m["kind"] == "step"]
    assert rewards[-1] > 5 * rewards[0]
    assert warnings_of(run) == []
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [STEPS, STEPS - 1], "the newest, and the proven"


def test_the_warnings_of_a_run_are_found_again_in_its_metrics(whole: Callable[..., Path]) -> None:
    run = whole(**COLLAPSING)
    records = metrics(run)
    assert [w.to_json() for w in replay_warnings(records)] == warnings_of(run)
    sooner = replay_warnings(records, WarningsConfig(patience=1))
    assert next(w.step for w in sooner if w.cause == "zero_variance_flood") == 5


def test_stop_ends_the_run_at_its_last_healthy_checkpoint(tmp_path: Path) -> None:
    rule = r"step 7: zero_variance_flood: .*goes on from the last healthy .*, step 2"
    with pytest.raises(CollapseError, match=rule) as raised:
        run_recipe(tmp_path, **COLLAPSING, warnings={"on_collapse": "stop"})
    run = tmp_path / "run"
    assert json.loads((run / "failure.json").read_text()) == {"reason": str(raised.value)}
    assert make_report([run], tokens=0).finished, "a watched page of it waits for nothing more"
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [2]
    assert (run / "checkpoints" / "collapsed-step-000006").is_dir()
    resume(run, ["train.learning_rate=0.02"])
    assert not (run / "failure.json").exists()
    steps = [m["step"] for m in metrics(run) if m["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert warnings_of(run) == []


def test_a_collapse_without_a_healthy_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="no healthy checkpoint yet: start again with a lower"):
        run_recipe(tmp_path, **{**COLLAPSING, "checkpoint__every": 0}, warnings={"on_collapse": "stop"})


@pytest.mark.parametrize("asked", [1, 4, 12])
def test_a_stop_before_the_first_update_leaves_no_healthy_checkpoint(tmp_path: Path, asked: int) -> None:
    settings = {**COLLAPSING, "checkpoint__every": 0, "warnings": {"on_collapse": "stop"}}
    count = iter(range(100_000))
    stopped = run_recipe(tmp_path, should_stop=lambda: next(count) >= asked, **settings)
    assert [(c.step, c.update) for c in list_checkpoints(stopped / "checkpoints")] == [(0, 0)]
    with pytest.raises(CollapseError, match="no healthy checkpoint yet: start again with a lower"):
        resume(stopped)


@pytest.mark.parametrize("asked", [1, 4, 12])
def test_a_stop_before_the_first_update_leaves_a_rollback_as_it_would_have_been(
    tmp_path: Path, whole: Callable[..., Path], asked: int
) -> None:
    settings = {**ROLLBACK, "checkpoint__every": 0}
    expected = whole(**settings)
    count = iter(range(100_000))
    stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: next(count) >= asked, **settings)
    assert not (stopped / "summary.json").exists(), "the run ended before it could be stopped"
    resume(stopped)
    assert fingerprint(stopped, STEPS) == fingerprint(expected, STEPS)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (expected, stopped)]
    assert summaries[0]["rollbacks"] == 1
    assert summaries[0]["tokens"] == summaries[1]["tokens"]


def test_a_rollback_scales_the_learning_rate_and_the_run_learns_after_all(whole: Callable[..., Path]) -> None:
    run = whole(**ROLLBACK)
    records = metrics(run)
    backs = [m for m in records if m["kind"] == "rollback"]
    assert [(m["step"], m["to"], m["learning_rate_scale"]) for m in backs] == [(7, 2, 0.04)]
    steps = [m for m in records if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1)), "each step once: what was taken back is elsewhere"
    rates = {m["step"]: m["learning_rate"] for m in records if m["kind"] == "update"}
    assert rates[STEPS] == pytest.approx(0.04 * 0.3)
    assert steps[-1]["reward/mean"] > 2 * steps[2]["reward/mean"]
    taken_back = [json.loads(line) for line in (run / "rolled-back" / "metrics-1.jsonl").read_text().splitlines()]
    assert {m["step"] for m in taken_back if m["kind"] == "step"} == {3, 4, 5, 6, 7}
    spent = sum(m["tokens/generated"] for m in [*steps, *taken_back] if m["kind"] == "step")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"]["generated"] == spent, "nothing spent is hidden"
    assert summary["rollbacks"] == 1


@pytest.mark.parametrize("asked", [20, 75, 110, 150])
def test_a_rolled_back_run_stopped_anywhere_goes_on_bit_for_bit(
    tmp_path: Path, whole: Callable[..., Path], asked: int
) -> None:
    count = iter(range(100_000))
    stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: next(count) >= asked, **ROLLBACK)
    assert not (stopped / "summary.json").exists(), "the run ended before it could be stopped"
    resume(stopped)
    assert fingerprint(stopped, STEPS) == fingerprint(whole(**ROLLBACK), STEPS)


@pytest.mark.parametrize("cut", ["take_back", "append_metrics", "checkpoint"])
def test_a_kill_in_the_middle_of_going_back_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[..., Path], cut: str
) -> None:
    from sapo.run.directory import RunDirectory
    from sapo.run.loop import TrainingRun

    expected = fingerprint(whole(**ROLLBACK), STEPS)
    owner = TrainingRun if cut == "checkpoint" else RunDirectory
    original = getattr(owner, cut)

    def killed(self, *args):
        going_back = (tmp_path / "cut" / "run" / "checkpoints" / "collapsed-step-000006").exists()
        if going_back:
            raise RuntimeError("power cut")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, cut, killed)
        with pytest.raises(RuntimeError, match="power cut"):
            run_recipe(tmp_path / "cut", **ROLLBACK)
    monkeypatch.syspath_prepend(str(tmp_path))
    resume(tmp_path / "cut" / "run")
    assert fingerprint(tmp_path / "cut" / "run", STEPS) == expected


def test_completions_of_undone_steps_leave_the_rollouts_with_their_metrics(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, **ROLLBACK, log__rollouts_every=3)
    # Steps 1, 3, 6 and 9 are logged. From step 7 it went back to step 2, and logged 3 and 6 again.
    names = sorted(f.name for f in (run / "rollouts").iterdir())
    assert names == [f"step-{step:06d}.jsonl" for step in (1, 3, 6, 9)]
    undone = run / "rolled-back" / "rollouts-1"
    assert sorted(f.name for f in undone.iterdir()) == ["step-000003.jsonl", "step-000006.jsonl"]
    rewards = {m["step"]: m["reward/mean"] for m in metrics(run) if m["kind"] == "step"}
    for step in (3, 6):
        of_run, of_undone = (
            [json.loads(line)["reward"] for line in (place / f"step-{step:06d}.jsonl").open()]
            for place in (run / "rollouts", undone)
        )
        assert sum(of_run) / len(of_run) == pytest.approx(rewards[step])
        assert (of_undone == of_run) == (step == 3), "the weights of step 3 were the same"


def test_completions_after_the_checkpoint_of_a_resume_are_no_longer_the_runs(tmp_path: Path) -> None:
    with pytest.raises(CollapseError):
        run_recipe(tmp_path, **COLLAPSING, warnings={"on_collapse": "stop"}, log__rollouts_every=1)
    run = tmp_path / "run"
    assert len(list((run / "rollouts").iterdir())) == 7
    resume(run, ["train.steps=3", "train.learning_rate=0.02"])
    assert sorted(f.name for f in (run / "rollouts").iterdir()) == [f"step-00000{step}.jsonl" for step in (1, 2, 3)]


def test_an_update_that_is_not_finite_is_gone_back_from_as_a_collapse_is(whole: Callable[..., Path]) -> None:
    run = whole(**BREAKING)
    [warning] = [w for w in warnings_of(run) if w["cause"] == "non_finite"]
    assert (warning["step"], warning["collapse"]) == (4, True)
    assert "not finite" in warning["text"]
    assert "value" not in warning, "it is no figure"
    [back] = [m for m in metrics(run) if m["kind"] == "rollback"]
    assert (back["step"], back["to"], back["cause"]) == (4, 2, "non_finite"), "step 3 was not proven by the one after"
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["reward/mean"] > 2 * steps[2]["reward/mean"], "it learns after all"
    taken_back = [json.loads(line) for line in (run / "rolled-back" / "metrics-1.jsonl").open()]
    assert [(m["step"], m["update"]) for m in taken_back if m["kind"] == "update"] == [(3, 0), (3, 1), (4, 0)]


@pytest.mark.parametrize("asked", [30, 42, 70])
def test_a_run_gone_back_from_what_is_not_finite_goes_on_bit_for_bit(
    tmp_path: Path, whole: Callable[..., Path], asked: int
) -> None:
    count = iter(range(100_000))
    stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: next(count) >= asked, **BREAKING)
    assert not (stopped / "summary.json").exists(), "the run ended before it could be stopped"
    resume(stopped)
    assert fingerprint(stopped, STEPS) == fingerprint(whole(**BREAKING), STEPS)


def test_weights_that_are_infinite_are_found_by_their_first_completions(tmp_path: Path) -> None:
    # One update a step, so that no further one meets the weights, and a batch of zero-variance groups would hide them.
    settings = {**BREAKING, "train__minibatches": 1, "train__learning_rate": 1e39}
    settings["warnings"] = {"on_collapse": "rollback", "rollback_learning_rate": 1e-41}
    run = run_recipe(tmp_path, **settings)
    [warning] = [w for w in warnings_of(run) if w["cause"] == "non_finite"]
    assert (warning["step"], "log-probability of the sampler is not finite" in warning["text"]) == (5, True)


def test_what_stays_not_finite_stops_the_run_with_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    settings = {"on_collapse": "rollback", "rollback_learning_rate": 1.0, "max_rollbacks": 1}
    with pytest.raises(
        CollapseError, match=r"step 4: non_finite: update 1: .* not finite .*; stopped after 1 rollbacks"
    ):
        run_recipe(tmp_path, **{**BREAKING, "warnings": settings})
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        1,
        0,
    ], "further back the second time"


def test_stop_sets_the_checkpoint_of_ruined_weights_aside_too(tmp_path: Path) -> None:
    # Step 3's has the weights of 1e30 that step 4 cannot use: going on from there would end there again.
    with pytest.raises(CollapseError, match=r"step 4: non_finite: .*goes on from the last healthy .*, step 2"):
        run_recipe(tmp_path, **{**BREAKING, "warnings": {"on_collapse": "stop"}})
    run = tmp_path / "run"
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [2]
    assert (run / "checkpoints" / "collapsed-step-000003").is_dir()
    resume(run, ["train.learning_rate=0.01"])
    assert [m["step"] for m in metrics(run) if m["kind"] == "step"] == list(range(1, STEPS + 1))


def test_what_is_not_finite_before_any_update_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(self, *args, **kwargs):
        raise NonFiniteError("the gradient of lm_head is not finite")

    monkeypatch.setattr(Trainer, "update", ruined)
    with pytest.raises(NonFiniteError, match=r"step 1, update 0: the gradient .*; no update was made yet"):
        run_recipe(tmp_path, **BREAKING)
    assert not (tmp_path / "run" / "rolled-back").exists(), "a lower learning rate would end the same way"


def test_a_run_that_collapses_again_goes_further_back_and_then_stops(tmp_path: Path) -> None:
    settings = {"on_collapse": "rollback", "rollback_learning_rate": 1.0, "max_rollbacks": 2}
    with pytest.raises(CollapseError, match="stopped after 2 rollbacks"):
        run_recipe(tmp_path, **COLLAPSING, warnings=settings)
    lines = [json.loads(line) for f in (tmp_path / "run" / "rolled-back").glob("*.jsonl") for line in f.open()]
    backs = [m for m in [*lines, *metrics(tmp_path / "run")] if m["kind"] == "rollback"]
    # With the same learning rate the same collapse: from step 2, then from step 1.
    assert sorted((m["rollbacks"], m["to"]) for m in backs) == [(1, 2), (2, 1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_back_leaves_what_the_checkpoint_holds_and_nothing_else(tmp_path: Path, dtype: str) -> None:
    """As a process that resumes from it would have: weights, moments, masters; of a run's start no moments at all."""
    changes = {**COLLAPSING, "train__steps": 2, "checkpoint__keep": 3, "warnings": {"on_collapse": "rollback"}}
    run = run_recipe(tmp_path, **changes, model__dtype=dtype)
    config = sapo.load_recipe(run / "config.yaml")
    newest, _, start = list_checkpoints(run / "checkpoints")
    policy = load_policy(newest.path, dtype)
    trainer = make_trainer(policy)
    trainer.restore_optimizer(newest.path)
    assert trainer.optimizer.inner.state
    state = restore(start, config.model_copy(update={"device": "cpu"}), policy, trainer)
    assert state.step == 0
    kept = load_policy(start.path, dtype).model.named_parameters()
    assert all(torch.equal(p, dict(policy.model.named_parameters())[name]) for name, p in kept)
    tensors, expected = trainer.optimizer.state_tensors(), OptimizerFiles(start.path).read({})
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not any(name.startswith("exp_avg") for name in tensors)
