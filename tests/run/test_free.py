"""The free schedule: drawing goes on beside the updates, groups are young enough, and no prompt is lost or doubled."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.errors import ConfigError, Interrupted, SelfCheckError
from sapo.run.free import FreeBatches
from sapo.run.loop import TrainingRun
from sapo.workflows.train import resume
from support.runs import REWARD, metrics, write_mixture, write_recipe

STEPS, PROMPTS, MINIBATCHES = 6, 4, 2


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_test.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))


def free_recipe(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    write = write_mixture if changes.pop("mixture", False) else write_recipe
    settings = {"rollout__run_in": "thread", "rollout__schedule": "free", "log__rollouts_every": 1}
    return write(directory, **{**settings, **changes})


def train_free(directory: Path, should_stop=lambda: False, **changes: Any) -> Path:
    return sapo.train(sapo.load_recipe(free_recipe(directory, **changes)), should_stop=should_stop).directory


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [m for m in metrics(run) if m["kind"] == kind]


def completions(run: Path) -> list[dict[str, Any]]:
    """Every completion that was trained on, with its step."""
    return [
        {**json.loads(line), "step": step}
        for step, file in enumerate(sorted((run / "rollouts").glob("*.jsonl")), 1)
        for line in file.read_text().splitlines()
    ]


def trained(run: Path) -> Counter[tuple[int, str]]:
    """How often each prompt was trained on, in groups, by id and text."""
    return Counter((c["prompt_id"], c["prompt"]) for c in completions(run) if c["sample"] == 0)


@pytest.mark.parametrize("bound", [1, 3])
def test_a_run_keeps_the_bound_in_every_step_and_its_versions_add_up(tmp_path: Path, bound: int) -> None:
    run = train_free(tmp_path, rollout__max_staleness=bound)
    steps, histograms = of_kind(run, "step"), of_kind(run, "staleness")
    assert [s["step"] for s in steps] == [h["step"] for h in histograms] == list(range(1, STEPS + 1))
    assert all(s["rollout/staleness_mean"] <= s["rollout/staleness_max"] <= bound for s in steps)
    assert all(s["rollout/discarded_stale"] == 0 for s in steps), "what would be too old is not begun"
    drawn = completions(run)
    assert all(sum(tokens for tokens, _ in c["versions"]) == len(c["token_ids"]) for c in drawn)
    for histogram in histograms:
        own = [c for c in drawn if c["step"] == histogram["step"]]
        counted: Counter[int] = Counter()
        for completion in own:
            for tokens, version in completion["versions"]:
                counted[MINIBATCHES * (histogram["step"] - 1) - version] += tokens
        assert dict(zip(histogram["staleness"], histogram["tokens"], strict=True)) == counted
        assert sum(histogram["groups"]) == PROMPTS
    fixed = sapo.train(sapo.load_recipe(write_recipe(tmp_path, log__rollouts_every=1, run_dir=str(tmp_path / "fixed"))))
    assert trained(run) == trained(fixed.directory), "the prompts of the fixed schedule, each as often"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["schedule"] == {
        "kind": "free",
        "max_staleness": bound,
        "reproducible": False,
        "discarded_stale": 0,
        "redrawn_unfinished": 0,
    }


def test_a_mixture_keeps_its_prompts_and_drops_flat_groups(tmp_path: Path) -> None:
    run = train_free(tmp_path / "free", mixture=True, rollout__zero_variance="drop")
    (tmp_path / "fixed").mkdir()
    file = write_mixture(tmp_path / "fixed", rollout__zero_variance="drop")
    fixed = sapo.train(sapo.load_recipe(file)).directory
    assert trained(run) == trained(fixed), "those of dropped groups included"
    assert any("dropped" in c for c in completions(run))
    assert any("dropped" not in c for c in completions(run))


def stop_after(asked: int):
    count = itertools.count()
    return lambda: next(count) >= asked


@pytest.mark.parametrize("asked", [3, 25, 40])
def test_a_run_stopped_at_any_moment_trains_on_each_prompt_as_often(tmp_path: Path, asked: int) -> None:
    plain = train_free(tmp_path / "plain")
    stopped = train_free(tmp_path / "stopped", stop_after(asked))
    for further in (asked, 2 * asked, 10**6):
        if not (stopped / "summary.json").exists():
            resume(stopped, should_stop=stop_after(further))
    assert trained(stopped) == trained(plain)
    assert [s["step"] for s in of_kind(stopped, "staleness")] == list(range(1, STEPS + 1))
    assert all(s["rollout/staleness_max"] <= MINIBATCHES for s in of_kind(stopped, "step"))
    assert not [t for t in threading.enumerate() if t.name == "sapo-rollout"]


def test_a_checkpoint_in_mid_flight_holds_what_waits_and_its_unfinished_prompts_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop is asked while a wave is held, with groups of the wave before waiting."""
    stop, held = threading.Event(), threading.Event()
    draw = FreeBatches._draw_wave

    def holding(self, numbers, offer, should_stop):
        if numbers[0] >= 2 * PROMPTS + 2:  # of the third batch, of which two prompts are done
            held.set()
            while not should_stop():
                time.sleep(0.01)
            raise Interrupted
        return draw(self, numbers, offer, should_stop)

    def stopping(self):
        # The run waits for its third batch when the wave that never ends has begun.
        if self._flow is not None and held.is_set() and self.state.step == 2:
            stop.set()
        return stop.is_set()

    monkeypatch.setattr(FreeBatches, "_draw_wave", holding)
    recipe = sapo.load_recipe(free_recipe(tmp_path, rollout__max_rows=8, eval__every=0, checkpoint__every=0))
    source: list[FreeBatches] = []
    init = FreeBatches.__init__

    def note(self, *args, **options):
        init(self, *args, **options)
        source.append(self)

    monkeypatch.setattr(FreeBatches, "__init__", note)
    stopped = sapo.train(recipe, should_stop=lambda: bool(source) and stopping(source[0])).directory
    line = source[0].state.line
    seen = {"ready": len(line.ready), "unfinished": line.unfinished, "next": line.next}
    assert seen == {"ready": 2, "unfinished": (10, 11), "next": 12}
    [checkpoint] = (stopped / "checkpoints").iterdir()
    saved = json.loads((checkpoint / "state.json").read_text())["line"]
    assert saved["unfinished"] == [10, 11]
    assert len(saved["ready"]) == 2
    assert all(c["versions"] for g in saved["ready"] for c in g["completions"])
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = {c["prompt_id"] for c in completions(train_free(tmp_path / "plain"))}
    resume(stopped)
    assert json.loads((stopped / "summary.json").read_text())["schedule"]["redrawn_unfinished"] == 2
    assert set(trained(stopped).values()) == {1}
    assert {c["prompt_id"] for c in completions(stopped)} == plain
    third = {c["prompt_id"]: c["versions"] for c in completions(stopped) if c["step"] == 3}
    assert all(third[2 << 32 | place] == [[12, 4]] or third[2 << 32 | place][0][1] == 4 for place in (2, 3))


def test_it_draws_while_updates_are_made_and_evaluations_have_the_engine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update of each step waits until a wave for a later one is done: lockstep would hang here."""
    update, drawn = TrainingRun.update, []

    def waiting(self, groups):
        if self.state.update == 1 and self.state.step < STEPS - 1:
            deadline = time.monotonic() + 60
            while len(self.batches._flow.line().ready) < PROMPTS and time.monotonic() < deadline:
                time.sleep(0.005)
            drawn.append(len(self.batches._flow.line().ready))
        update(self, groups)

    monkeypatch.setattr(TrainingRun, "update", waiting)
    run = train_free(tmp_path)
    assert drawn == [PROMPTS] * (STEPS - 1)
    # Drawn before the step's first update, or between its two: always old by a step's two updates, or one.
    assert all(s["rollout/staleness_max"] in (1, 2) for s in of_kind(run, "step")[1:])
    assert of_kind(run, "step")[0]["rollout/staleness_max"] == 0
    assert [e["step"] for e in of_kind(run, "eval")] == [0, 3, 6]
    timing = [json.loads(line).get("timing", {}) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("drawing/generate" in t for t in timing)
    assert not any("generate" in t for t in timing)


ENGINE = '''
import time

from sapo.data import Completion
from sapo.rollout.local.engine import LocalEngine


class MidFlight(LocalEngine):
    """Slow, and every third call says that the first token is of weights four updates older than the others."""

    calls = 0

    def generate(self, *args, **options):
        type(self).calls += 1
        drawn = super().generate(*args, **options)
        if self.calls % 3 or self.version < 4:
            return drawn
        time.sleep(0.05)
        return [tuple(self.older(c) for c in completions) for completions in drawn]

    def older(self, c):
        runs = ((1, self.version - 4), (len(c) - 1, self.version)) if len(c) > 1 else ((1, self.version - 4),)
        return Completion(c.token_ids, c.logprobs, c.finish_reason, c.text, versions=runs)


class Miscounting(LocalEngine):
    def generate(self, *args, **options):
        return [
            tuple(Completion(c.token_ids, c.logprobs, c.finish_reason, c.text, versions=((99, 0),)) for c in group)
            for group in super().generate(*args, **options)
        ]


class Faulty(LocalEngine):
    def generate(self, *args, **options):
        if self.version >= 4:
            raise ZeroDivisionError("a fault of the engine")
        return super().generate(*args, **options)
'''


def with_engine(directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    (directory / "free_engines.py").write_text(ENGINE)
    return {"rollout__engine": f"free_engines:{name}", **changes}


def test_groups_that_are_too_old_are_drawn_again_from_fresh_weights(tmp_path: Path) -> None:
    run = train_free(tmp_path, **with_engine(tmp_path, "MidFlight", rollout__max_staleness=3, train__steps=10))
    steps = of_kind(run, "step")
    discarded = sum(s["rollout/discarded_stale"] for s in steps)
    assert discarded >= PROMPTS, "whole calls were too old"
    assert json.loads((run / "summary.json").read_text())["schedule"]["discarded_stale"] == discarded
    assert all(s["rollout/staleness_max"] <= 3 for s in steps)
    fixed = sapo.train(
        sapo.load_recipe(
            write_recipe(tmp_path, log__rollouts_every=1, run_dir=str(tmp_path / "fixed"), train__steps=10)
        )
    )
    assert trained(run) == trained(fixed.directory)


def test_a_resume_with_a_lower_bound_draws_again_what_waits_and_is_too_old_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped in its third step, while groups of the fourth wait that were drawn before it."""
    update, stop = TrainingRun.update, threading.Event()

    def waiting(self, groups):
        deadline = time.monotonic() + 60
        while len(self.batches._flow.line().ready) < 2 * PROMPTS and time.monotonic() < deadline:
            time.sleep(0.005)
        update(self, groups)
        if self.state.step == 1 and self.state.update == MINIBATCHES:
            stop.set()

    monkeypatch.setattr(TrainingRun, "update", waiting)
    run = train_free(tmp_path, stop.is_set, rollout__max_staleness=6, checkpoint__every=0, eval__every=0)
    monkeypatch.setattr(TrainingRun, "update", update)
    [checkpoint] = (run / "checkpoints").iterdir()
    line = json.loads((checkpoint / "state.json").read_text())["line"]
    versions = [min(v for c in g["completions"] for _, v in c["versions"]) for g in line["ready"]]
    too_old = sum(3 * MINIBATCHES - version > 1 for version in versions)
    assert too_old >= PROMPTS
    resume(run, ["rollout.max_staleness=1"])
    steps = of_kind(run, "step")
    assert [s["rollout/discarded_stale"] for s in steps] == [0, 0, 0, too_old, 0, 0]
    assert all(s["rollout/staleness_max"] <= 1 for s in steps[3:])
    assert set(trained(run).values()) == {1}
    assert len(trained(run)) == STEPS * PROMPTS


def test_an_account_of_versions_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"versions of all \d+ tokens of sample 0 .* or none; got \(\(99, 0\),\)"):
        train_free(tmp_path, **with_engine(tmp_path, "Miscounting"), eval__every=0, eval__problems=1)


def test_a_fault_of_the_drawing_side_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a fault of the engine"):
        train_free(tmp_path, **with_engine(tmp_path, "Faulty"), eval__every=0)
    assert not [t for t in threading.enumerate() if t.name == "sapo-rollout"]


REFUSED = [
    ({"rollout__run_in": "driver"}, "schedule=free draws beside the updates; got run_in=driver"),
    ({"rollout__staleness": 2}, "staleness is the age of batches of schedule=fixed; got 2 with free"),
    ({"rollout__schedule": "fixed", "rollout__max_staleness": 2}, "max_staleness is for schedule=free; got 2"),
    ({"rollout__zero_variance": "refill"}, "zero_variance=refill draws in rounds"),
    ({"curriculum": {"low": 0.3, "high": 0.7}}, "a curriculum chooses a batch's prompts"),
    ({"train__old_logprobs": "trainer"}, "rollout.schedule=free draws a batch while .* train.old_logprobs=trainer"),
    ({"objective__tis": {"cap": 5.0}}, "objective.tis needs the trainer's log pi_old"),
    ({"rollout__top_p": 0.9}, "a cut distribution"),
    ({"rollout__max_staleness": 0}, "max_staleness"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_the_free_schedule_cannot_have_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        train_free(tmp_path, **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_self_check_that_chooses_the_trainers_names_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckError, match=r"rollout\.run_in=driver and schedule=fixed, experiments"):
        train_free(tmp_path, train__self_check_tolerance=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"experiments__old_logprobs": "current", "objective__tis": {"cap": 5.0}},
        {"objective__kl": {"coefficient": 0.05}, "model__lora": {"rank": 2, "alpha": 4}},
        {"rollout__parity_every": 2},
    ],
    ids=["current weights", "adapter and reference", "parity"],
)
def test_it_goes_with(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = train_free(tmp_path, **changes)
    assert len(of_kind(run, "step")) == STEPS
    if "rollout__parity_every" in changes:
        checks = of_kind(run, "parity")
        assert [c["step"] for c in checks] == [1, 2, 3, 4, 5]
        assert all(c["log_ratio/max_abs"] < 1e-5 for c in checks)


def test_a_run_that_goes_back_to_a_checkpoint_draws_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that ruins the weights from the fourth step on, and one of 0.01 after it."""
    monkeypatch.setattr(
        "sapo.run.loop.learning_rate_at", lambda step, peak, **_: min(peak, 0.001) if step < 3 else peak
    )
    run = train_free(
        tmp_path,
        train__learning_rate=1e30,
        train__warmup_steps=0,
        checkpoint__every=1,
        warnings={"on_collapse": "rollback", "rollback_learning_rate": 1e-32},
        train__steps=8,
    )
    [back] = of_kind(run, "rollback")
    after = [m for m in metrics(run)[metrics(run).index(back) :] if m["kind"] == "step"]
    assert [s["step"] for s in after] == list(range(back["to"] + 1, 9))
    assert all(s["rollout/staleness_max"] <= MINIBATCHES for s in after)


def test_a_run_learns(tmp_path: Path) -> None:
    """Reward is the share of sevens in eight places, of an untrained model; at 0.02 it learns within 25 steps."""
    run = train_free(
        tmp_path,
        train__steps=25,
        train__learning_rate=0.02,
        rollout__prompts_per_step=8,
        eval__every=0,
        checkpoint__every=0,
        log__rollouts_every=0,
    )
    rewards = [s["reward/mean"] for s in of_kind(run, "step")]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
