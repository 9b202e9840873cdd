"""Runs on several ranks, as people start them: with the run, by torchrun, stopped, killed and resumed.

What has to be equal bit for bit is compared with an uninterrupted run on as many ranks; what has to be equal to
rounding, with one process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from bench.processes import processes_of
from safetensors.torch import load_file

from sapo.config.recipes import load_recipe
from sapo.errors import RankError
from sapo.model.loading import load_policy
from sapo.run.machine import resolve_machine
from sapo.workflows import training_group
from support.processes import PATIENCE, Process, finish, kill_when, last_line, start
from support.runs import fingerprint, metrics, write_model, write_recipe

pytestmark = pytest.mark.scale

STEPS = 12
SEED = 20261129


def recipe_in(directory: Path, **changes: Any) -> Path:
    return write_recipe(
        directory,
        **{
            "train__steps": STEPS,
            "rollout__prompts_per_step": 4,
            "rollout__samples_per_prompt": 4,
            "rollout__max_new_tokens": 24,
            "eval__every": 4,
            "checkpoint__every": 3,
            "checkpoint__keep": 10,
            **changes,
        },
    )


def assert_gone(processes: list[psutil.Process], seconds: float = 60.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, f"left behind: {alive}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("whole")
    finish(start("train", str(recipe_in(directory)), "train.ranks=2", cwd=directory))
    return fingerprint(directory / "run", STEPS)


def assert_equal_to_rounding(got: Path, expected: Path, step: int) -> None:
    """The same lines with the same numbers, the same completions, weights that differ by rounding."""
    mine, theirs = metrics(got), metrics(expected)
    assert [line["kind"] for line in mine] == [line["kind"] for line in theirs]
    compared = 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "grad_norm", "reward/mean", "entropy", "gate/mean", "pass@1"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (b["kind"], b["step"], key)
                compared += 1
    assert compared > 3 * step
    for file in sorted((expected / "rollouts").iterdir()):
        assert completions(got / "rollouts" / file.name) == completions(file), file.name
    mine_weights, their_weights = weights(got, step), weights(expected, step)
    assert mine_weights.keys() == their_weights.keys()
    for key, weight in their_weights.items():
        assert (mine_weights[key] - weight).abs().max() < 1e-4, key


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, or those of its adapter."""
    (file,) = (run / "checkpoints" / f"step-{step:06d}").glob("*model.safetensors")
    return load_file(file)


def completions(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective__name": "gspo", "objective__kl": {"coefficient": 0.05}, "diagnostics__true_gradient_every": 2},
        {"model__lora": {"rank": 2, "alpha": 4}, "objective__kl": {"coefficient": 0.05}},
        {"rollout__staleness": 1, "train__activation_checkpointing": True},
    ],
    ids=["dense", "gspo, kl, true gradients", "lora, kl", "stale, activation checkpointing"],
)
def test_two_ranks_reach_the_metrics_of_one_process(changes: dict[str, Any], tmp_path: Path) -> None:
    file = str(recipe_in(tmp_path, **changes))
    one = start("train", file, "run_dir=one", cwd=tmp_path)
    finish(one)
    finish(start("train", file, "run_dir=two", "train.ranks=2", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "two", tmp_path / "one", STEPS)


def test_ranks_that_share_each_micro_batch_reach_the_metrics_of_one_process(tmp_path: Path) -> None:
    file = str(recipe_in(tmp_path, objective__name="gspo"))
    finish(start("train", file, "run_dir=one", cwd=tmp_path))
    finish(start("train", file, "run_dir=two", "train.ranks=2", "train.context_parallel=2", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "two", tmp_path / "one", STEPS)


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_a_mixture_of_experts_replays_its_routing_on_two_ranks(replay: str, tmp_path: Path) -> None:
    file = recipe_in(tmp_path, model__routing_replay=replay)
    write_model(tmp_path / "model", "qwen3_moe")
    finish(start("train", str(file), "run_dir=one", cwd=tmp_path))
    finish(start("train", str(file), "run_dir=two", "train.ranks=2", cwd=tmp_path))
    assert_equal_to_rounding(tmp_path / "two", tmp_path / "one", STEPS)


def test_torchrun_is_the_same_run_to_the_bit(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    file = str(recipe_in(tmp_path))
    finish(start("train", file, cwd=tmp_path, torchrun=2))
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    file = str(recipe_in(tmp_path))
    finish(start("train", file, "run_dir=one", cwd=tmp_path))
    finish(start("train", file, "run_dir=several", "train.ranks=2", "train.steps=4", cwd=tmp_path))
    finish(start("resume", "several", "train.ranks=1", "train.steps=8", cwd=tmp_path))
    finish(start("resume", "several", "train.ranks=2", f"train.steps={STEPS}", cwd=tmp_path))
    lines = [line for line in metrics(tmp_path / "several") if line["kind"] == "step"]
    expected = [line for line in metrics(tmp_path / "one") if line["kind"] == "step"]
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for mine, theirs in zip(lines, expected, strict=True):
        assert mine["reward/mean"] == theirs["reward/mean"], theirs["step"]
    mine_weights, their_weights = weights(tmp_path / "several", STEPS), weights(tmp_path / "one", STEPS)
    for key, weight in their_weights.items():
        assert (mine_weights[key] - weight).abs().max() < 1e-4, key


def moments(run: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Seeded moments of a run: before its first line, at a step, and some time after one."""
    generator = random.Random(SEED)
    yield "at the start", lambda: (run / "ranks" / "01.log").exists()
    for _ in range(3):
        step, delay = generator.randrange(1, STEPS), generator.uniform(0.0, 0.15)
        since: list[float] = []

        def moment(step: int = step, delay: float = delay, since: list[float] = since) -> bool:
            if not since and last_line(run).get("step", 0) >= step:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > delay

        yield f"{delay:.3f} s after step {step}", moment


def kill_a_rank(driver: Process, moment: Callable[[], bool]) -> tuple[bool, list[psutil.Process], str]:
    """Kill a rank at a moment; return whether there was one to kill, all ranks seen, and what the driver printed."""
    deadline = time.monotonic() + PATIENCE
    ranks: list[psutil.Process] = []
    while driver.poll() is None and not (moment() and ranks) and time.monotonic() < deadline:
        ranks = ranks or processes_of(driver.pid)
        time.sleep(0.001)
    killed = driver.poll() is None and bool(ranks)
    if killed:
        ranks[0].kill()
    output, _ = driver.communicate(timeout=PATIENCE)
    return killed, ranks, output


@pytest.mark.parametrize("number", range(4))
def test_a_run_survives_the_death_of_a_rank(number: int, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    run = tmp_path / "run"
    when, moment = list(moments(run))[number]
    driver = start("train", str(recipe_in(tmp_path)), "train.ranks=2", cwd=tmp_path)
    killed, ranks, output = kill_a_rank(driver, moment)
    assert_gone(ranks)
    assert driver.returncode == 0, output
    assert "Traceback" not in output, output
    assert ("was ended by SIGKILL" in " ".join(output.split())) == killed, when
    assert fingerprint(run, STEPS) == uninterrupted, when


def test_a_rank_that_dies_while_it_is_set_up_is_named_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, train__ranks=2)
    config = training_group.resolve_ranks(resolve_machine(load_recipe(recipe)))
    (tmp_path / "run").mkdir()
    seen: list[psutil.Process] = []

    def dies(*_: Any) -> None:
        seen.extend(processes_of(os.getpid()))
        seen[0].kill()
        raise RuntimeError("Connection closed by peer")  # what gloo says

    monkeypatch.setattr(training_group, "_make_rank", dies)
    with pytest.raises(RankError, match=r"rank 1 \(process \d+\) was ended by SIGKILL"):
        training_group.start_trainers(config, tmp_path / "run", load_policy(tmp_path / "model"), None)
    assert_gone(seen)
    assert not dist.is_initialized(), "the ranks can be started again"


def test_a_run_that_may_not_restart_its_ranks_says_who_died_and_can_be_resumed(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    file = str(recipe_in(tmp_path, train__max_restarts=0))
    driver = start("train", file, "train.ranks=2", cwd=tmp_path)
    killed, ranks, output = kill_a_rank(driver, lambda: last_line(run).get("step", 0) >= 5)
    assert killed
    assert_gone(ranks)
    assert driver.returncode == 1
    assert "Traceback" not in output, output
    said = " ".join(output.split())
    assert f"rank 1 (process {ranks[0].pid}) was ended by SIGKILL" in said
    assert f"`sapo resume {run}` goes on from the newest checkpoint" in said
    assert json.loads((run / "failure.json").read_text())["reason"].startswith("rank 1")
    finish(start("resume", "run", cwd=tmp_path))
    assert fingerprint(run, STEPS) == uninterrupted


@pytest.mark.parametrize("number", range(4))
def test_the_driver_is_killed(number: int, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    run = tmp_path / "run"
    when, moment = list(moments(run))[number]
    driver = start("train", str(recipe_in(tmp_path)), "train.ranks=2", cwd=tmp_path)
    seen: list[psutil.Process] = []

    def watched() -> bool:
        if not seen:
            seen.extend(processes_of(driver.pid))
        return moment()

    killed = kill_when(driver, watched)
    assert_gone(seen)
    if killed:
        finish(start("resume", "run", cwd=tmp_path))
    assert fingerprint(run, STEPS) == uninterrupted, when


def test_a_signal_stops_all_ranks_at_a_safe_point(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    driver = start("train", str(recipe_in(tmp_path)), "train.ranks=2", cwd=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while last_line(tmp_path / "run").get("step", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks = processes_of(driver.pid)
    driver.send_signal(signal.SIGINT)
    output = finish(driver, code=128 + signal.SIGINT)
    assert "next: sapo resume" in output
    assert_gone(ranks)
    finish(start("resume", "run", cwd=tmp_path))
    assert fingerprint(tmp_path / "run", STEPS) == uninterrupted


def test_a_run_whose_reward_fails_leaves_no_process(tmp_path: Path) -> None:
    file = recipe_in(tmp_path, rollout__engine="engine_of_a_test:Broken")
    (tmp_path / "engine_of_a_test.py").write_text(
        "from sapo.rollout.local.engine import LocalEngine\n\n\nclass Broken(LocalEngine):\n"
        "    def generate(self, *args, **options):\n        raise ZeroDivisionError('a fault of the engine')\n"
    )
    driver = start("train", str(file), "train.ranks=2", cwd=tmp_path)
    seen: list[psutil.Process] = []
    while driver.poll() is None:
        seen = seen or processes_of(driver.pid)
        time.sleep(0.01)
    output, _ = driver.communicate()
    assert driver.returncode == 1
    assert "ZeroDivisionError: a fault of the engine" in output
    assert seen, "no rank was started"
    assert_gone(seen)


REFUSED = [
    (["train.ranks=0"], None, "train.ranks"),
    (["train.ranks=3", "train.replicas=2"], None, "ranks must be a multiple of replicas; got 3 and 2"),
    (["train.ranks=2", "train.optimizer=adamw_8bit"], None, "train.optimizer=adamw_8bit needs train.ranks=1"),
    (["train.ranks=2", "train.context_parallel=3"], None, "ranks must be a multiple of context_parallel; got 2 and 3"),
    (["train.context_parallel=2"], None, "train.context_parallel must divide the number of ranks; got 2 and 1"),
    (
        ["train.ranks=4", "train.context_parallel=4"],
        None,
        "2 attention heads with 1 of keys and values cannot be shared",
    ),
    (
        ["train.ranks=2", "train.context_parallel=2", "model.routing_replay=true"],
        None,
        "train.context_parallel=2 cannot go with model.routing_replay",
    ),
    (["train.ranks=3"], 2, "train.ranks must be the number of processes that torchrun starts; got 3 and 2"),
    (["train.replicas=3", "train.ranks=3"], 2, "train.ranks must be the number of processes that torchrun starts"),
]


@pytest.mark.parametrize(("overrides", "torchrun", "words"), REFUSED)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    overrides: list[str], torchrun: int | None, words: str, tmp_path: Path
) -> None:
    process = start("train", str(recipe_in(tmp_path)), *overrides, cwd=tmp_path, torchrun=torchrun)
    output, _ = process.communicate(timeout=PATIENCE)
    lines = [line for line in output.splitlines() if line.startswith("sapo: ")]
    assert len(lines) == 1, output
    assert words in lines[0]
    if torchrun is None:
        assert process.returncode == 2
        assert output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


def test_other_commands_refuse_torchrun(tmp_path: Path) -> None:
    process = start("eval", "nowhere", cwd=tmp_path, torchrun=2)
    output, _ = process.communicate(timeout=PATIENCE)
    assert output.count("sapo: torchrun starts several processes for `sapo train` and `sapo resume` only") == 1, output


def test_the_recipe_of_a_run_names_its_ranks(tmp_path: Path) -> None:
    finish(start("train", str(recipe_in(tmp_path)), "train.steps=1", cwd=tmp_path, torchrun=2))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["train"]["ranks"] == 2
    assert sorted(os.listdir(tmp_path / "run" / "ranks")) == ["00.json", "01.json"], "torchrun has the logs"
