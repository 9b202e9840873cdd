"""What the tests against the real packages share: a mark, a model that calls and answers, ways to play and train."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sapo
from sapo.config.rollout import TurnsConfig
from sapo.data import Completion, Status
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model
from sapo.rollout.episodes.driver import EpisodeDriver
from sapo.rollout.episodes.joining import PlainJoiner
from sapo.rollout.episodes.live import Play
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from support.runs import metrics

needs_real = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("openenv", "skyrl_gym"))),
    reason="the packages live in .venv-environments: make test-environments",
)

SECONDS = 4.0
"""In which a good environment replies on a machine with much other work."""

_ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


def _episode(draw: random.Random) -> list[tuple[bool, str]]:
    """Write an episode as the model is to play one: what is its own, and what it is told."""
    turns = [(False, draw.choice(("Reach 7.", "Reach 7.You have 3.", "Reach 7.seed 12")))]
    for _ in range(3):
        calls = draw.random() < 0.5
        turns.append((True, f"add(k={draw.randint(1, 4)})" if calls else f"#### {draw.randint(5, 8)}"))
        turns.append((False, draw.choice((str(draw.randint(2, 20)), "turn 1", "Once more."))))
    return turns[:-1]


@cache
def speaking_policy() -> Policy:
    """Train a tiny model, in seconds, until most of its turns are a call of `add` or an answer like `#### 7`."""
    tokenizer = character_tokenizer(_ALPHABET)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("qwen3", len(tokenizer), seed=0, hidden_size=48, layers=2, heads=2, kv_heads=1, **ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw = random.Random(0)
    for _ in range(120):
        rows, own = [], []
        for _ in range(16):
            pieces = [
                (is_own, [*tokenizer(text)["input_ids"], *([ids["eos_token_id"]] if is_own else [])])
                for is_own, text in _episode(draw)
            ]
            rows.append([token for _, tokens in pieces for token in tokens])
            own.append([is_own for is_own, tokens in pieces for _ in tokens])
        length = max(map(len, rows))
        inputs = torch.tensor([row + [ids["pad_token_id"]] * (length - len(row)) for row in rows])
        mask = torch.tensor([marks + [False] * (length - len(marks)) for marks in own])
        logits = model(input_ids=inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:]], inputs[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepare_policy(model.eval(), tokenizer)


class OneByOne(LocalEngine):
    """Draws each request on its own, and every turn anew, so that no sum depends on the batch."""

    converse = None

    def generate(self, requests, params, should_stop=lambda: False, experts=None):
        return [c for request in requests for c in super(OneByOne, self).generate([request], params, should_stop)]


def drive(task: Any, rows: Sequence[Mapping[str, Any]], seconds: float = SECONDS) -> list[Completion]:
    """Play one episode of each row: a prompt whose columns are those of the row."""
    policy = speaking_policy()
    prompts = [
        replace(
            task.train_prompt(i), text="Reach 7.", answer="7", metadata=dict(row), token_ids=policy.encode("Reach 7.")
        )
        for i, row in enumerate(rows)
    ]
    params = SamplingParams(max_new_tokens=80, seed=5, stop_token_ids=policy.stop_token_ids)
    turns = TurnsConfig(max=6, tokens_per_turn=16, seconds_per_reply=seconds)
    driver = EpisodeDriver(policy, OneByOne(policy), params, turns, {task.name: PlainJoiner(policy)})
    return [one for (one,) in driver.play([Play(task, prompt, 1) for prompt in prompts])]


def assert_each_costs_its_own_episode(
    task: Any, good: Mapping[str, Any], bad: Mapping[str, tuple[Mapping[str, Any], str]]
) -> None:
    """Play rows that fail between good ones; those that failed say how, and no other moved by a bit.

    Args:
        good: columns of a row that plays well.
        bad: by name: columns of a row that fails, and a part of what is said of it.
    """
    rows: list[Mapping[str, Any]] = [good]
    for row, _ in bad.values():
        rows += [row, good]
    alone = drive(task, [good] * len(rows))
    assert {completion.score.status for completion in alone} == {Status.SCORED}
    played = drive(task, rows)
    for ours, alike in zip(played[::2], alone[::2], strict=True):
        assert ours == alike
    for name, ours, (_, detail) in zip(bad, played[1::2], bad.values(), strict=True):
        assert ours.score.status is Status.ENVIRONMENT_ERROR, name
        assert detail in ours.score.detail, name


def rows_task(directory: Path, label: str, columns: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Write files of rows; return the task of a recipe that has them as prompts."""
    row = json.dumps({"prompt": "Reach 7.", "answer": "7", **columns}) + "\n"
    (directory / f"{label}.jsonl").write_text(row * 4)
    (directory / f"{label}_held_out.jsonl").write_text(row.replace("Reach", "Get to"))
    paths = {"path": str(directory / f"{label}.jsonl"), "held_out_path": str(directory / f"{label}_held_out.jsonl")}
    return {"name": "file", "label": label, **paths, **options}


def train_a_step(directory: Path, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Train one step on tasks; return the rows of its completions, which have been looked at.

    Every episode was scored, rewards differ within groups, and the update was on policy: what the engine drew has the
    probabilities that the trainer computes over the whole episode.
    """
    speaking_policy().save(directory / "model")
    recipe = {
        "run_dir": str(directory / "run"),
        "threads": 1,
        "model": {"path": str(directory / "model")},
        "tasks": [dict(task) for task in tasks],
        "rollout": {
            "prompts_per_step": 2 * len(tasks),
            "samples_per_prompt": 4,
            "max_new_tokens": 64,
            "turns": {"max": 6, "tokens_per_turn": 16, "max_environment_errors": 0.0},
        },
        "train": {"steps": 1, "minibatches": 1, "learning_rate": 1e-3},
        "eval": {"every": 0},
        "log": {"tensorboard": False, "rollouts_every": 1},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = sapo.train(sapo.load_recipe(directory / "recipe.yaml")).directory
    (step,) = [m for m in metrics(run) if m["kind"] == "step"]
    (update,) = [m for m in metrics(run) if m["kind"] == "update"]
    assert step["environment/errors"] == 0
    assert not update["skipped"]
    assert update["grad_norm"] > 0
    assert update["ratio/abs_dev"] < 1e-5
    return [json.loads(line) for line in (run / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
