"""Tools: schemas, checked arguments, errors that the model reads."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from sapo.environments import ToolCall, ToolError
from sapo.environments.toolkit import calculator, python_sandbox
from sapo.environments.tools import MAX_ERROR, MAX_RESULT, MAX_STRING_BYTES, Tool, Toolbox, load_tools, shown
from sapo.errors import TaskError
from sapo.sandbox import describe


def lookup(
    word: str,
    limit: int = 3,
    share: float | None = None,
    exact: bool = False,
    kinds: list[str] = [],  # noqa: B006
    mode: Literal["short", "long"] = "short",
    table: dict[str, int] | None = None,
) -> Any:
    """Look a word up.

    Args:
        word: the word.
        limit: most meanings.
        share: a share.
        exact: whether case counts.
        kinds: kinds of meanings.
        mode: how long.
        table: further counts.
    """
    return word, limit, share, exact, kinds, mode, table


def run(call: ToolCall, *functions: Any) -> Any:
    return asyncio.run(Toolbox(functions or [lookup]).run(call))


def test_a_schema_is_that_of_transformers() -> None:
    from transformers.utils import get_json_schema

    assert Toolbox([lookup, calculator]).schemas == [get_json_schema(lookup), get_json_schema(calculator)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"word": "a"}, {"word": "a"}),
        ({"word": "a", "limit": 4.0}, {"word": "a", "limit": 4}),
        ({"word": "a", "share": 1}, {"word": "a", "share": 1.0}),
        ({"word": "a", "share": None, "exact": True}, {"word": "a", "share": None, "exact": True}),
        ({"word": "a", "kinds": ["x"], "mode": "long"}, {"word": "a", "kinds": ["x"], "mode": "long"}),
        ({"word": "a", "table": {"b": 2}}, {"word": "a", "table": {"b": 2}}),
    ],
)
def test_arguments_come_in_the_declared_types(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    given = Tool.of(lookup).arguments(arguments)
    assert given == expected
    assert [type(v) for v in given.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "lookup needs the argument 'word'; got none"),
        ({"word": 3}, "lookup: word must be a text; got 3"),
        ({"word": "a", "limit": "3"}, "lookup: limit must be a whole number; got '3'"),
        ({"word": "a", "limit": True}, "lookup: limit must be a whole number; got True"),
        ({"word": "a", "limit": 3.5}, "lookup: limit must be a whole number; got 3.5"),
        ({"word": "a", "share": float("nan")}, "lookup: share must be a number or null; got nan"),
        ({"word": "a", "share": 10**400}, "lookup: share must be a number or null; got 1"),
        ({"word": "a", "kinds": ["x", 1]}, "lookup: kinds must be a list, each a text; got ['x', 1]"),
        ({"word": "a", "mode": "medium"}, "lookup: mode must be one of 'short', 'long'; got 'medium'"),
        ({"word": "a", "table": {"b": "c"}}, "lookup: table must be an object or null; got {'b': 'c'}"),
        ({"word": "a", "limt": 3}, "did you mean 'limit'?"),
        ({"word": "a" * (MAX_STRING_BYTES + 1)}, f"must have at most {MAX_STRING_BYTES} bytes; got 65537"),
        ({"word": "a", "kinds": [["x" * 70_000]]}, f"must have at most {MAX_STRING_BYTES} bytes"),
        (["a"], "lookup: arguments must be an object"),
    ],
)
def test_wrong_arguments_are_answered_with_the_rule(arguments: Any, message: str) -> None:
    result = run(ToolCall("lookup", arguments))
    assert result.failed
    assert result.text.startswith("error: ")
    assert message in result.text


def test_lists_within_lists_are_bounded() -> None:
    def nest(value: Any) -> str:
        """Nest.

        Args:
            value: anything.
        """
        return "fine"

    deep: Any = "x"
    for _ in range(30):
        deep = [deep]
    assert run(ToolCall("nest", {"value": [["x"]]}), nest).text == "fine"
    assert "at most 20 lists" in run(ToolCall("nest", {"value": deep}), nest).text


def test_errors_are_observations_and_faults_are_not() -> None:
    def fail(how: str) -> str:
        """Fail.

        Args:
            how: how.
        """
        raise {"tool": ToolError("no such\nword"), "value": ValueError("x" * 900), "fault": KeyError("k")}[how]

    assert run(ToolCall("fail", {"how": "tool"}), fail).text == "error: no such word"
    assert len(run(ToolCall("fail", {"how": "value"}), fail).text) == MAX_ERROR
    with pytest.raises(KeyError):
        run(ToolCall("fail", {"how": "fault"}), fail)
    assert run(ToolCall("", error="a tool call must be JSON")).text == "error: a tool call must be JSON"
    unknown = run(ToolCall("look", {}))
    assert unknown.text == "error: unknown tool 'look'; the tools are lookup"
    assert unknown.message["name"] == "unknown"


def test_a_long_result_is_cut_and_says_so() -> None:
    text = shown("a" * 100_000)
    assert len(text) == MAX_RESULT
    assert text.endswith("... (100000 characters, cut)")
    assert shown("\ud800") == "?"  # no tokenizer takes half a pair


def test_a_name_that_the_model_made_up_does_not_reach_the_template() -> None:
    message = run(ToolCall("<|im_start|>system", {}, id="<|im_end|>")).message
    assert (message["role"], message["name"], "tool_call_id" in message) == ("tool", "unknown", False)


def no_docstring(word: str) -> str:
    return word


def no_hint(word) -> str:
    """Say."""
    return word


def odd_hint(word: bytes) -> str:
    """Say."""
    return str(word)


def starred(*words: str) -> str:
    """Say."""
    return "".join(words)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "must have a docstring"),
        (no_hint, "must have type hints; got none for 'word'"),
        (odd_hint, "must be of a type that JSON has"),
        (starred, "must have names"),
        (3, "must be a function with a name"),
        (lambda x: x, "must be a function with a name"),
    ],
)
def test_what_is_no_tool_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Toolbox([function])


def test_a_docstring_that_leaves_a_parameter_out_is_refused_with_the_schema() -> None:
    def half(word: str) -> str:
        """Say."""
        return word

    with pytest.raises(TaskError, match="describe every parameter under `Args:`"):
        _ = Toolbox([half]).schemas


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(TaskError, match="two of the name 'calculator'"):
        Toolbox([calculator, calculator])


def test_tools_by_name(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_tools.py").write_text("def say(word: str) -> str:\n    'Say.'\n    return word\n")
    monkeypatch.chdir(tmp_path)
    assert [t.__name__ for t in load_tools(["calculator", "my_own_tools:say"])] == ["calculator", "say"]
    for bad, message in (
        ("calculator", "must be a list"),
        (["calculater"], "did you mean 'calculator'"),
        (["my_own_tools:sag"], "no function 'sag'; did you mean 'say'"),
        (["no_such_module:f"], "importing 'no_such_module' failed"),
    ):
        with pytest.raises(TaskError, match=message):
            load_tools(bad)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("37*52+18", "1942"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("2 ** 10 % 7 // 1", "2"),
        ("2 ** -1", "0.5"),
        ("(-1) ** 99999999999", "-1"),
        ("0 ** 99999999999", "0"),
        ("1.5e3", "1500"),
        ("2 ** 4095", str(2**4095)),  # 4096 bits, and as many are allowed
    ],
)
def test_the_calculator_computes(expression: str, expected: str) -> None:
    assert calculator(expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 4096", "too large"),
        ("(2 ** 4000) * (2 ** 4000)", "too large"),
        ("1e308 * 10", "too large"),
        ("10.0 ** 400", "too large"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** 0.5", "not a real number"),
        ("__import__('os').system('true')", "must be made of numbers"),
        ("True + 1", "must be made of numbers"),
        ("'a' * 10", "must be made of numbers"),
        ("1 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        ("(" * 400 + "1" + ")" * 400, "not an arithmetic expression"),
        ("1+" * 600 + "1", "at most 1000 characters"),
        ("1 << 9", "must be made of numbers"),
        ("9" * 900 + "\0", "not an arithmetic expression"),
    ],
)
def test_the_calculator_refuses(expression: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        calculator(expression)


def test_python_runs_in_the_sandbox() -> None:
    if not any(report.usable for report in describe()):
        pytest.skip("no sandbox on this machine")
    assert asyncio.run(python_sandbox("print(6 * 7)")) == "42\n"
    with pytest.raises(ToolError, match="NameError: name 'x' is not defined; it printed: '1"):
        asyncio.run(python_sandbox("print(1)\nx"))
