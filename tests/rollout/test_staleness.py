"""A sampler that is not the trainer, in precision or in age: what a run makes of it, and that it resumes to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sapo
from sapo.config import ExperimentsConfig
from sapo.config.recipes import parse_recipe
from sapo.errors import ConfigError
from sapo.model.loading import load_policy
from sapo.model.rounding import Rounding
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.staleness import Staleness
from sapo.run.directory import RunDirectory
from sapo.run.loop import TrainingRun
from sapo.run.preflight import load_tasks
from sapo.workflows.train import resume
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_recipe

E4M3 = {"experiments__sampler_dtype": "float8_e4m3fn", "experiments__sampler_scaling": "none"}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def run_recipe(directory: Path, should_stop=lambda: False, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    return sapo.train(sapo.load_recipe(write_recipe(directory, **changes)), should_stop=should_stop).directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_recipe, tmp_path_factory)


def of_kind(run: Path, kind: str) -> list[dict]:
    return [m for m in metrics(run) if m["kind"] == kind]


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4])
@pytest.mark.parametrize("age", range(10))
def test_every_batch_is_as_old_as_asked_once_the_run_is_old_enough(age: int, minibatches: int) -> None:
    staleness = Staleness(age, minibatches)
    sampled_after: list[int] = []  # updates made before each batch was sampled
    for step in range(8):
        for update in range(minibatches):
            due = staleness.num_due(step, update)
            sampled_after += [step * minibatches + update] * (due - len(sampled_after))
            assert len(sampled_after) > step, "the step's own batch is there"
    for step in range(8):
        assert step * minibatches - sampled_after[step] == min(age, step * minibatches)


def test_batches_are_sampled_by_the_weights_of_their_time_in_the_order_of_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, rollout__staleness=3, eval__every=0, checkpoint__every=0))
    policy = load_policy(config.model.path)
    run = TrainingRun(config, RunDirectory.create(config), policy, load_tasks(config))
    drawn: list[tuple[int, set[int]]] = []
    generate = LocalEngine.generate

    def spy(self, requests, params, *args):
        drawn.append((run.trainer.updates, {r.prompt.id >> 32 for r in requests}))
        return generate(self, requests, params, *args)

    monkeypatch.setattr(run.engine, "generate", spy.__get__(run.engine))
    for _ in range(4):
        run.step()
    # by hand: 2 updates a step, so batch s is drawn after 2 s - 3 updates, the first two at once; the queue is 2 long
    assert drawn == [(0, {0}), (0, {1}), (1, {2}), (3, {3}), (5, {4}), (7, {5})]
    ages = [m.get("rollout/age") for m in of_kind(config_run(config), "step")]
    assert ages == [None, 2, 3, 3]
    assert len(run.state.ahead) == 2


def config_run(config: sapo.RunConfig) -> Path:
    assert config.run_dir is not None
    return Path(config.run_dir)


@pytest.mark.parametrize("source", ["engine", "trainer"])
def test_log_pi_old_of_a_stale_batch_is_of_the_weights_that_sampled_it(tmp_path: Path, source: str) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, rollout__staleness=2, train__old_logprobs=source))
    policy = load_policy(config.model.path)
    run = TrainingRun(config, RunDirectory.create(config), policy, load_tasks(config))
    run.step()  # batch 1 was sampled before its updates, and waits
    groups = [g for g in run.state.ahead[0].groups if not g.zero_variance]
    kept = [[c.old_logprobs if source == "trainer" else c.logprobs for c in g.completions] for g in groups]
    as_sampled = TrainingRun(config, run.directory, load_policy(config.model.path), load_tasks(config))
    assert furthest(kept, as_sampled.logprobs.compute(groups)) < 1e-5
    assert furthest(kept, run.logprobs.compute(groups)) > 1e-3, "two updates have moved the policy since"


def test_log_pi_old_of_the_current_weights_is_taken_when_the_batch_is_trained_on(tmp_path: Path) -> None:
    config = sapo.load_recipe(write_recipe(tmp_path, rollout__staleness=2, experiments__old_logprobs="current"))
    run = TrainingRun(config, RunDirectory.create(config), load_policy(config.model.path), load_tasks(config))
    run.step()
    assert not any(len(c.old_logprobs) for g in run.state.ahead[0].groups for c in g.completions), "not yet"
    drawn = [[c.logprobs for c in g.completions] for g in run.state.ahead[0].groups]
    now = run.logprobs.compute(run.state.ahead[0].groups)
    assert furthest(drawn, now) > 1e-3, "two updates have moved the policy since"
    trained_on = []
    update = run.update
    run.update = lambda groups: (trained_on.append(groups), update(groups))[1]
    run.step()
    # Mini-batches take the groups of a batch in turn: the first of two has groups 0 and 2, the second 1 and 3.
    for groups, places in zip(trained_on, ((0, 2), (1, 3)), strict=True):
        for group, place in zip(groups, places, strict=True):
            if not group.zero_variance:
                assert furthest([[c.old_logprobs for c in group.completions]], [now[place]]) < 1e-5


def test_under_current_weights_no_ratio_tells_of_the_age_and_the_correction_does(tmp_path: Path) -> None:
    """With log pi_old = log pi at the first update, r is 1 there, and w = pi_old / mu is all of the drift before it."""
    stale = {"rollout__staleness": 4, "train__learning_rate": 3e-3, "objective": {"name": "sapo", "tis": {"cap": 5.0}}}
    current = of_kind(run_recipe(tmp_path / "current", **stale, experiments__old_logprobs="current"), "step")
    trainer = of_kind(run_recipe(tmp_path / "trainer", **stale), "step")
    assert {m["old_logprobs"] for m in current} == {"current"}
    assert max(m["first_update/ratio/abs_dev"] for m in current) < 1e-5
    assert max(m["update/mismatch/abs_dev"] for m in current) > 0.01
    assert max(m["first_update/ratio/abs_dev"] for m in trainer) > 0.01
    assert max(m["update/mismatch/abs_dev"] for m in trainer) < 1e-5
    assert current[0]["update/loss"] == pytest.approx(trainer[0]["update/loss"], rel=1e-4), "the first is of no age"


def furthest(left: list, right: list) -> float:
    """Largest difference of two sets of log-probabilities, by group, completion and token."""
    assert left, "nothing would be compared"
    completions = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(x - y) for c, d in completions for x, y in zip(c, d, strict=True))


def test_staleness_changes_what_is_learned_and_not_what_is_asked(tmp_path: Path) -> None:
    fresh = run_recipe(tmp_path / "fresh", log__rollouts_every=1)
    stale = run_recipe(tmp_path / "stale", rollout__staleness=4, log__rollouts_every=1)

    def asked(run: Path) -> list[str]:
        lines = [line for file in sorted((run / "rollouts").iterdir()) for line in file.read_text().splitlines()]
        return [json.loads(line)["prompt"] for line in lines]

    assert asked(fresh) == asked(stale)
    assert of_kind(fresh, "step")[0]["pass@1"] == of_kind(stale, "step")[0]["pass@1"]
    assert of_kind(fresh, "step")[-1] != of_kind(stale, "step")[-1]


def test_a_stale_batch_is_not_called_unfaithful(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, rollout__staleness=4, train__learning_rate=3e-3)
    assert max(m["first_update/ratio/abs_dev"] for m in of_kind(run, "step")) > 0.01
    assert of_kind(run, "warning") == []


def test_completions_are_drawn_from_rounded_weights_and_evaluations_from_the_policys(tmp_path: Path) -> None:
    plain = run_recipe(tmp_path / "plain", train__steps=1)
    config = sapo.load_recipe(write_recipe(tmp_path, train__steps=1, **E4M3))
    policy = load_policy(config.model.path)
    run = TrainingRun(config, RunDirectory.create(config), policy, load_tasks(config))
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    batch = run.rollout()
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters()), "the trainer's are untouched"
    by_hand = load_policy(config.model.path)
    with torch.no_grad():
        for parameter in by_hand.model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(Rounding("float8_e4m3fn", "none").round(parameter))
    rounded = TrainingRun(config, run.directory, by_hand, load_tasks(config)).logprobs.compute(batch.groups)
    own = run.logprobs.compute(batch.groups)
    drawn = [[c.logprobs for c in g.completions] for g in batch.groups]

    assert furthest(drawn, rounded) < 1e-5 < 1e-3 < furthest(drawn, own)
    run.directory.close()
    sapo_run = run_recipe(tmp_path / "rounded", train__steps=1, **E4M3)
    assert of_kind(sapo_run, "eval")[0] == of_kind(plain, "eval")[0]


def test_log_pi_old_is_the_trainers_unless_the_recipe_insists(tmp_path: Path) -> None:
    auto = run_recipe(tmp_path / "auto", **E4M3)
    assert {m["old_logprobs"] for m in of_kind(auto, "step")} == {"trainer"}
    steps = of_kind(auto, "step")
    assert max(m["first_update/ratio/abs_dev"] for m in steps) < 1e-5, "r = 1: the mismatch is no drift"
    assert min(m["update/mismatch/abs_dev"] for m in steps) > 1e-3
    assert of_kind(auto, "warning") == []
    insists = run_recipe(tmp_path / "insists", train__old_logprobs="engine", **E4M3)
    steps = of_kind(insists, "step")
    assert min(m["first_update/ratio/abs_dev"] for m in steps) > 1e-3
    assert not any("update/mismatch/abs_dev" in m for m in steps), "not measured: r holds both"
    assert "log pi_old is the engine's although it is of rounded weights" in of_kind(insists, "warning")[0]["text"]


def test_a_switch_that_is_still_to_come_settles_log_pi_old_from_the_start(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, experiments__sampler_switch={"step": 4, "dtype": "float8_e5m2"})
    assert {m["old_logprobs"] for m in of_kind(run, "step")} == {"trainer"}
    dose = [m["update/mismatch/abs_dev"] for m in of_kind(run, "step")]
    assert max(dose[:3]) < 1e-5 < 1e-3 < min(dose[3:])


def test_the_dtype_of_a_step_is_that_of_before_the_switch_or_after_it() -> None:
    experiments = ExperimentsConfig(sampler_dtype="bfloat16", sampler_switch={"step": 3, "dtype": None})
    assert [experiments.sampler_dtype_at(step) for step in range(4)] == ["bfloat16", "bfloat16", None, None]
    assert not experiments.sampler_is_policy
    assert ExperimentsConfig().sampler_is_policy


def test_the_correction_takes_log_pi_old_from_the_trainer_even_where_the_engine_would_do(tmp_path: Path) -> None:
    plain = run_recipe(tmp_path / "plain", train__old_logprobs="trainer")
    run = run_recipe(tmp_path / "tis", objective={"name": "sapo", "tis": {"cap": 3.0}})
    steps = of_kind(run, "step")
    assert {m["old_logprobs"] for m in steps} == {"trainer"}
    assert all(m["update/tis/mean"] == pytest.approx(1.0, abs=1e-5) for m in steps)
    assert all(m["update/tis/clipped_share"] == 0 for m in steps)
    # weights of 1 but for rounding: the run without them, to rounding
    for ours, theirs in zip(steps, of_kind(plain, "step"), strict=True):
        assert ours["update/grad_norm"] == pytest.approx(theirs["update/grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective.tis={mode: token}", "train.old_logprobs=engine"],
            "objective.tis weighs a token by pi_old / mu, so log pi_old must be the trainer's; "
            "got train.old_logprobs=engine",
        ),
        (
            ["experiments.old_logprobs=current"],
            "experiments.old_logprobs=current is for batches older than their first update; got rollout.staleness=0",
        ),
        (["objective.tis={cap: 0.5}"], "objective.tis: cap must be finite and at least 1; got 0.5"),
        (["objective.tis={floor: 0.5}"], "floor is for mode icepop"),
        (["objective.tis={modes: token}"], "unknown key objective.tis.modes; did you mean objective.tis.mode?"),
        (["experiments.sampler_dtype=float8"], "experiments.sampler_dtype: input should be 'bfloat16'"),
        (["rollout.staleness=-1"], "rollout.staleness: input should be greater than or equal to 0; got -1"),
        (["experiments.sampler_switch={step: 0, dtype: bfloat16}"], "experiments.sampler_switch.step"),
        (["rollout.sampler_dtype=bfloat16"], "got 'bfloat16'; write experiments.sampler_dtype"),
        (["rollout.sampler_vectors=true"], "write experiments.sampler_vectors"),
        (["rollout.rewards=random"], "write experiments.rewards"),
        (["train.old_logprobs=current"], "write experiments.old_logprobs"),
        (
            ["experiments.rewards=random", "rollout.overlong=penalty", "rollout.overlong_buffer=4"],
            "got experiments.rewards=random beside it",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sapo.load_recipe("quickstart", overrides)
    assert message in str(caught.value)


def test_a_run_of_before_the_section_of_studies_is_read_where_it_left_their_keys_alone() -> None:
    old = {"sampler_dtype": None, "sampler_scaling": "tensor", "sampler_vectors": False, "rewards": "verifier"}
    config = sapo.load_recipe("quickstart").model_dump(mode="json", exclude={"experiments"})
    config["rollout"] |= {**old, "sampler_switch": None}
    assert parse_recipe(config).experiments == ExperimentsConfig()


@pytest.mark.parametrize("asked", [20, 70])
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__staleness": 3},
        {"rollout__staleness": 3, "experiments__old_logprobs": "current", "objective": {"name": "grpo", "tis": {}}},
        {
            "rollout__staleness": 4,
            "experiments__sampler_dtype": "bfloat16",
            "experiments__sampler_switch": {"step": 3, "dtype": "float8_e4m3fn"},
            "objective": {"name": "gspo", "tis": {"mode": "token"}},
        },
    ],
    ids=["stale", "stale_at_current_weights", "stale_rounded_weighed"],
)
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    tmp_path: Path, whole: Callable[..., Path], changes: dict, asked: int
) -> None:
    count = iter(range(10_000))
    stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: next(count) >= asked, **changes)
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole(**changes), 6)


def test_a_stale_run_given_more_steps_is_the_longer_run(tmp_path: Path, whole: Callable[..., Path]) -> None:
    longer = whole(rollout__staleness=3)
    short = run_recipe(tmp_path / "short", rollout__staleness=3, train__steps=4)
    resume(short, ["train.steps=6"])

    def updates(run: Path) -> list[dict]:
        return of_kind(run, "update")

    assert updates(short) == updates(longer)
