"""A profile: the seconds of phases and their parts, a Chrome trace of a step, and a run left as it was."""

from __future__ import annotations

import gzip
import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sapo
from sapo.cli.tables import seconds_table
from sapo.config.recipes import load_recipe
from sapo.errors import ConfigError
from sapo.utils.spans import SpanRecorder, span
from support.runs import write_recipe


@pytest.fixture
def run(monkeypatch):
    """Makes a small run in a directory of its own."""

    def train(directory: Path, *overrides: str) -> Path:
        directory.mkdir()
        monkeypatch.chdir(directory)  # where the recipe's reward is
        sapo.train(load_recipe(write_recipe(directory), [*overrides]))
        return directory / "run"

    return train


def records(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def test_a_span_within_a_span_is_a_part_of_it_and_counts_when_it_fails() -> None:
    seconds: dict[str, float] = {}
    recorder = SpanRecorder(lambda: seconds)
    with pytest.raises(KeyError), recorder.measure("update"), recorder.measure("head"):
        raise KeyError
    assert list(seconds) == ["update/head", "update"]
    assert 0 < seconds["update/head"] <= seconds["update"]
    with recorder.measure("update"):  # nothing is left of the path that the exception cut short
        pass
    assert set(seconds) == {"update/head", "update"}


def test_a_span_is_measured_only_while_someone_listens() -> None:
    seconds: dict[str, float] = {}
    recorder = SpanRecorder(lambda: seconds)
    with recorder.measure("generate"), span("decode"):
        pass
    assert set(seconds) == {"generate"}
    with recorder.listening(), recorder.measure("generate"), span("decode"):
        pass
    assert set(seconds) == {"generate", "generate/decode"}
    with recorder.measure("generate"), span("sample"):
        pass
    assert set(seconds) == {"generate", "generate/decode"}


def test_a_device_is_waited_for_before_the_clock_is_read() -> None:
    happened: list[str] = []

    @contextmanager
    def label(name: str):
        happened.append(name)
        yield

    recorder = SpanRecorder(dict, label, synchronize=lambda: happened.append("settled"))
    with recorder.measure("update"):
        happened.append("work")
    assert happened == ["settled", "update", "work", "settled"]


def test_a_profile_names_the_parts_of_the_phases_and_the_phases_add_up(run, tmp_path: Path) -> None:
    run_directory = run(tmp_path / "a", "profile=true")
    seconds = json.loads((run_directory / "summary.json").read_text())["seconds"]
    phases = {k: v for k, v in seconds.items() if "/" not in k and k != "total"}
    assert seconds["total"] == pytest.approx(sum(phases.values()))
    expected = {"generate/prefill", "generate/decode", "generate/sample", "update/forward", "update/head"}
    expected |= {"update/backward", "update/optimizer"}
    assert expected <= set(seconds)
    for phase in phases:
        parts = [v for k, v in seconds.items() if k.startswith(phase + "/") and k.count("/") == 1]
        assert sum(parts) <= seconds[phase]
    steps = [r["timing"] for r in records(run_directory) if r["kind"] == "step"]
    assert all("update/backward" in timing for timing in steps)


def test_the_trace_of_the_step_asked_for_holds_its_operators_under_our_names(run, tmp_path: Path) -> None:
    run_directory = run(tmp_path / "a", "profile.first_step=1", "profile.steps=1")
    assert [p.name for p in (run_directory / "profile").iterdir()] == ["step-000001.json.gz"]
    with gzip.open(run_directory / "profile" / "step-000001.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {e.get("name") for e in events}
    assert {"generate", "generate/decode", "update/backward"} <= names
    assert "aten::mm" in names or "aten::addmm" in names
    of = {e["name"]: e for e in events if e.get("name") in ("update", "update/backward") and e.get("ph") == "X"}
    outer, inner = of["update"], of["update/backward"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1


def test_a_profiled_run_is_the_same_run(run, tmp_path: Path) -> None:
    plain, profiled = run(tmp_path / "a"), run(tmp_path / "b", "profile=true")
    without_clock = [
        [{k: v for k, v in r.items() if k != "timing"} for r in records(directory)] for directory in (plain, profiled)
    ]
    assert without_clock[0] == without_clock[1]
    assert not (plain / "profile").exists()
    assert not any("/" in name for name in json.loads((plain / "summary.json").read_text())["seconds"])


def test_a_run_that_goes_on_can_be_profiled(run, tmp_path: Path) -> None:
    run_directory = run(tmp_path / "a", "train.steps=1")
    sapo.resume(run_directory, ["train.steps=2", "profile=true"])
    assert [p.name for p in (run_directory / "profile").iterdir()] == ["step-000002.json.gz"]
    assert "update/backward" in json.loads((run_directory / "summary.json").read_text())["seconds"]


def test_profile_is_on_off_or_a_section(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert load_recipe(recipe, ["profile=false"]).profile is None
    assert load_recipe(recipe, ["profile.steps=0"]).profile.steps == 0
    with pytest.raises(ConfigError, match=r"profile\.stesp.*steps"):
        load_recipe(recipe, ["profile.stesp=3"])


def test_the_table_shows_parts_under_their_phase_the_heaviest_first() -> None:
    out = io.StringIO()
    seconds = {"generate": 1.0, "update": 3.0, "update/head": 0.5, "update/backward": 2.0, "total": 4.0}
    Console(file=out, width=60).print(seconds_table(seconds))
    lines = [line.split() for line in out.getvalue().splitlines()[1:]]
    assert lines == [
        ["update", "3.00", "75.0%"],
        ["backward", "2.00", "50.0%"],
        ["head", "0.50", "12.5%"],
        ["generate", "1.00", "25.0%"],
    ]
