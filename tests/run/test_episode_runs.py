"""Whole runs of environments: trained, evaluated and logged like any task, and resumed to the bit."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import sapo
from sapo.config.rollout import RolloutConfig, TurnsConfig
from sapo.data import Prompt, Score
from sapo.environments import Ask
from sapo.errors import ConfigError, Interrupted, RewardError
from sapo.rollout.episodes.turns import TurnDrawer
from sapo.run.preflight import _played_here, load_tasks
from sapo.tasks.episodes.origin import Origin, note_origin
from sapo.tasks.episodes.pool import close_hosts
from support.game import GAME
from support.runs import fingerprint, metrics, write_model


def recipe(directory: Path, **changes: Any) -> sapo.RunConfig:
    write_model(directory / "model")
    (directory / "game_of_a_test.py").write_text(GAME)
    written = {
        "run_dir": str(directory / "run"),
        "threads": 1,
        "model": {"path": str(directory / "model")},
        "tasks": [{"name": "game_of_a_test:Next"}],
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 20},
        "train": {"steps": 3, "minibatches": 2, "learning_rate": 1e-3},
        "eval": {"every": 2, "problems": 4, "samples": 2, "k": [1], "greedy": True},
        "checkpoint": {"every": 1, "keep": 9},
        "log": {"rollouts_every": 1},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(written))
    return sapo.load_recipe(
        directory / "recipe.yaml", [f"{k.replace('__', '.')}={json.dumps(v)}" for k, v in changes.items()]
    )


@pytest.fixture(autouse=True)
def _in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "game_of_a_test", raising=False)


def test_an_environment_of_ones_own_is_trained_evaluated_and_logged(tmp_path: Path) -> None:
    run = sapo.train(recipe(tmp_path)).directory
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    for step in steps:
        assert 1 <= step["turns/mean"] <= step["turns/max"] == 3
        assert step["turns/cut"] == step["environment/errors"] == 0
        assert step["tokens/observed"] > 0
        assert step["figure/sevens"] == pytest.approx(8 * step["reward/mean"])
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "step":
            timing = line["timing"]
            assert 0 < timing["environment/seconds_mean"] < 30
            assert 0 < timing["environment/seconds_p95"] < 30
            assert 0 < timing["wave/idle_share"] < 1
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert all(len(row["observations"]) == 2 for row in rows)
    assert all(len(row["token_ids"]) == len(row["logprobs"]) for row in rows)
    updates = [m for m in metrics(run) if m["kind"] == "update"]
    assert any(not u["skipped"] for u in updates)
    evaluations = [m for m in metrics(run) if m["kind"] == "eval"]
    assert [e["step"] for e in evaluations] == [0, 2, 3]
    assert all(e["problems"] == 4 for e in evaluations)


def test_a_run_that_is_stopped_in_an_episode_and_resumed_is_the_run_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while a second or third turn is drawn, at some of the first six such waves after each start."""
    whole = sapo.train(recipe(tmp_path, run_dir=str(tmp_path / "whole"))).directory
    config = recipe(tmp_path)
    draw = TurnDrawer.draw
    waves: list[int] = []
    stopped: list[tuple[int, int]] = []

    def counted(drawer: TurnDrawer, asking: list[Any]) -> None:
        turns = min(episode.turns for episode in asking)
        if turns:
            waves.append(turns)
        try:
            draw(drawer, asking)
        except Interrupted:
            stopped.append((len(waves), turns))
            raise

    monkeypatch.setattr(TurnDrawer, "draw", counted)
    places = random.Random(4).sample(range(1, 7), 3)
    for place in places:
        waves.clear()
        stop = lambda place=place: len(waves) >= place  # noqa: E731
        if (tmp_path / "run").exists():
            sapo.resume(tmp_path / "run", should_stop=stop)
        else:
            sapo.train(config, should_stop=stop)
    assert [place for place, _ in stopped] == places
    assert {turns for _, turns in stopped} <= {1, 2}
    sapo.resume(tmp_path / "run")
    assert fingerprint(tmp_path / "run", 3) == fingerprint(whole, 3)


def test_failed_episodes_are_warned_of_and_too_many_stop_the_run(tmp_path: Path) -> None:
    config = recipe(tmp_path, tasks__0__fails=3, rollout__turns__max_environment_errors=0.6)
    run = sapo.train(config).directory
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert steps[0]["environment/errors"] == steps[0]["status/environment_error"] > 0
    warnings = [m["text"] for m in metrics(run) if m["kind"] == "warning" and m["cause"] == "environment_failed"]
    assert len(warnings) == len(steps), "each step warns once, the first too"
    assert "ConnectionError: the board is gone (game_of_a_test.py:" in warnings[0]
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"scored", "environment_error"}
    for row in rows:
        failed = row["status"] == "environment_error"
        assert row.get("masked", False) == failed
        assert not (failed and "gate_weight" in row)
        assert not failed or row["advantage"] == 0.0
    with pytest.raises(RewardError, match=r"environments failed in 16 of 16 episodes, 16 times with ConnectionError"):
        sapo.train(recipe(tmp_path, tasks__0__fails=1, run_dir=str(tmp_path / "bad")))


def test_an_evaluation_whose_episodes_fail_is_warned_of_and_ends_no_run(tmp_path: Path) -> None:
    patient = {"metric": "pass@1", "patience": 1}
    config = recipe(tmp_path, eval__every=1, train__stop_when=patient, tasks__0__held_out_fails=True)
    run = sapo.train(config).directory
    evaluations = [m for m in metrics(run) if m["kind"] == "eval"]
    assert [e["step"] for e in evaluations] == [0, 1, 2, 3]
    for record in evaluations:
        assert "mean@2" not in record
        assert record["judged"] == [0, 0, 0, 0]
        assert record["status/environment_error"] == 8
    warned = [m for m in metrics(run) if m["kind"] == "warning" and m["cause"] == "environment_failed"]
    assert [m["step"] for m in warned] == [0, 1, 2, 3]
    assert all("12 of 12 completions" in m["text"] for m in warned)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3, "patience counts figures that were measured"


def test_a_run_that_failed_episodes_stopped_is_resumed_as_its_message_says(tmp_path: Path) -> None:
    with pytest.raises(RewardError) as stopped:
        sapo.train(recipe(tmp_path, tasks__0__fails=3, train__steps=1, eval__every=0))
    (key,) = re.findall(r"(rollout\.[a-z_.]+)=\.\.\.", str(stopped.value))
    late = "rollout.turns.seconds_per_reply=60"  # which the details of late replies name
    run = sapo.resume(tmp_path / "run", [f"{key}=0.6", late]).directory
    assert [m["step"] for m in metrics(run) if m["kind"] == "step"] == [1]


def test_a_mixture_of_single_turns_and_episodes_keeps_both(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    (tmp_path / "mixed.yaml").write_text(
        yaml.safe_dump(
            {
                **yaml.safe_load((tmp_path / "recipe.yaml").read_text()),
                "tasks": [{"name": "game_of_a_test:Next"}, {"name": "arithmetic", "digits": 1}],
            }
        )
    )
    assert config.tasks[0].name == "game_of_a_test:Next"
    run = sapo.train(sapo.load_recipe(tmp_path / "mixed.yaml", ["train.steps=1"])).directory
    (step,) = [m for m in metrics(run) if m["kind"] == "step"]
    assert step["task/next/turns/mean"] > 1
    assert "task/arithmetic_add_1/turns/mean" not in step
    assert not any(k.startswith("task/arithmetic") and k.endswith("turns/mean") for k in step)


class Slotted:
    __slots__ = ()
    name = "slotted"

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, "1+1")

    def held_out(self, count: int) -> list[Prompt]:
        return []

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        return Score(1.0)


def test_where_an_environment_of_ones_own_plays_is_said_where_it_can_only_play_here(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        tasks = load_tasks(config)
        assert _played_here(config, tasks) == [], "in processes of its own"
        (own,) = tasks.train
        del own.__dict__["_sapo_origin"]  # as one that was made in Python has none
        (line,) = _played_here(config, tasks)
        assert line.startswith("environment 'next' was made in Python and plays in the process that draws")
        note_origin(own, Origin("game_of_a_test:Next", 0, {"judge": lambda: None}))
        (line,) = _played_here(config, tasks)
        assert line.startswith("environment 'next' has options that cannot be sent to another process (")
        slotted = replace(tasks, train=[Slotted()])  # type: ignore[list-item]
        note_origin(slotted.train[0], Origin("test:Slotted", 0))
        (line,) = _played_here(config, slotted)
        assert line.startswith("environment 'slotted' is of a class with __slots__, which leave no place to note how")
        rollout = config.rollout.model_copy(update={"turns": TurnsConfig(play_in="driver")})
        here = config.model_copy(update={"rollout": rollout})
        assert _played_here(here, tasks) == [], "as the recipe would have it"
    finally:
        sys.path.remove(str(tmp_path))
        close_hosts()


def test_the_length_of_a_turn_must_fit_the_episode() -> None:
    with pytest.raises(ValueError, match=r"turns.tokens_per_turn must not exceed rollout.max_new_tokens"):
        RolloutConfig(max_new_tokens=8, turns={"tokens_per_turn": 9})


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "game_of_a_test.py").write_text(GAME.replace("async def play", "def play"))
    config = recipe(tmp_path)
    (tmp_path / "game_of_a_test.py").write_text(GAME.replace("async def play", "def play").replace("await ", ""))
    with pytest.raises(ConfigError, match="play of environment 'next' must be a coroutine"):
        sapo.train(config)


def test_a_small_form_of_tools_quickstart_learns_its_cold_start_and_trains_on_calls(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "tools_quickstart.yaml"
    small = {
        "run_dir": tmp_path / "run",
        "threads": 1,
        "device": "cpu",
        "model.coldstart.target": 0,
        "model.coldstart.max_updates": 80,
        "model.coldstart.eval_every": 80,
        "model.coldstart.eval_problems": 8,
        "model.coldstart.warmup_updates": 5,
        "model.coldstart.learning_rate": 5e-3,
        "model.coldstart.examples": 256,
        "model.coldstart.hidden_size": 32,
        "model.coldstart.layers": 1,
        "tasks.0.digits": 1,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 4,
        "train.steps": 2,
        "train.warmup_steps": 0,
        "eval.problems": 8,
        "log.rollouts_every": 1,
    }
    run = sapo.train(sapo.load_recipe(recipe, [f"{key}={value}" for key, value in small.items()])).directory
    steps = [m for m in metrics(run) if m["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["turns/max"] > 1 and step["tokens/observed"] > 0 for step in steps)
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    answers = [text for row in rows for _, _, text, _ in row["observations"]]
    assert any(text.rstrip(";").isdecimal() for text in answers)  # a call was carried out


def test_rewards_of_turns_and_a_judge_reach_the_update_and_the_rows(tmp_path: Path) -> None:
    """The third turn of the judge's game earns all there is; the longest episode of a group earns it."""
    config = recipe(tmp_path)
    judged = GAME + (
        "\n    async def judge(self, prompt, episodes):\n"
        "        sizes = [sum(len(t.token_ids) for t in e.turns) + e.sample / 100 for e in episodes]\n"
        "        earned = [float(size == max(sizes)) for size in sizes]\n"
        "        return [Score(r + 0.25, turn_rewards=(0.25, 0.0, r), figures=e.score.figures)\n"
        "                for r, e in zip(earned, episodes)]\n"
    )
    (tmp_path / "game_of_a_test.py").write_text(judged)
    run = sapo.train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})).directory
    rows = [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert [sum(row["reward"] == 1.25 for row in rows[i : i + 4]) for i in range(0, 16, 4)] == [1] * 4
    for row in rows:
        earned = row["reward"] - 0.25
        assert row["turn_rewards"] == [0.25, 0.0, earned]
        assert len(row["turn_advantages"]) == 3
        first, second, third = row["turn_advantages"]
        assert first == pytest.approx(row["advantage"])
        assert second == third < first, "what the first turn earned is not theirs"
        assert [who for who, _ in row["transcript"]] == ["policy", "environment"] * 2 + ["policy"]
        assert row["transcript"][-1][1].replace("<pad>", "").startswith(row["text"])
    other = recipe(tmp_path, objective__name="gspo", run_dir=str(tmp_path / "gspo"))
    (tmp_path / "game_of_a_test.py").write_text(judged)
    with pytest.raises(ConfigError, match="task 'next' gives a reward for each turn, which takes an objective with"):
        sapo.train(other)
