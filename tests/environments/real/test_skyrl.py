"""The adapter against skyrl-gym 0.4 itself: an environment of its registry, and one of a user's on its base class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks import make_task
from sapo.tasks.episodes.pool import close_hosts
from support.asking import play
from support.real_cases import SECONDS, assert_each_costs_its_own_episode, needs_real, rows_task, train_a_step

pytestmark = needs_real

OWN = "skyrl:support.real_skyrl:Adding"


@pytest.fixture(scope="module", autouse=True)
def _without_hosts() -> Iterator[None]:
    yield
    close_hosts()


def task(environment: Any) -> Any:
    return make_task("same_prompt", seed=0, text="Reach 7.", environment=environment)


def test_an_environment_of_the_registry_is_played_as_it_would_be_by_hand() -> None:
    """The turns go to an environment that skyrl-gym itself has made, and to the adapter."""
    import skyrl_gym

    row = {"reward_spec": {"ground_truth": "7"}, "max_turns": 3}
    by_hand = skyrl_gym.make("gsm8k_multi_turn", env_config={}, extras=row)
    by_hand.init([{"role": "user", "content": "Reach 7."}])
    turns = ["six?", "#### 6", "#### 7"]
    stepped = [by_hand.step(turn) for turn in turns]
    prompt = Prompt(0, "same_prompt", "Reach 7.", answer="7", metadata={"max_turns": 3})
    score, shown = play(task("skyrl:gsm8k_multi_turn"), prompt, *turns)
    assert score.reward == sum(out["reward"] for out in stepped) > 1.0
    assert list(shown) == ["", *(out["observations"] for out in stepped[:-1])]
    assert stepped[-1]["done"]


def test_an_environment_of_ones_own_calls_its_tools_and_reads_its_settings() -> None:
    prompt = Prompt(0, "same_prompt", "Reach 7.", answer="7")
    score, shown = play(task(OWN), prompt, "add(k=4)", "#### 7")
    assert (score.reward, score.figures["steps"]) == (1.25, 2.0)
    assert list(shown) == ["", [{"role": "user", "content": "7"}]]
    short = task({"name": OWN, "env_config": {"max_turns": 1}})
    assert play(short, prompt, "add(k=4)")[0].figures["steps"] == 1.0


def test_one_that_is_registered_by_its_own_module_is_found_by_name() -> None:
    from skyrl_gym.envs import deregister, register

    register(id="adding_of_a_test", entry_point="support.real_skyrl:Adding")
    try:
        score, _ = play(task("skyrl:adding_of_a_test"), Prompt(0, "same_prompt", "?", answer="7"), "7")
    finally:
        deregister("adding_of_a_test")
    assert score.reward == 1.0
    with pytest.raises(TaskError, match=r"has the environments aime, gsm8k, .*got 'gsm9k'"):
        task("skyrl:gsm9k")


def test_a_step_is_trained_on_both(tmp_path: Path) -> None:
    named = {"registry": "skyrl:gsm8k_multi_turn", "own": OWN}
    tasks = [rows_task(tmp_path, label, {"max_turns": 3}, environment=spec) for label, spec in named.items()]
    trained = train_a_step(tmp_path, tasks)
    for label in named:
        mine = [row for row in trained if row["task"] == label]
        assert len(mine) == 8
        assert any(len(row["observations"]) > 0 for row in mine)
        assert len({row["reward"] for row in mine}) > 1


def test_a_failure_costs_its_own_episode_and_moves_no_other_by_a_bit() -> None:
    failures = {
        "nan": "a reward must be finite",
        "raises": "KeyError: 'board'",
        "hangs": f"no answer within {SECONDS:g} s",
        "crashes": "its worker process died (exit code 3)",
    }
    assert_each_costs_its_own_episode(task(OWN), {}, {k: ({"fault": k}, detail) for k, detail in failures.items()})
