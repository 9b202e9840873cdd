"""What an environment is given, and what it is recognised by."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sapo.data import Prompt, Score
from sapo.environments import Ask, Environment, Episode, Turn, is_environment
from sapo.environments.failures import MAX_OBSERVATION, check_observation


class Echo:
    """The smallest environment."""

    name = "echo"

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, "?")

    def held_out(self, count: int) -> list[Prompt]:
        return [Prompt(i, self.name, "?") for i in range(count)]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        return Score(float((await ask()).text == prompt.text))


def test_a_task_that_plays_is_an_environment() -> None:
    assert is_environment(Echo())
    assert isinstance(Echo(), Environment)
    assert not is_environment(type("Silent", (), {"name": "silent"})())


def test_an_environment_loads_no_tensor_library() -> None:
    loaded = "import sys, sapo.environments; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("observations", "turns", "expected"),
    [
        (("", "7;"), ("[3+4]", "#7"), ("[3+4]", "7;", "#7")),
        (("go", "lower", "out of turns"), ("9", "8"), ("go", "9", "lower", "8", "out of turns")),
        ((), (), ()),
    ],
)
def test_a_transcript_has_what_was_said_in_its_order(
    observations: tuple[str, ...], turns: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    played = tuple(Turn(text, (1,), "stop") for text in turns)
    assert Episode(Echo().train_prompt(0), 0, played, observations, Score(1.0)).transcript == expected


def test_the_texts_of_parts_count_towards_the_limit_of_an_observation() -> None:
    parts = [{"type": "text", "text": "1" * (MAX_OBSERVATION // 2)} for _ in range(2)]
    with pytest.raises(ValueError, match=f"at most {MAX_OBSERVATION} characters; got "):
        check_observation([{"role": "tool", "content": parts}])
    check_observation([{"role": "tool", "content": parts[:1]}])
    circle: list[object] = ["1"]
    circle.append(circle)
    check_observation([{"role": "tool", "content": circle}])
