"""Loggers get the figures of metrics.jsonl, a resumed run goes on in the same run of theirs, and none changes a bit.

What was written is read back: TensorBoard's event files, wandb's offline file, trackio's store. No network is used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sapo.config.recipes import load_recipe, parse_recipe
from sapo.errors import ConfigError
from sapo.run.loggers.all import check_loggers, run_identity
from sapo.run.loggers.base import panel_name
from support.kernels import fresh_cache
from support.runs import fingerprint, metrics, write_recipe

EVERY = {"rollouts_every": 2, "samples_every": 2}
ALL = {"tensorboard": True, **EVERY, "wandb": {"mode": "offline"}, "trackio": {"project": "tests"}}


def run_cli(*arguments: str, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    places = {"TRACKIO_DIR": str(cwd / "trackio"), "HOME": str(cwd), "SAPO_CACHE": fresh_cache(cwd / "cache")}
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **places}
    result = subprocess.run(
        [sys.executable, "-m", "sapo.cli", *arguments],
        cwd=cwd,
        env={**clean, **own, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with every logger, stopped after four of them and resumed by another process."""
    for extra in ("wandb", "trackio"):
        pytest.importorskip(extra)
    directory = tmp_path_factory.mktemp("logged")
    recipe = write_recipe(directory, log=ALL, train__steps=4)
    run_cli("train", str(recipe), cwd=directory)
    run_cli("resume", str(directory / "run"), "train.steps=6", cwd=directory)
    return directory


def rewards(run: Path) -> dict[int, float]:
    """Step -> mean reward, by metrics.jsonl."""
    return {line["step"]: line["reward/mean"] for line in metrics(run) if line["kind"] == "step"}


def accuracies(run: Path) -> dict[int, float]:
    """Step -> held-out pass@1, by metrics.jsonl."""
    return {line["step"]: line["pass@1"] for line in metrics(run) if line["kind"] == "eval"}


def by_step(history: list[dict[str, float]], name: str) -> dict[float, float]:
    """Step -> a figure, from what a logger holds."""
    return {line["step"]: line[name] for line in history if name in line}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB that cut records) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # no header fits: the rest of the block is zeros
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        assert kind in (1, 2, 3, 4), f"no record at byte {at}"
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_history(file: Path) -> tuple[str, list[dict[str, float]]]:
    """The run's id, and what was logged."""
    identity, history = "", []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "run":
            identity = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            items = {("/".join(i.nested_key) or i.key): json.loads(i.value_json) for i in record.history.item}
            history.append(items)
    return identity, history


def test_wandb_offline_holds_the_figures_and_a_resumed_run_keeps_its_id(logged: Path) -> None:
    run = logged / "run"
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one for each process"
    found = [wandb_history(f) for f in files]
    assert {identity for identity, _ in found} == {run_identity(run)}
    history = [line for _, lines in found for line in lines]
    assert by_step(history, "train/reward/mean") == rewards(run)
    assert by_step(history, "eval/pass@1") == accuracies(run)


def test_trackio_holds_the_figures_of_one_run(logged: Path) -> None:
    database = logged / "trackio" / "tests.db"
    assert database.is_file(), sorted(p.name for p in (logged / "trackio").rglob("*"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{run_identity(logged / 'run')}"}
    history = [{"step": step, **json.loads(text)} for _, step, text in rows]
    assert by_step(history, "train/reward/mean") == rewards(logged / "run")
    assert by_step(history, "eval/pass@1") == accuracies(logged / "run")


def test_tensorboard_holds_the_figures(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged / "run" / "tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("train/reward/mean")}
    assert found == pytest.approx(rewards(logged / "run"), abs=1e-7)  # event files hold float32


def sampled(run: Path, step: int) -> set[tuple[str, float]]:
    """Text and reward of the completions of a step, by rollouts/."""
    lines = (run / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
    return {(line["text"], line["reward"]) for line in map(json.loads, lines)}


def test_every_logger_holds_two_completions_with_their_rewards(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logged / "run"
    tables = [json.loads(f.read_text()) for f in (run / "wandb").rglob("*.table.json")]
    by_wandb = {step: [row for t in tables for row in t["data"] if row[0] == step] for step in (2, 6)}
    with sqlite3.connect(logged / "trackio" / "tests.db") as connection:
        rows = [(step, json.loads(text)) for step, text in connection.execute("select step, metrics from metrics")]
    by_trackio = {step: line["samples"]["_value"] for step, line in rows if "samples" in line}
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    by_tensorboard = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")}
    for step in (2, 6):
        assert len(by_wandb[step]) == len(by_trackio[step]) == 2
        for table_row, line in zip(by_wandb[step], by_trackio[step], strict=True):
            assert (line["text"], line["reward"]) == (table_row[3], pytest.approx(table_row[4]))
            assert (line["text"], line["reward"]) in sampled(run, step)
            assert line["text"] in by_tensorboard[step]
            assert f"{line['reward']:.3f}" in by_tensorboard[step]


def test_logging_changes_no_bit_of_a_run(logged: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, log={"tensorboard": False, "rollouts_every": 2}, train__steps=4)
    run_cli("train", str(recipe), cwd=tmp_path)
    run_cli("resume", str(tmp_path / "run"), "train.steps=6", cwd=tmp_path)
    assert fingerprint(logged / "run", 6) == fingerprint(tmp_path / "run", 6)
    assert not (tmp_path / "run" / "loggers.json").exists()


def test_repeating_a_recipe_is_another_run_to_the_loggers(logged: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((logged / "run" / "config.yaml").read_text())
    assert run_identity(logged / "run") not in json.dumps(config)
    assert run_identity(tmp_path) != run_identity(logged / "run")
    assert run_identity(tmp_path) == run_identity(tmp_path)


@pytest.mark.parametrize("extra", ["wandb", "trackio"])
def test_a_missing_extra_is_named_before_anything_is_written(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sapo

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == extra else find(name))
    recipe = write_recipe(tmp_path, log={extra: {}})
    with pytest.raises(ConfigError, match=rf"pip install 'sapo-rl\[{extra}\]'"):
        sapo.train(load_recipe(recipe))
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_key_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = load_recipe(write_recipe(tmp_path, log={"wandb": {}}))
    with pytest.raises(ConfigError, match=r"log\.wandb\.mode=offline"):
        check_loggers(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(config)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_loggers(config)


def test_a_setting_wandb_does_not_have_is_refused(tmp_path: Path) -> None:
    settings = yaml.safe_load(write_recipe(tmp_path, log={"wandb": {"projct": "x"}}).read_text())
    with pytest.raises(ConfigError, match=r"unknown key log\.wandb\.projct"):
        parse_recipe(settings)


def test_each_task_has_a_panel_of_its_own() -> None:
    names = ["task/add4/reward/mean", "task/sub2/reward/mean", "train/reward/mean", "eval/add4/pass@1"]
    assert [panel_name(n) for n in names] == [
        "task_add4/reward/mean",
        "task_sub2/reward/mean",
        "train/reward/mean",
        "eval/add4/pass@1",
    ]
