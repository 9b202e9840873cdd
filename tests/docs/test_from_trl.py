"""The two scripts of docs/from-trl.md run, and ours is no longer than TRL's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.runs import write_model

PAGE = Path(__file__).parents[2] / "docs" / "from-trl.md"


def script(title: str) -> str:
    """Return the script of the page with a title."""
    found = re.search(rf'```python title="{title}"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run(title: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script in a directory with a model of the tests."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("SAPO_CACHE", str(directory / "cache"))
    write_model(directory / "models" / "mine")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script(title), title, "exec"), names)
    return names


def test_our_script_is_no_longer_than_trl_s() -> None:
    assert len(script("sapo").splitlines()) <= len(script("TRL").splitlines())


def test_our_script_trains_by_both_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of_ours = run("sapo", tmp_path, monkeypatch)["run"]
    assert run_of_ours.summary["steps"] == 2
    samples = run_of_ours.samples(1)
    # 4 prompts of 4 samples; truncated completions are not judged, as the table says.
    assert len(samples) == 16
    judged = samples[samples["status"] == "scored"]
    for _, row in judged.iterrows():
        expected = 0.9 * row["text"].count("7") / 8 + 0.1 * (1 - len(row["text"]) / 12)
        assert row["reward"] == pytest.approx(expected)


@pytest.mark.scale
def test_trl_s_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    assert run("TRL", tmp_path, monkeypatch)["trainer"].state.global_step == 2
