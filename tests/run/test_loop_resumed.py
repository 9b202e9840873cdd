"""Runs that are stopped, cut or damaged, and resumed: to the bit as one that was not, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from sapo.errors import ConfigError
from sapo.rollout.local.cpu.native import kernels_in_use
from sapo.rollout.local.engine import LocalEngine
from sapo.training.checkpoint import Checkpoint, list_checkpoints
from sapo.training.trainer import Trainer
from sapo.utils.machine import processor_name
from sapo.workflows.train import resume
from support.kernels import fresh_cache
from support.loop_cases import Recorder, run_recipe
from support.runs import REWARD, fingerprint, make_each_once, metrics, write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(**changes): a run that nobody stops, made once for all tests, which only read it."""
    return make_each_once(run_recipe, tmp_path_factory)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)  # the user's reward function is imported from there
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SAPO_CACHE", fresh_cache(tmp_path / "cache"))


@pytest.mark.parametrize("asked", [1, 20, 90])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(tmp_path: Path, whole: Callable[..., Path], asked: int) -> None:
    count = 0

    def should_stop() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    stopped = run_recipe(tmp_path / "stopped", should_stop=should_stop)
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole(), 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dtype": "bfloat16"},
        {"train__activation_checkpointing": True},
        {"train__old_logprobs": "trainer"},
        {"objective": {"name": "gspo"}},
        {"train__schedule": "cosine", "train__tokens_per_microbatch": 40},
        {"objective": {"name": "sapo", "kl": {"coefficient": 0.1}}},
        {"model__lora": {"rank": 2}, "objective": {"name": "sapo", "kl": {"coefficient": 0.1, "estimator": "k2"}}},
        {"prompt": {"template": "={prompt}", "stop": ["7", "12"]}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_resume_to_the_bit_too(tmp_path: Path, whole: Callable[..., Path], changes: dict) -> None:
    asked = iter(range(10_000))
    stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: next(asked) > 60, **changes)
    assert not (stopped / "summary.json").exists()
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole(**changes), 6)


def count_updates(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows by one with each update."""
    made: list[None] = []
    original = Trainer.update

    def counting(self, *args, **kwargs):
        made.append(None)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "update", counting)
    return made


def test_a_run_stopped_between_updates_keeps_its_rollouts(
    tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(whole(), 6)
    updates = count_updates(monkeypatch)
    run = run_recipe(tmp_path / "stopped", should_stop=lambda: len(updates) >= 8)  # asked within update 8, in step 4
    newest = list_checkpoints(run / "checkpoints")[0]
    assert newest.label == "step 3, update 1"
    assert len(newest.state()["groups"]) == 4
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    drawn = 0
    generate = LocalEngine.generate

    def counting_generate(self, requests, *args, **kwargs):
        nonlocal drawn
        drawn += 1
        return generate(self, requests, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "generate", counting_generate)
    resume(run)
    assert drawn == 2 + 1, "steps 5 and 6 and the last evaluation sample; step 4 goes on with what it had"
    assert fingerprint(run, 6) == expected


def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, whole: Callable[..., Path]) -> None:
    run = run_recipe(tmp_path / "broken")
    model = run / "checkpoints" / "step-000006" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    listener = Recorder()
    resume(run, listener=listener)
    assert len(listener.warnings) == 1
    assert "step-000006/model.safetensors holds" in listener.warnings[0]
    assert fingerprint(run, 6) == fingerprint(whole(), 6)


def test_a_state_that_asks_for_more_token_data_than_there_is_gives_way_to_an_earlier_one(
    tmp_path: Path, whole: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(whole(), 6)
    updates = count_updates(monkeypatch)
    run = run_recipe(tmp_path / "stopped", should_stop=lambda: len(updates) >= 6)  # behind the checkpoint of step 2
    (newest,) = [c for c in list_checkpoints(run / "checkpoints") if c.update]
    save_file({"none": np.zeros(1)}, newest.path / "batches.safetensors")
    monkeypatch.setattr(Checkpoint, "verify", lambda self: None)  # as if it had been written so
    listener = Recorder()
    resume(run, listener=listener)
    assert "asks for more token data" in listener.warnings[0]
    assert fingerprint(run, 6) == expected


def test_a_checkpoint_kept_alone_outlives_a_broken_one_that_was_newer(tmp_path: Path) -> None:
    run = run_recipe(tmp_path, checkpoint__keep=1)
    (run / "checkpoints" / "step-000006" / "state.json").unlink()
    asked = iter(range(10_000))
    resume(run, should_stop=lambda: next(asked) > 10)  # goes on from the one kept as healthy, and is stopped on its way
    kept = list_checkpoints(run / "checkpoints")
    assert max(c.step for c in kept) < 6
    for checkpoint in kept:
        checkpoint.verify()


def test_a_stop_in_the_second_tasks_evaluation_logs_neither_twice(tmp_path: Path, monkeypatch) -> None:
    import sapo.run.held_out

    settings = sapo.load_recipe(write_recipe(tmp_path)).model_dump(mode="json")
    settings["tasks"].append({**settings["tasks"][0], "label": "other"})
    (tmp_path / "two.yaml").write_text(json.dumps(settings))
    evaluated = 0
    original = sapo.run.held_out.evaluate_policy

    def counting(*args, **kwargs):
        nonlocal evaluated
        evaluated += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(sapo.run.held_out, "evaluate_policy", counting)
    run = sapo.train(sapo.load_recipe(tmp_path / "two.yaml"), should_stop=lambda: evaluated == 4).directory
    resume(run)
    seen = [(m["step"], m["task"]) for m in metrics(run) if m["kind"] == "eval"]
    assert seen == [(step, task) for step in (0, 3, 6) for task in ("prompts", "other")]


def test_a_refused_resume_changes_nothing_and_gives_the_lock_back(tmp_path: Path) -> None:
    run = run_recipe(tmp_path)
    before = (run / "config.yaml").read_bytes()
    (run / "metrics.jsonl").write_text("")
    for _ in range(2):
        with pytest.raises(ConfigError, match="it was changed"):
            resume(run, ["train.steps=9"])
    assert (run / "config.yaml").read_bytes() == before


def test_resuming_writes_no_tensorboard_figure_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_recipe(tmp_path, log__tensorboard=True)
    resume(run, ["train.steps=9"])
    events = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [e.step for e in events.Scalars("eval/pass@1")] == [0, 3, 6, 9]
    assert [e.step for e in events.Scalars("train/reward/mean")] == list(range(1, 10))


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path, whole: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(tmp_path / "cut", listener=_Cut())
    listener = Recorder()
    resume(tmp_path / "cut" / "run", listener=listener)
    assert "no checkpoint yet" in listener.warnings[0]
    assert fingerprint(tmp_path / "cut" / "run", 6) == fingerprint(whole(), 6)


class _Cut(Recorder):
    def record(self, record: dict) -> None:
        if record["kind"] == "step":
            raise RuntimeError("power cut")


def test_a_finished_run_can_go_on_for_more_steps(tmp_path: Path) -> None:
    long = run_recipe(tmp_path / "long", train__steps=8, eval__every=0)
    short = run_recipe(tmp_path / "short", eval__every=0)
    resume(short, ["train.steps=8"])
    assert [m for m in metrics(short) if m["kind"] == "update"] == [m for m in metrics(long) if m["kind"] == "update"]


def test_a_run_that_goes_on_with_other_kernels_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPO_NATIVE", raising=False)
    had = kernels_in_use()
    if had == "torch":
        pytest.skip("there is no C compiler")
    run = run_recipe(tmp_path)
    for switch, expected in (
        ("1", []),
        ("0", [f"kernels: {had} before, torch now: the run is resumed, but not bit for bit"]),
    ):
        monkeypatch.setenv("SAPO_NATIVE", switch)
        listener = Recorder()
        resume(run, listener=listener)
        assert [w for w in listener.warnings if "bit for bit" in w] == expected


def test_a_run_that_goes_on_on_another_processor_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_recipe(tmp_path, train__steps=1)
    had = yaml.safe_load((run / "config.yaml").read_text())["provenance"]["processor"]
    assert had == processor_name()
    monkeypatch.setattr("sapo.run.machine.processor_name", lambda: "Abacus 1")
    listener = Recorder()
    resume(run, listener=listener)
    expected = f"processor: {had} before, Abacus 1 now: the run is resumed, but not bit for bit"
    assert [w for w in listener.warnings if "bit for bit" in w] == [expected]


def test_metrics_changed_by_hand_are_not_resumed_over(tmp_path: Path) -> None:
    run = run_recipe(tmp_path)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="it was changed"):
        resume(run)


def test_a_step_stopped_in_its_middle_is_saved_whatever_its_rows_hold(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i}+1=", "answer": "7", "asked_on": datetime.date(2026, 1, 1)} for i in range(24)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    task = {
        "name": "file",
        "path": str(tmp_path / "rows.parquet"),
        "verifier": "rewards_of_a_test:share_of_sevens",
        "score_truncated": True,
    }
    whole = run_recipe(tmp_path / "whole", tasks=[task])
    updates = 0
    original = Trainer.update

    def count(self, *args, **kwargs):
        nonlocal updates
        result = original(self, *args, **kwargs)
        updates += 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", count)
        stopped = run_recipe(tmp_path / "stopped", should_stop=lambda: updates == 3, tasks=[task])
    assert list_checkpoints(stopped / "checkpoints")[0].label == "step 1, update 1"
    resume(stopped)
    assert fingerprint(stopped, 6) == fingerprint(whole, 6)
