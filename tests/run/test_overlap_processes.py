"""An engine in a process of its own, killed at seeded moments, and its driver killed: the run of lockstep, bit for bit.

Metrics (but for the clock), weights, optimizer state and completions are compared. The driver is the test's own process
where nobody kills it, since each process pays for the imports of torch and transformers.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import sapo
from sapo.errors import ConfigError, EngineError
from sapo.workflows.train import resume
from support.engine_processes import Killer, after_step, assert_gone, engines, enter, noting_engines
from support.processes import kill_when, start
from support.runs import fingerprint, write_model, write_recipe

pytestmark = pytest.mark.scale

STEPS = 12
SEED = 20261130


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def recipe_in(directory: Path, where: str = "process", **changes: Any) -> Path:
    return write_recipe(
        directory,
        **{
            "train__steps": STEPS,
            "rollout__max_new_tokens": 24,
            "rollout__run_in": where,
            "rollout__staleness": 3,
            "eval__every": 4,
            "checkpoint__every": 3,
            "checkpoint__keep": 10,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def lockstep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("lockstep")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        sapo.train(sapo.load_recipe(recipe_in(directory, "driver")))
    return fingerprint(directory / "run", STEPS)


CASES: dict[str, dict[str, Any]] = {
    "no staleness": {"rollout__staleness": 0},
    "one update": {"rollout__staleness": 1},
    "adapter, penalty, stop strings": {
        "model__lora": {"rank": 2, "alpha": 4},
        "objective__kl": {"coefficient": 0.05},
        "prompt": {"stop": ["77", "5"]},
    },
    "mixture of experts, routing replay": {"model__routing_replay": "R3"},
}


@pytest.mark.parametrize("case", CASES)
def test_an_engine_in_another_process_draws_the_run_of_lockstep(case: str, tmp_path: Path) -> None:
    file = recipe_in(tmp_path, **{"train__steps": 6, **CASES[case]})
    if "routing" in case:
        write_model(tmp_path / "model", "qwen3_moe")
    for name, where in (("here", "driver"), ("there", "process")):
        sapo.train(sapo.load_recipe(file, [f"run_dir={tmp_path / name}", f"rollout.run_in={where}"]))
    assert fingerprint(tmp_path / "there", 6) == fingerprint(tmp_path / "here", 6)
    assert (tmp_path / "there" / "engines" / "00.log").is_file()
    assert not engines(os.getpid())


def test_a_run_survives_the_deaths_of_its_engine(tmp_path: Path, lockstep: dict[str, Any]) -> None:
    """Ten seeded moments; two of them may fall before the engine is back from the last, and count once."""
    generator = random.Random(SEED)
    moments = {u: generator.choice((0.0, 0.02, 0.1)) for u in generator.sample(range(1, 2 * STEPS - 2), 10)}
    killer = Killer(moments)
    sapo.train(sapo.load_recipe(recipe_in(tmp_path, train__max_restarts=20)), listener=killer)
    for timer in killer.timers:
        timer.join()
    assert killer.killed >= 5, "too few engines were killed to show anything"
    restarts = [text for text in killer.warnings if "was ended by SIGKILL" in text]
    assert len(restarts) >= 5
    assert "it is started again (5 of at most 20 times)" in restarts[4]
    assert fingerprint(tmp_path / "run", STEPS) == lockstep
    assert not engines(os.getpid())


def test_an_engine_that_may_not_be_restarted_is_named_and_the_run_resumes(
    tmp_path: Path, lockstep: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(EngineError, match=r"engine 0 \(process \d+\) was ended by SIGKILL.*`sapo resume .* goes on"):
        sapo.train(sapo.load_recipe(recipe_in(tmp_path, train__max_restarts=0)), listener=Killer({9: 0.0}))
    assert json.loads((run / "failure.json").read_text())["reason"].startswith("engine 0")
    assert not engines(os.getpid())
    resume(run, ["rollout.run_in=thread"])
    assert fingerprint(run, STEPS) == lockstep


@pytest.mark.parametrize("where", ["thread", "process"])
def test_the_driver_is_killed_and_no_engine_is_left(where: str, tmp_path: Path, lockstep: dict[str, Any]) -> None:
    generator = random.Random(SEED)
    run = tmp_path / "run"
    driver = start("train", str(recipe_in(tmp_path, where)), cwd=tmp_path)
    moment, seen = after_step(run, generator.randrange(3, STEPS - 4), generator.uniform(0.0, 0.05)), []
    if where == "process":
        moment = noting_engines(driver.pid, seen, moment)
    assert kill_when(driver, moment), "the run ended before it could be killed"
    assert bool(seen) == (where == "process")
    assert_gone(seen)
    resume(run, ["rollout.run_in=thread"])
    assert fingerprint(run, STEPS) == lockstep


def test_a_stop_leaves_a_state_that_goes_on_to_the_bit(tmp_path: Path, lockstep: dict[str, Any]) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"

    def in_the_middle() -> bool:
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= 6

    stopped = sapo.train(sapo.load_recipe(recipe_in(tmp_path)), should_stop=in_the_middle)
    assert stopped.stopped is not None
    assert not engines(os.getpid())
    resume(tmp_path / "run")
    assert fingerprint(tmp_path / "run", STEPS) == lockstep


ENGINES = """
import os, time
from sapo.errors import ConfigError
from sapo.rollout.local.engine import LocalEngine


class Broken(LocalEngine):
    def generate(self, *args, **options):
        raise ZeroDivisionError("a fault of the engine")


class Picky(LocalEngine):
    def __init__(self, *args, **options):
        raise ConfigError("this engine takes no such model; use another")


class Slow(LocalEngine):
    def generate(self, *args, **options):
        if not os.path.exists("was_slow"):
            open("was_slow", "w").close()
            time.sleep(600)
        return super().generate(*args, **options)


class Leaving(LocalEngine):
    def __init__(self, *args, **options):
        print("I am leaving", flush=True)
        os._exit(3)
"""


def with_engine(directory: Path, name: str, *overrides: str) -> sapo.RunConfig:
    (directory / "engines_of_a_test.py").write_text(ENGINES)
    settings = [f"rollout.engine=engines_of_a_test:{name}", "train.steps=2", *overrides]
    return sapo.load_recipe(recipe_in(directory), settings)


def test_a_fault_of_the_engine_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError: a fault of the engine.*engines_of_a_test\.py"):
        sapo.train(with_engine(tmp_path, "Broken"))
    assert not engines(os.getpid())


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("Picky", ConfigError, "^this engine takes no such model; use another$"),
        ("Leaving", EngineError, r"engine 0 .* ended with code 3; .*: I am leaving; nothing was begun: .* again$"),
    ],
)
def test_an_engine_that_does_not_start_is_one_line_and_nothing_is_written(
    name: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as raised:
        sapo.train(with_engine(tmp_path, name))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    assert not engines(os.getpid())


def test_an_engine_that_does_not_answer_is_ended_and_started_again(tmp_path: Path) -> None:
    killer = Killer({})
    sapo.train(with_engine(tmp_path, "Slow", "rollout.timeout=20"), listener=killer)
    assert [w.partition(" did not")[2] for w in killer.warnings] == [
        " answer to 'generate' within 20 s; it is started again (1 of at most 3 times)"
    ]
