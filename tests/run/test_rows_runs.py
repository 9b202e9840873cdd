"""A run of a model that runs in rows: it says so and trains, and a resumed run is the unbroken one to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sapo
from sapo.model.loading import prepare_policy
from sapo.run.listener import Silent
from support.row_cases import TOKENIZER, stablelm
from support.runs import fingerprint, metrics, write_recipe


class Heard(Silent):
    """What a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def recipe(directory: Path, **changes: Any) -> Any:
    file = write_recipe(directory, train__steps=3, checkpoint__every=1, **changes)
    prepare_policy(stablelm(), TOKENIZER).save(directory / "rows")
    return sapo.load_recipe(str(file), [f"model.path={directory / 'rows'}"])


def test_a_model_in_rows_trains_says_so_and_resumes_to_the_bit(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "whole"))
    heard = Heard()
    sapo.train(recipe(tmp_path / "whole"), listener=heard)
    assert [w for w in heard.warnings if "StableLmForCausalLM runs in padded rows" in w]
    lines = metrics(tmp_path / "whole" / "run")
    (check,) = [line for line in lines if line["kind"] == "self_check"]
    assert check["equal"]
    steps = iter(range(10**6))
    stopped = sapo.train(recipe(tmp_path / "broken"), should_stop=lambda: next(steps) > 40).stopped
    assert stopped is not None
    assert 0 < stopped.checkpoint.step < 3
    sapo.resume(str(tmp_path / "broken" / "run"))
    ours, theirs = (fingerprint(tmp_path / name / "run", 3) for name in ("broken", "whole"))
    for found in (ours, theirs):
        found["metrics"] = [line for line in found["metrics"] if line["kind"] in ("step", "update")]
    assert ours == theirs


def test_a_dry_run_says_how_the_model_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = sapo.workflows.train.dry_run(recipe(tmp_path))
    assert "in padded rows" in found.model
    assert [w for w in found.warnings if "runs in padded rows" in w]
    assert found.memory.phases["generate"]["cache of keys and values"] > 0
