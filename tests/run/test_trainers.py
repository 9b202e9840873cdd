"""The driver asks its trainer for nothing but what `Trainers` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sapo
import sapo.run.loop
from sapo.run.trainers import make_trainer
from sapo.training.ranks import Trainers
from support.runs import fingerprint, write_recipe

DOOR = {name for name in vars(Trainers) if not name.startswith("_")}


class Narrow:
    """A trainer of which nothing else can be reached or set."""

    __slots__ = ("_Narrow__trainer",)

    def __init__(self, *args: Any) -> None:
        self.__trainer = make_trainer(*args)

    def __getattr__(self, name: str) -> Any:
        assert name in DOOR, f"the driver reads {name} of its trainer"
        return getattr(self.__trainer, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"diagnostics": {"true_gradient_every": 1}, "objective": {"name": "sapo", "kl": {"coefficient": 0.1}}},
        {"rollout__staleness": 1, "experiments__old_logprobs": "current", "warnings": {"on_collapse": "rollback"}},
    ],
    ids=["kl", "stale"],
)
def test_a_run_and_its_resume_ask_for_nothing_else(
    changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "plain"))
    for name in ("plain", "narrow"):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, train__steps=4, **changes)
        if name == "narrow":
            monkeypatch.setattr(sapo.run.loop, "make_trainer", Narrow)
        asked = 0

        def stop_late() -> bool:
            nonlocal asked
            asked += 1
            return asked > 60

        run = sapo.train(sapo.load_recipe(recipe), should_stop=stop_late)
        assert run.stopped is not None
        assert sapo.resume(run.directory).stopped is None
    assert fingerprint(tmp_path / "narrow" / "run", 4) == fingerprint(tmp_path / "plain" / "run", 4)
