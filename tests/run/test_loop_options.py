"""What the loop does with groups, in whole runs on an untrained model: ratios, figures, resumes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.run.loop import TrainingRun
from sapo.training.checkpoint import list_checkpoints
from sapo.workflows.train import resume
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_mixture

OPTIONS: dict[str, dict[str, Any]] = {
    "drop": {"rollout__zero_variance": "drop"},
    "refill": {"rollout__zero_variance": "refill"},
    "mask": {"rollout__overlong": "mask"},
    "penalty": {"rollout__overlong": "penalty", "rollout__overlong_buffer": 6},
    "random": {"experiments__rewards": "random"},
    "curriculum": {"curriculum": {"low": 0.3, "high": 0.7}},
    "all": {
        "rollout__zero_variance": "refill",
        "rollout__max_refills": 2,
        "rollout__overlong": "mask",
        "curriculum": {"low": 0.3, "high": 0.7},
    },
}


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


class Recorder:
    """A listener that remembers what it was warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def started(self, config: sapo.RunConfig) -> None: ...

    def record(self, record: dict) -> None: ...

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def checkpoint(self, checkpoint: object) -> None: ...

    def resumed(self, checkpoint: object) -> None: ...


def run_mixture(directory: Path, should_stop=lambda: False, listener: Recorder | None = None, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    config = sapo.load_recipe(write_mixture(directory, **changes))
    return sapo.train(config, should_stop=should_stop, listener=listener).directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_mixture, tmp_path_factory)


def lines(run: Path, kind: str = "step") -> list[dict]:
    return [m for m in metrics(run) if m["kind"] == kind]


def rollouts(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("asked", [25, 70])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_resumes_to_the_bit(tmp_path: Path, whole: Callable[..., Path], option: str, asked: int) -> None:
    count = iter(range(10**6))
    stopped = run_mixture(tmp_path / "stopped", lambda: next(count) >= asked, **OPTIONS[option])
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole(**OPTIONS[option]), 6)


@pytest.mark.parametrize("option", ["drop", "penalty", "all"])
def test_a_stop_between_updates_keeps_the_choice(
    tmp_path: Path, whole: Callable[..., Path], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(whole(**OPTIONS[option]), 6)
    stop = False
    original = TrainingRun.update

    def update(self: TrainingRun, groups: tuple) -> None:
        nonlocal stop
        original(self, groups)
        stop = (self.state.step, self.state.update) == (3, 1)

    monkeypatch.setattr(TrainingRun, "update", update)
    stopped = run_mixture(tmp_path / "stopped", lambda: stop, **OPTIONS[option])
    newest = list_checkpoints(stopped / "checkpoints")[0]
    assert newest.label == "step 3, update 1"
    if option != "penalty":
        assert newest.state()["dropped"], "the step had groups that left the batch, and they are not forgotten"
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    resume(stopped)
    assert fingerprint(stopped, 6) == expected


def test_refilled_batches_hold_the_mixture_and_every_token_is_counted(tmp_path: Path) -> None:
    run = run_mixture(tmp_path, **OPTIONS["refill"], train__steps=8)
    assert sum(m["groups/dropped"] for m in lines(run)) > 0, "nothing was refilled: nothing is shown"
    for step in lines(run):
        assert [step[f"task/{t}/groups/kept"] for t in ("one", "two", "three")] == [4, 2, 2]
        assert step["groups"] == step["groups/kept"] + step["groups/dropped"]
        rows = rollouts(run, step["step"])
        assert len(rows) == 4 * step["groups"]
        assert sum(len(r["token_ids"]) for r in rows) == step["tokens/generated"]
        assert sum(len(r["token_ids"]) for r in rows if r.get("dropped")) == step["tokens/dropped"]
        assert sum(r["reward"] for r in rows) / len(rows) == pytest.approx(step["reward/mean"])
        groups: dict[int, list[dict]] = {}
        for row in rows:
            groups.setdefault(row["prompt_id"], []).append(row)
        for members in groups.values():
            flat = len({r["reward"] for r in members}) == 1
            assert flat or not members[0].get("dropped"), "no group with spread is thrown away"
        flat_kept = sum(len({r["reward"] for r in g}) == 1 and not g[0].get("dropped") for g in groups.values())
        assert flat_kept == step["groups/unfilled"]
        # Of the batch, in each mini-batch: groups with spread and the others alike.
        if not step["groups/unfilled"]:
            by_update = Counter((r["update"], r["task"]) for r in rows if not r.get("dropped"))
            assert by_update == {(u, t): 4 * n for u in (0, 1) for t, n in (("one", 2), ("two", 1), ("three", 1))}
    tokens = json.loads((run / "summary.json").read_text())["tokens"]
    assert tokens["generated"] == sum(m["tokens/generated"] for m in lines(run))
    assert tokens["dropped"] == sum(m["tokens/dropped"] for m in lines(run))


def test_dropped_groups_leave_the_denominators_of_the_update(whole: Callable[..., Path]) -> None:
    run = whole(**OPTIONS["drop"])
    assert any(0 < m["groups/dropped"] < 8 for m in lines(run))
    for step in lines(run):
        rows = rollouts(run, step["step"])
        trained = [r for r in rows if not r.get("dropped")]
        assert len(trained) == 4 * step["groups/kept"]
        assert all(("update" in r) is (not r.get("dropped")) for r in rows)
        for update in (u for u in lines(run, "update") if u["step"] == step["step"] and u["update"] == 0):
            own = [r for r in trained if r["update"] == 0]
            # On policy the gate's value is 4 / tau * sigmoid(0) = 2 / tau, so the loss is minus the mean over the
            # sequences that are left of 2 A / tau.
            values = [2 * r["advantage"] / (1.0 if r["advantage"] > 0 else 1.05) for r in own]
            assert update["loss"] == pytest.approx(-sum(values) / len(own), abs=1e-4)


def test_a_first_step_without_any_spread_is_skipped_and_goes_on(tmp_path: Path) -> None:
    tmp_path.joinpath("rewards_of_nothing.py").write_text("def judge(completion):\n    return 0.0\n")
    file = write_mixture(tmp_path, **OPTIONS["drop"])
    never = [f"tasks.{i}.verifier=rewards_of_nothing:judge" for i in range(3)]
    run = sapo.train(sapo.load_recipe(file, never)).directory
    for step in lines(run):
        assert (step["groups/kept"], step["groups/dropped"], step["updates/skipped"]) == (0, 8, 2)
    assert lines(run, "self_check")[0]["equal"], "it is made on what was sampled"


def test_refills_that_are_spent_are_said_once_and_counted(tmp_path: Path) -> None:
    tmp_path.joinpath("rewards_of_nothing.py").write_text("def judge(completion):\n    return 0.0\n")
    file = write_mixture(tmp_path, rollout__zero_variance="refill", rollout__max_refills=2)
    listener = Recorder()
    overrides = ["tasks.2.verifier=rewards_of_nothing:judge"]
    run = sapo.train(sapo.load_recipe(file, overrides), listener=listener).directory
    for step in lines(run):
        assert step["task/three/groups"] == 3 * 2, "the first round and two more, none of which filled a place"
        assert step["groups/refill_rounds"] == 2
        assert step["groups/unfilled"] >= 2
        assert step["groups/kept"] == 8
    (warning,) = listener.warnings
    assert "have zero variance after 2 refills (rollout.max_refills)" in warning


def test_the_penalty_shapes_advantages_and_the_rest_is_the_verifiers(whole: Callable[..., Path]) -> None:
    run = whole(**OPTIONS["penalty"])
    for step in lines(run):
        rows = rollouts(run, step["step"])
        for row in rows:
            # By hand: 12 tokens at most, the last 6 the buffer.
            assert row["shaped_reward"] == row["reward"] - max(0, len(row["token_ids"]) - 6) / 6
            assert row["reward"] in (0.0, 1.0)
        assert step["pass@1"] == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
        assert step["reward/shaped_mean"] == pytest.approx(sum(r["shaped_reward"] for r in rows) / len(rows))
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        for members in groups:
            best, worst = (f(members, key=lambda r: r["shaped_reward"]) for f in (max, min))
            assert best["advantage"] >= worst["advantage"]
            assert (best["advantage"] > 0) == (best["shaped_reward"] > worst["shaped_reward"])


def test_masked_completions_carry_no_token_of_an_update(whole: Callable[..., Path]) -> None:
    run = whole(**OPTIONS["mask"])
    seen = 0
    for step in lines(run):
        rows = rollouts(run, step["step"])
        for row in rows:
            assert row["masked"] == (row["finish_reason"] == "length")
            assert not (row["masked"] and "gate_weight" in row)
        assert step["overlong/masked"] == pytest.approx(sum(r["masked"] for r in rows) / len(rows))
        trained = sum(len(r["token_ids"]) for r in rows if "gate_weight" in r)
        updates = [u for u in lines(run, "update") if u["step"] == step["step"]]
        assert sum(u.get("tokens/gradient", 0) for u in updates) == trained
        seen += trained
    assert seen > 0


def test_a_curriculum_is_saved_by_row_and_logged_by_task(tmp_path: Path) -> None:
    run = run_mixture(tmp_path, **OPTIONS["curriculum"], train__steps=12)
    state = list_checkpoints(run / "checkpoints")[0].state()
    last = lines(run)[-1]
    for task in ("one", "two", "three"):
        rates = state["position"]["pass_rates"][task]
        assert last[f"task/{task}/curriculum/rows_seen"] == len(rates)
        assert last[f"task/{task}/curriculum/in_band"] == pytest.approx(
            sum(0.3 <= rate <= 0.7 for rate in rates.values()) / len(rates)
        )
        passed_over = sum(m[f"task/{task}/curriculum/passed_over"] for m in lines(run))
        assert state["position"]["offsets"].get(task, 0) == passed_over
    assert sum(state["position"]["offsets"].values()) > 0, "nothing was passed over: nothing is shown"
    for step in lines(run):
        assert [step[f"task/{t}/groups"] for t in ("one", "two", "three")] == [4, 2, 2]


def test_a_verifiers_figures_reach_the_logs_of_its_task(tmp_path: Path) -> None:
    tmp_path.joinpath("rewards_of_figures.py").write_text(
        "from sapo.data import Score\n\n"
        "def judge(completion):\n"
        "    return Score(float('7' in completion), figures={'sevens': completion.count('7') / 8})\n"
    )
    file = write_mixture(tmp_path)
    run = sapo.train(sapo.load_recipe(file, ["tasks.1.verifier=rewards_of_figures:judge"])).directory
    for step in lines(run):
        own = [r for r in rollouts(run, step["step"]) if r["task"] == "two"]
        expected = sum(r["figures"]["sevens"] for r in own) / len(own)
        assert step["task/two/figure/sevens"] == step["figure/sevens"] == pytest.approx(expected)
        assert all(r["figures"]["sevens"] == r["text"].count("7") / 8 for r in own)
        assert "task/one/figure/sevens" not in step


def test_tensorboard_has_a_panel_for_each_task_and_one_that_compares_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    run = run_mixture(tmp_path, log__tensorboard=True)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [e.value for e in events.Scalars("task/two/pass@1")]
    assert logged == pytest.approx([m["task/two/pass@1"] for m in lines(run)])
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    assert sorted(c.title for c in layout.category) == ["one", "tasks", "three", "two"]
    (compared,) = [c for c in layout.category if c.title == "tasks"]
    (chart,) = [c for c in compared.chart if c.title == "update/gate/eur"]
    assert list(chart.multiline.tag) == [f"task/{t}/update/gate/eur$" for t in ("one", "two", "three")]
    assert {f"task/{t}/update/gate/eur" for t in ("one", "two", "three")} <= set(events.Tags()["scalars"])


def test_random_rewards_train_and_the_verifiers_are_logged_and_evaluated(whole: Callable[..., Path]) -> None:
    plain, random = whole(), whole(**OPTIONS["random"])
    first, control = lines(plain)[0], lines(random)[0]
    assert control["reward/mean"] == first["reward/mean"], "the same completions, judged by the verifier"
    coins = [json.loads(line)["shaped_reward"] for line in (random / "rollouts" / "step-000001.jsonl").open()]
    assert set(coins) == {0.0, 1.0}
    assert control["reward/shaped_mean"] == pytest.approx(sum(coins) / len(coins))
    assert not any(name.startswith("overlong/") for name in control)
    assert lines(random, "eval")[:3] == lines(plain, "eval")[:3], "of each task, before the first step"
    assert lines(random, "update")[0]["loss"] != lines(plain, "update")[0]["loss"]
