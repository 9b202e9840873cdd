"""Tasksets of verifiers, with a stand-in for the package: what is drawn is exact, and each fault costs its episode."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sapo
from sapo.config import PromptConfig
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Group, Prompt, Status
from sapo.environments.verifiers.environment import VerifiersEnvironment, close_theatres
from sapo.errors import TaskError
from sapo.model.policy import Policy
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import make_task
from sapo.tasks.base import FiniteTask
from support.runs import metrics, write_recipe
from support.trainer_cases import make_trainer
from support.verifiers_cases import chat_policy

FAKE = Path(__file__).parents[1] / "support" / "fake_verifiers"
NAMES = ("good", "rewritten", "raises", "nan", "text", "hangs", "blocks", "crashes", "prints", "two_traces", "others")


def taskset(name: str = "boards", **options: Any) -> VerifiersEnvironment:
    given = {"name": f"verifiers:{name}", "python": sys.executable, "path": str(FAKE), "held_out": 0, **options}
    task = make_task("same_prompt", seed=0, text="=", environment=given)
    assert isinstance(task, VerifiersEnvironment)
    return task


@pytest.fixture(scope="module")
def policy() -> Policy:
    return chat_policy(hidden=16)


@pytest.fixture(scope="module")
def task() -> Iterator[VerifiersEnvironment]:
    yield taskset()
    close_theatres()


def play(
    task: VerifiersEnvironment, policy: Policy, names: tuple[str, ...], samples: int = 2, seconds: float = 30.0
) -> dict[str, tuple[Prompt, tuple[Completion, ...]]]:
    form = PromptFormat.of(PromptConfig(), task)
    prompts = form.encode(policy, sorted((task.train_prompt(i) for i in range(len(NAMES))), key=lambda p: p.id))
    chosen = [p for p in prompts if NAMES[p.metadata["task"]] in names]
    params = SamplingParams(max_new_tokens=24, seed=3, stop_token_ids=policy.stop_token_ids)
    driver = EpisodeDriver(policy, LocalEngine(policy), params, TurnsConfig(seconds_per_reply=seconds))
    played = driver.play([Play(task, prompt, samples) for prompt in chosen])
    return {NAMES[p.metadata["task"]]: (p, c) for p, c in zip(chosen, played, strict=True)}


@pytest.fixture(scope="module")
def played(task: VerifiersEnvironment, policy: Policy) -> dict[str, tuple[Prompt, tuple[Completion, ...]]]:
    return play(task, policy, NAMES, seconds=4.0)


def test_episodes_come_back_as_prompt_own_ids_and_observations(played: Any) -> None:
    prompt, completions = played["good"]
    assert prompt.token_ids == (0, 14)
    for completion in completions:
        assert (completion.score.status, completion.score.reward) == (Status.SCORED, 1.0)
        assert completion.score.figures == {"metric/turns": 2.0, "branches": 1.0}
        (said,) = completion.observations
        assert (said.token_ids, said.keep) == ((15,), None)
        assert completion.turns == ((0, said.at), (said.at, len(completion)))


def test_a_rewritten_history_is_a_branch(played: Any) -> None:
    _, completions = played["rewritten"]
    for completion in completions:
        (said,) = completion.observations
        assert (said.token_ids, said.keep) == ((13, 15), 1)


def test_what_was_drawn_is_what_the_trainer_computes(played: Any, policy: Policy) -> None:
    groups = [Group(p, c, (0.5, -0.5)) for name in ("good", "rewritten") for p, c in [played[name]]]
    trainer = make_trainer(policy=policy)
    for group, of_group in zip(groups, trainer.groups.compute(groups), strict=True):
        for completion, logprobs in zip(group.completions, of_group, strict=True):
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("raises", "verifiers: RuntimeError: board gone, after turn 1"),
        ("nan", "a reward must be finite; got nan"),
        ("text", "a reward must be"),
        ("hangs", "no answer within 4 s"),
        ("blocks", "no answer within 4 s"),
        ("crashes", "verifiers: the process of the episode was ended by SIGABRT, after turn 1"),
        ("two_traces", "the episode has 2 traces"),
        ("others", "HTTP Error 400"),
    ],
)
def test_a_fault_is_the_environments(played: Any, name: str, detail: str) -> None:
    _, completions = played[name]
    for completion in completions:
        assert completion.score.status is Status.ENVIRONMENT_ERROR
        assert detail in completion.score.detail
        assert len(completion) > 0


def test_a_fault_moves_no_other_episode(task: VerifiersEnvironment, policy: Policy, played: Any) -> None:
    alone = play(task, policy, ("good", "rewritten", "prints"))
    for name, (_, completions) in alone.items():
        for mine, other in zip(completions, played[name][1], strict=True):
            assert mine.token_ids.tolist() == other.token_ids.tolist()
            assert mine.score == other.score
    assert alone["good"][1][0] != alone["good"][1][1]  # samples have noise of their own


def test_a_worker_that_died_is_started_again(task: VerifiersEnvironment, policy: Policy, played: Any) -> None:
    process = task._theatre._process._process
    assert process is not None
    process.kill()
    process.wait()
    again = play(task, policy, ("good",))
    assert [c.token_ids.tolist() for c in again["good"][1]] == [c.token_ids.tolist() for c in played["good"][1]]


def test_nothing_is_left_of_episodes_that_hang(task: VerifiersEnvironment, policy: Policy, played: Any) -> None:
    process = task._theatre._process._process
    assert process is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 20
    while children.exists() and children.read_text().split():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_prompts_are_the_tasks_in_an_order_of_each_epoch(task: VerifiersEnvironment) -> None:
    assert isinstance(task, FiniteTask)
    assert task.num_train == len(NAMES)
    epochs = [[task.train_row(11 * e + i) for i in range(11)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]
    assert task.held_out(5) == []
    assert task.train_prompt(4) == task.train_prompt(4)
    other = taskset(held_out=3, tasks=5)
    assert (other.num_train, [p.metadata["task"] for p in other.held_out(9)]) == (2, [2, 3, 4])
    assert taskset()._theatre is task._theatre  # one worker for both sides of a run


def test_secrets_of_the_run_stay_with_it(task: VerifiersEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    environment = task._theatre._process._environment()
    assert "OPENAI_API_KEY" not in environment
    assert environment["PYTHONPATH"] == os.fspath(FAKE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"python": None}, "needs the interpreter"),
        ({"python": "/no/such/python"}, "python must be the interpreter"),
        ({"name": "broken"}, "ValueError: no such board"),
        ({"path": ""}, "No module named 'verifiers'"),
        ({"held_out": 11}, "held_out must leave tasks"),
        ({"tasks": 0}, "tasks must be a whole number"),
        ({"options": {"f": print}}, "must be what JSON can hold"),
        ({"pyhton": "x"}, "does not take the options"),
    ],
)
def test_a_wrong_setting_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        taskset(**options)


def test_prompts_of_another_task_are_refused() -> None:
    with pytest.raises(TaskError, match="brings its own prompts"):
        make_task("arithmetic", seed=0, environment={"name": "verifiers:x", "python": "p"})


def test_a_renderer_that_ends_turns_elsewhere_is_refused(policy: Policy) -> None:
    other = taskset(renderer="of_another")
    with pytest.raises(TaskError, match=r"ends turns at the tokens \[5\]"):
        play(other, policy, ("good",))


def test_the_reward_of_an_episode_is_finite(played: Any) -> None:
    assert all(math.isfinite(c.score.reward) for _, completions in played.values() for c in completions)


def test_a_run_trains_and_evaluates(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    chat_policy(hidden=16).save(tmp_path / "model")
    given = {"name": "verifiers:boards", "python": sys.executable, "path": str(FAKE), "held_out": 1}
    given["options"] = {"modes": ["good", "rewritten", "raises", "good"]}
    section = {"name": "same_prompt", "text": "=", "label": "boards", "environment": given}
    recipe = write_recipe(
        tmp_path,
        model={"path": str(tmp_path / "model")},
        tasks=[section],
        train__steps=2,
        train__minibatches=1,
        rollout__prompts_per_step=3,
        rollout__samples_per_prompt=2,
        rollout__max_new_tokens=24,
        rollout__turns={"max_environment_errors": 0.5},
        eval__problems=1,
    )
    sapo.train(sapo.load_recipe(recipe))
    rows = metrics(tmp_path / "run")
    assert [row["environment/errors"] for row in rows if "environment/errors" in row] == [
        2,
        2,
    ]  # both samples of one prompt of three
    close_theatres()
