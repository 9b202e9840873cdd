"""Tasks with tools: ask, carry out, ask again; the last turn is the answer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from sapo.data import Prompt, Score, Status
from sapo.environments import Environment, OutOfBudget
from sapo.environments.tool_task import ToolTask, WithTools
from sapo.environments.toolkit import calculator
from sapo.errors import TaskError
from support.asking import play


def double(n: int) -> int:
    """Double a number.

    Args:
        n: the number.
    """
    return 2 * n


class Sums(ToolTask):
    name = "sums"
    tools = (calculator, double)

    def train_prompt(self, index: int) -> Prompt:
        return Prompt(index, self.name, f"{index}+{index}=", answer=str(2 * index))

    def held_out(self, count: int) -> list[Prompt]:
        return [self.train_prompt(i) for i in range(count)]

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Score(float(text == prompt.answer), figures={"length": float(len(text))})


PROMPT = Sums().train_prompt(21)
CALL = '<tool_call>{"name": "double", "arguments": {"n": 21}}</tool_call>'
OTHER = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'


def test_a_tool_task_is_an_environment() -> None:
    assert isinstance(Sums(), Environment)


def test_calls_are_carried_out_in_order_and_answered_at_once() -> None:
    score, shown = play(Sums(), PROMPT, OTHER + CALL, CALL, "42")
    assert score.reward == 1.0
    assert shown[0] == ""
    assert [(m["role"], m["name"], m["content"]) for m in shown[1]] == [
        ("tool", "calculator", "42"),
        ("tool", "double", "42"),
    ]
    assert len(shown) == 3
    assert score.figures == {
        "length": 2.0,
        "tools/calculator/calls": 1.0,
        "tools/calculator/errors": 0.0,
        "tools/double/calls": 2.0,
        "tools/double/errors": 0.0,
        "tools/unknown/calls": 0.0,
    }


def test_a_broken_call_goes_on_with_its_error() -> None:
    score, shown = play(Sums(), PROMPT, "<tool_call>{double 21}</tool_call>", CALL.replace("double", "doubel"), "42")
    assert score.reward == 1.0
    assert shown[1][0]["content"].startswith("error: a tool call must be JSON")
    assert shown[2][0]["content"] == "error: unknown tool 'doubel'; the tools are calculator, double"
    assert score.figures["tools/unknown/calls"] == 2.0


def test_an_answer_at_once_needs_no_tool() -> None:
    score, shown = play(Sums(), PROMPT, "41")
    assert (score.reward, list(shown)) == (0.0, [""])


def test_a_cut_turn_is_neither_carried_out_nor_judged() -> None:
    score, shown = play(Sums(), PROMPT, CALL, CALL, cut=True)
    assert (score.status, score.reward, len(shown)) == (Status.TRUNCATED, 0.0, 2)
    assert score.figures["tools/double/calls"] == 1.0


def test_a_spent_budget_is_passed_on() -> None:
    with pytest.raises(OutOfBudget):
        play(Sums(), PROMPT, CALL)


@pytest.mark.parametrize("column", [["double"], [{"type": "function", "function": {"name": "double"}}]])
def test_a_row_offers_the_tools_that_it_names(column: list[Any]) -> None:
    row = Prompt(0, "sums", "?", answer="42", metadata={"tools": column})
    assert Sums().toolbox_of(row).names == ("double",)
    _, shown = play(Sums(), row, OTHER, "42")
    assert shown[1][0]["content"] == "error: unknown tool 'calculator'; the tools are double"


def test_a_row_that_names_another_tool_is_refused() -> None:
    with pytest.raises(TaskError, match="a row may offer the tools calculator, double; got 'doubel'"):
        Sums().toolbox_of(Prompt(0, "sums", "?", metadata={"tools": ["doubel"]}))


class Rows:
    """A task without tools."""

    name = "rows"
    num_train = 3
    notices = ("one line",)

    def train_prompt(self, index: int) -> Prompt:
        return Sums().train_prompt(index)

    def held_out(self, count: int) -> list[Prompt]:
        return Sums().held_out(count)

    def verify(self, text: str, prompt: Prompt) -> Score:
        return Sums().verify(text, prompt)


def test_another_task_is_played_with_tools() -> None:
    task = WithTools(Rows(), [double])
    assert (task.name, task.num_train, task.notices) == ("rows", 3, ("one line",))
    assert task.train_prompt(2) == Rows().train_prompt(2)
    score, shown = play(task, PROMPT, CALL, "42")
    assert (score.reward, shown[1][0]["content"]) == (1.0, "42")
    assert not hasattr(task, "train_row")
    for other in (copy.copy(task), pickle.loads(pickle.dumps(task))):
        assert other.toolbox.names == ("double",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithTools(Rows(), []), "must have tools; got none"),
        (lambda: WithTools(Rows(), [len]), "tool 'len'"),
        (lambda: WithTools(Rows(), [double], calls="xml"), "calls must be one of auto, hermes"),
    ],
)
def test_tools_are_checked_when_the_task_is_made(make: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()
