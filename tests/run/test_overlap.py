"""Batches drawn in a thread beside the updates: the run is that of one process in lockstep, bit for bit."""

from __future__ import annotations

import json
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.errors import ConfigError, SelfCheckError
from sapo.rollout.local.engine import LocalEngine
from sapo.run.background import BackgroundWork
from sapo.run.batches import BatchSource
from sapo.run.loop import TrainingRun
from sapo.workflows.train import resume
from support.runs import REWARD, fingerprint, metrics, write_mixture, write_recipe

STEPS = 6


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def run_in(directory: Path, where: str, staleness: int, should_stop=lambda: False, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    write = write_mixture if changes.pop("mixture", False) else write_recipe
    settings = {"rollout__run_in": where, "rollout__staleness": staleness, **changes}
    return sapo.train(sapo.load_recipe(write(directory, **settings)), should_stop=should_stop).directory


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty to a reference": {"objective__kl": {"coefficient": 0.05}},
    "adapter": {"model__lora": {"rank": 2, "alpha": 4}, "objective__kl": {"coefficient": 0.05}},
    "refills and a curriculum": {
        "mixture": True,
        "rollout__zero_variance": "refill",
        "rollout__max_refills": 2,
        "curriculum": {"low": 0.3, "high": 0.7},
    },
    "current weights": {"experiments__old_logprobs": "current", "objective__tis": {"cap": 5.0}},
    "rounded sampler, current weights": {
        "experiments__old_logprobs": "current",
        "experiments__sampler_dtype": "float8_e4m3fn",
    },
    "parity": {"rollout__parity_every": 2},
}


@pytest.mark.parametrize(("case", "staleness"), [("plain", 0), ("plain", 1), *((case, 3) for case in CASES)])
def test_a_thread_draws_the_run_of_lockstep(tmp_path: Path, case: str, staleness: int) -> None:
    lockstep = fingerprint(run_in(tmp_path / "lockstep", "driver", staleness, **CASES[case]), STEPS)
    assert fingerprint(run_in(tmp_path / "thread", "thread", staleness, **CASES[case]), STEPS) == lockstep


def test_updates_are_made_while_a_batch_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits until the updates that lie between a draw and its use are made: lockstep would hang here."""
    updated, begun = threading.Event(), []
    generate, update = LocalEngine.generate, TrainingRun.update

    def waiting(self, requests, *args, **options):
        if threading.current_thread() is not threading.main_thread() and requests[0].prompt.id >> 32 >= 1:
            begun.append(requests[0].prompt.id >> 32)
            assert updated.wait(60)
            updated.clear()
        return generate(self, requests, *args, **options)

    def note(self, groups):
        update(self, groups)
        if self.state.update == 2:  # the second of the step, which the draw was begun before
            updated.set()

    monkeypatch.setattr(LocalEngine, "generate", waiting)
    monkeypatch.setattr(TrainingRun, "update", note)
    directory = run_in(tmp_path, "thread", 1, eval__every=0, checkpoint__every=0)
    assert begun == [1, 2, 3, 4, 5, 6], "the last is for a run that is given more steps"
    timing = [
        json.loads(line)["timing"]
        for line in (directory / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "step"
    ]
    assert all({"wait", "drawing/generate", "drawing/score"} <= t.keys() for t in timing)
    assert all("generate" not in t and "score" not in t for t in timing), "drawing is no phase of the foreground"


@pytest.mark.parametrize("asked", [12, 40, 60])
def test_a_run_stopped_at_any_moment_resumes_to_the_bit(tmp_path: Path, asked: int) -> None:
    lockstep = fingerprint(run_in(tmp_path / "lockstep", "driver", 3), STEPS)
    count = iter(range(10**6))
    stopped = run_in(tmp_path / "stopped", "thread", 3, lambda: next(count) >= asked)
    if not (stopped / "summary.json").exists():
        resume(stopped)
    assert fingerprint(stopped, STEPS) == lockstep


@pytest.mark.parametrize("moved", [False, True], ids=["weights as drawn from", "weights moved on"])
def test_a_stop_leaves_a_draw_that_can_be_repeated_and_waits_for_one_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """A batch of 3 updates' age is drawn at (step 1, update 1) and (2, 1): the stop comes before or after an update."""
    stop, held, left = [False], threading.Event(), []
    generate, update, leave = LocalEngine.generate, TrainingRun.update, BatchSource.leave

    def slow(self, requests, params, should_stop=lambda: False, *args, **options):
        if requests[0].prompt.id >> 32 == 3:
            while not held.wait(0.01) and not should_stop():
                pass
        return generate(self, requests, params, should_stop, *args, **options)

    def stopping(self, groups):
        if (self.state.step, self.state.update) == ((2, 0) if moved else (1, 1)):
            stop[0] = True
            threading.Timer(0.3, held.set).start()
        update(self, groups)

    def note(self):
        if self._draw is not None:
            left.append(self._draw.version)
        leave(self)

    monkeypatch.setattr(LocalEngine, "generate", slow)
    monkeypatch.setattr(TrainingRun, "update", stopping)
    monkeypatch.setattr(BatchSource, "leave", note)
    stopped = run_in(tmp_path / "stopped", "thread", 3, lambda: stop[0], checkpoint__every=0, eval__every=0)
    assert left == ([] if moved else [3])
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path / "stopped"))
    plain = run_in(tmp_path / "plain", "driver", 3, checkpoint__every=0, eval__every=0)
    resume(stopped)
    assert fingerprint(stopped, STEPS) == fingerprint(plain, STEPS)


def test_a_run_goes_on_elsewhere_to_the_bit(tmp_path: Path) -> None:
    lockstep = fingerprint(run_in(tmp_path / "lockstep", "driver", 3), STEPS)
    begun = run_in(tmp_path / "begun", "thread", 3, train__steps=3, train__warmup_steps=2)
    resume(begun, [f"train.steps={STEPS}", "rollout.run_in=driver"])
    got = fingerprint(begun, STEPS)
    assert [m for m in got["metrics"] if m["kind"] == "update"] == [
        m for m in lockstep["metrics"] if m["kind"] == "update"
    ]
    assert got["model.safetensors"] == lockstep["model.safetensors"]


def test_an_error_of_the_thread_is_raised_in_the_run_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_in_the_thread(self, requests, *args, **options):
        raise ZeroDivisionError("a fault of the engine")

    monkeypatch.setattr(LocalEngine, "generate", broken_in_the_thread)
    with pytest.raises(ZeroDivisionError, match="a fault of the engine") as raised:
        run_in(tmp_path, "thread", 1, eval__every=0, eval__problems=1, checkpoint__every=0)
    assert "broken_in_the_thread" in "".join(traceback.format_tb(raised.tb))
    assert not [t for t in threading.enumerate() if t.name == "sapo-rollout"]


def test_work_that_is_left_is_waited_for_and_forgotten() -> None:
    ended = []

    def work(should_stop):
        while not should_stop():
            time.sleep(0.001)
        ended.append(True)
        raise ValueError("whatever it raises then")

    BackgroundWork(work).leave()
    assert ended == [True]


REFUSED = [
    ({"train__old_logprobs": "trainer"}, "train.old_logprobs=trainer needs the trainer's log pi_old"),
    ({"objective__tis": {"cap": 5.0}}, "objective.tis needs the trainer's log pi_old"),
    ({"rollout__top_p": 0.9}, "a cut distribution"),
    ({"experiments__sampler_dtype": "float8_e4m3fn"}, "a sampler of rounded weights"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
@pytest.mark.parametrize("where", ["thread", "process"])
def test_what_needs_the_weights_that_are_gone_is_refused(
    tmp_path: Path, where: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        run_in(tmp_path, where, 1, **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    if where == "thread":  # without staleness the weights are there
        sapo.load_recipe(write_recipe(tmp_path, **changes, rollout__run_in=where))


def test_a_self_check_that_chooses_the_trainers_ends_the_run_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckError, match=r"start again with rollout\.run_in=driver"):
        run_in(tmp_path, "thread", 1, train__self_check_tolerance=1e-12)
    assert [m["kind"] for m in metrics(tmp_path / "run")] == ["eval", "self_check"]
    assert "self-check" in json.loads((tmp_path / "run" / "failure.json").read_text())["reason"]
