"""What an engine gives is held against what it was asked for, before anything is scored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sapo.data import Completion, Prompt
from sapo.errors import ConfigError
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams
from support.runs import write_recipe
from support.zygote import run_forked

ASKED = [Request(Prompt(id=i, task="t", text="1=", token_ids=(1, 2)), samples=2) for i in (7, 8)]
GOOD = Completion((3, 0), (-0.5, -0.5), "stop", "3")


def drawn_from(output: object) -> list[tuple[Completion, ...]]:
    engine = SimpleNamespace(generate=lambda requests, params, should_stop: output)
    return draw(engine, ASKED, SamplingParams(max_new_tokens=4))


def test_what_was_asked_for_passes_as_it_is() -> None:
    output = [(GOOD, GOOD), (GOOD, GOOD)]
    assert drawn_from(output) is output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "a list with the completions of each request; got NoneType"),
        ([(GOOD, GOOD)], "the completions of each of the 2 requests; got those of 1"),
        ([(GOOD, GOOD), (GOOD,)], r"2 completions for request 1 \(prompt 8\); got 1"),
        ([GOOD, GOOD], r"a tuple of completions for request 0 \(prompt 7\); got Completion"),
        ([(GOOD, GOOD), ("3", "4")], r"a sapo.data.Completion as sample 0 of request 1 \(prompt 8\); got str"),
        ([(GOOD, Completion((3, 0), (-0.5,), "stop"))] * 2, r"sample 1 of request 0 .*; got 2 tokens and 1 log-prob"),
        ([(GOOD, Completion((), (), "stop"))] * 2, r"sample 1 of request 0 .*; got 0 tokens and 0 log-prob"),
    ],
)
def test_anything_else_is_refused_with_what_was_asked_and_what_came(output: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.engine types:SimpleNamespace must give .*{message}.*; mend its"):
        drawn_from(output)


SHORT = """
from support.list_engine import ListEngine


class ShortEngine(ListEngine):
    def generate(self, requests, params, should_stop=lambda: False, experts=None):
        return [group[1:] for group in super().generate(requests, params, should_stop)]
"""


def run_command(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_forked(*words, cwd=directory, env=os.environ)


def test_the_command_line_says_in_one_line_what_an_engine_got_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short_engine.py").write_text(SHORT)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    recipe = write_recipe(tmp_path, rollout__engine="short_engine:ShortEngine")
    generate = ("generate", str(tmp_path / "model"), "1+1=", "--engine", "short_engine:ShortEngine")
    # The run first evaluates, two samples of a problem.
    for words, samples in ((("train", str(recipe)), 2), (generate, 1)):
        done = run_command(tmp_path, *words)
        assert done.returncode == 2, done.stderr
        assert f"must give {samples} completions for request 0 (prompt 0); got {samples - 1}" in done.stderr
        assert "Traceback" not in done.stderr
