"""The adapter against verifiers 0.4.0 itself, in its own environment; run by `make test-verifiers`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sapo.config import PromptConfig
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Group, Prompt, Status
from sapo.environments.verifiers.environment import VerifiersEnvironment, close_theatres
from sapo.model.policy import Policy
from sapo.objectives import group_advantages
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.tasks import make_task
from support.trainer_cases import make_trainer
from support.verifiers_cases import chat_policy

pytestmark = pytest.mark.verifiers

PYTHON = os.environ.get("SAPO_VERIFIERS_PYTHON", str(Path(__file__).parents[3] / ".venv-verifiers" / "bin" / "python"))
TASKSETS = Path(__file__).parent / "tasksets"


def taskset(name: str, **options: Any) -> VerifiersEnvironment:
    given = {"name": f"verifiers:{name}", "python": PYTHON, "path": str(TASKSETS), "renderer": "default", **options}
    task = make_task("same_prompt", seed=0, text="=", environment=given)
    assert isinstance(task, VerifiersEnvironment)
    return task


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    close_theatres()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return chat_policy(hidden=64)


def play(
    task: VerifiersEnvironment, policy: Policy, prompts: int, samples: int, seconds: float, seed: int = 3
) -> list[tuple[Prompt, tuple[Completion, ...]]]:
    form = PromptFormat.of(PromptConfig(), task)
    encoded = form.encode(policy, [task.train_prompt(i) for i in range(prompts)])
    params = SamplingParams(max_new_tokens=20, seed=seed, stop_token_ids=policy.stop_token_ids)
    turns = TurnsConfig(seconds_per_reply=seconds, tokens_per_turn=6)
    driver = EpisodeDriver(policy, LocalEngine(policy), params, turns)
    return list(zip(encoded, driver.play([Play(task, p, samples) for p in encoded]), strict=True))


def test_a_training_step_of_four_tasks_by_eight_episodes(policy: Policy) -> None:
    task = taskset("sevens", held_out=2)
    assert task.num_train == 4
    trainer = make_trainer(policy, max_new_tokens=20)
    gaps, ratios = [], []
    for step in range(2):  # the second is drawn from the weights that the first has made
        played = play(task, policy, 4, 8, seconds=120, seed=step)
        episodes = [c for _, completions in played for c in completions]
        assert len(episodes) == 32
        assert all(not c.score.status.failed for c in episodes), [c.score.detail for c in episodes]
        assert any(c.score.reward > 0 for c in episodes)
        assert any(len(c.turns) == 2 for c in episodes)
        groups = []
        for prompt, completions in played:
            rewards = torch.tensor([c.score.reward for c in completions], dtype=torch.float64)
            groups.append(Group(prompt, completions, tuple(group_advantages(rewards).tolist())))
        for group, computed in zip(groups, trainer.groups.compute(groups), strict=True):
            for completion, logprobs in zip(group.completions, computed, strict=True):
                gaps.append(float(np.abs(completion.logprobs - logprobs).max()))
        update = trainer.update(trainer.pack(groups), 1e-3)
        assert not update.skipped
        assert np.isfinite(update.loss)
        ratios.append(float(update.log_ratio_M.abs().max()))
        branches = sum(o.keep is not None for c in episodes for o in c.observations)
        print(f"step {step}: reward {np.mean([c.score.reward for c in episodes]):.3f}, {branches} branches, "
              f"|engine - trainer| {max(gaps):.1e}, |log r| {ratios[-1]:.1e}", file=sys.stderr)  # fmt: skip
    assert max(gaps) < 1e-5
    assert max(ratios) < 1e-5


def test_each_fault_costs_its_episode_alone(policy: Policy) -> None:
    task = taskset("faulty", held_out=1)
    played = play(task, policy, 8, 1, seconds=20)
    modes = ("good", "raises", "reward_raises", "nan", "hangs", "blocks", "crashes", "prints")
    found = {modes[p.metadata["task"]]: c.score for p, (c,) in played}
    good = {"good", "prints"}
    assert {m for m, score in found.items() if not score.status.failed} == good
    assert all(score.status is Status.ENVIRONMENT_ERROR for m, score in found.items() if m not in good)
    words = {"raises": "board gone", "reward_raises": "judge down", "nan": "must be finite; got nan"}
    words |= {"hangs": "no answer within", "blocks": "no answer within", "crashes": "SIGABRT"}
    for mode, word in words.items():
        assert word in found[mode].detail, found[mode].detail
    again = dict(zip(modes, [None] * 8, strict=True)) | {
        modes[p.metadata["task"]]: c for p, (c,) in play(task, policy, 8, 1, seconds=20)
    }
    first = {modes[p.metadata["task"]]: c for p, (c,) in played}
    for mode in good:
        assert first[mode].token_ids.tolist() == again[mode].token_ids.tolist()
