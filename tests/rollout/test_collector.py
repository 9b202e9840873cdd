"""The collector without a trainer: prompts to scored groups, all of a batch from one set of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sapo
from sapo.errors import Interrupted
from sapo.model.loading import load_policy
from sapo.rollout.collector import Collector
from sapo.rollout.selection import Position
from sapo.run.preflight import load_tasks
from support.list_engine import TEXTS, ListEngine
from support.runs import write_recipe


class Parts:
    """A collector with what it was made of, and the phases it went through."""

    def __init__(self, directory: Path, should_stop=lambda: False, **changes) -> None:
        config = sapo.load_recipe(write_recipe(directory, **changes))
        self.phases: list[str] = []
        self.policy = load_policy(config.model.path)
        self.engine = ListEngine(self.policy)
        tasks = load_tasks(config)
        self.collector = Collector(
            config, self.policy, self.engine, tasks.train, tasks.formats, tasks.curricula, self.phase, should_stop
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def collect(self, batch: int, version: int = 0):
        return self.collector.collect(batch, Position(), self.policy.weights(), version)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ListEngine, "received", [])


def test_a_batch_is_drawn_scored_and_given_its_advantages(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    selected = parts.collect(3, version=5)
    assert parts.phases == ["generate", "generate", "score"], "weights are set in the phase that they are for"
    assert parts.engine.received == [("weights", 5)]
    assert parts.engine.weights is None, "it sleeps again"
    assert [len(g.completions) for g in selected.groups] == [4] * 4
    assert {g.prompt.id >> 32 for g in selected.groups} == {3}
    for group in selected.groups:
        assert all(c.text in TEXTS for c in group.completions)
        assert list(group.rewards) == [c.text.count("7") / 8 for c in group.completions]
        assert sum(group.advantages) == pytest.approx(0.0, abs=1e-6)
    assert selected.groups == parts.collect(3).groups, "the batch's number alone decides it"
    assert selected.groups != parts.collect(4).groups


def test_refills_are_drawn_from_the_weights_of_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "hard.jsonl").write_text(
        "".join(f'{{"prompt": "{i}=", "answer": "7", "sevens": 4}}\n' for i in range(24))
    )
    task = {"name": "file", "path": str(tmp_path / "hard.jsonl"), "verifier": "rewards_of_a_test:enough_sevens"}
    parts = Parts(tmp_path, rollout__zero_variance="refill", rollout__samples_per_prompt=2, tasks=[task])
    selected = parts.collect(0)
    assert selected.refill_rounds > 0, "several rounds were drawn"
    assert parts.phases.count("score") == 1 + selected.refill_rounds
    assert parts.engine.received == [("weights", 0)]


def test_a_stopped_batch_leaves_the_engine_asleep(tmp_path: Path) -> None:
    parts = Parts(tmp_path, should_stop=lambda: True)
    with pytest.raises(Interrupted):
        parts.collect(0)
    assert parts.engine.weights is None
