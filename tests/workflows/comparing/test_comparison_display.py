"""What a person sees of a comparison: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.front.comparison_display import ComparisonDisplay
from sapo.workflows.comparing.comparison import find_slots
from sapo.workflows.comparing.outcomes import RunOutcome
from sapo.workflows.comparing.plan import ComparisonPlan
from sapo.workflows.comparing.processes import Event, RunSlots

BASE = {"model": {"path": "m"}, "tasks": [{"name": "arithmetic"}], "train": {"steps": 40}}


def told(console: Console, directory: Path) -> None:
    """Two runs: one ends well, one breaks."""
    arms = {"soft": {"objective.name": "sapo"}, "hard": {"objective.name": "grpo"}}
    plan = ComparisonPlan.of("mine", BASE, arms, learning_rates=[2e-4], seeds=[3])
    soft, hard = plan.runs(directory)
    with ComparisonDisplay(console, plan) as display:
        display.runs([RunOutcome.of(soft), RunOutcome.of(hard)], RunSlots(2))
        for run in (soft, hard):
            display.event(Event(run.name, "began"))
            display.event(Event(run.name, "eval", {"step": 0, "task": "add4", "value": 0.25, "binary": True}))
            display.event(Event(run.name, "eval", {"step": 0, "task": "other", "value": 0.9, "binary": True}))
            display.event(Event(run.name, "step", {"step": 7, "reward": 0.5}))
        display.event(Event(soft.name, "eval", {"step": 40, "task": "add4", "value": 0.75, "binary": True}))
        display.event(Event(soft.name, "finished"))
        display.event(Event(hard.name, "failed", {"reason": "step 8: [red]the loss[/red] is nan"}))


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    told(Console(file=out, width=100), tmp_path)
    first, well, broken = out.getvalue().splitlines()
    assert first == "2 runs of 40 steps, 2 at a time"
    assert well.startswith("soft-lr2e-4-seed3: pass@1 0.250 -> 0.750 (1 of 2, ")
    assert broken.startswith("hard-lr2e-4-seed3: failed: step 8: [red]the loss[/red] is nan (2 of 2, ")


def test_on_a_terminal_a_table_shows_every_run_as_it_is(tmp_path: Path) -> None:
    out = io.StringIO()
    told(Console(file=out, width=100, force_terminal=True, color_system=None), tmp_path)
    shown = out.getvalue()
    for text in ("seed 3", "0 of 2 runs", ".250 7/40", "waiting", "2 of 2 runs", ".750", ".250 failed"):
        assert text in shown, text
    assert ".900" not in shown, "the first task is shown"


def slots(threads: int, cores: int, monkeypatch: pytest.MonkeyPatch, **settings: object) -> RunSlots:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    return find_slots(RunConfig.model_validate({**BASE, "threads": threads, **settings}))


def test_as_many_runs_go_side_by_side_as_the_cores_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(1, 6, monkeypatch, device="cpu") == RunSlots(6)
    assert slots(4, 6, monkeypatch, device="cpu") == RunSlots(1)
    assert slots(8, 6, monkeypatch, device="cpu") == RunSlots(1)
    with pytest.raises(ConfigError, match="--jobs must be 1 or more; got 0"):
        find_slots(RunConfig.model_validate(BASE), 0)


def test_each_gpu_gets_a_run_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    by_default = find_slots(RunConfig.model_validate(BASE))
    assert by_default == RunSlots(2, ("0", "1"))
    assert [by_default.environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert find_slots(RunConfig.model_validate(BASE), 4) == RunSlots(4, ("5", "7"))
    assert find_slots(RunConfig.model_validate({**BASE, "device": "cuda:1"})) == RunSlots(1)
