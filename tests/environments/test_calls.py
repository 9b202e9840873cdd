"""What a model wrote becomes calls, answers, or errors that it reads; never an exception."""

from __future__ import annotations

import random

import pytest

from sapo.environments import ToolCall
from sapo.environments.calls import FORMATS, MAX_CALLS, read_calls
from sapo.environments.tools import Toolbox
from sapo.errors import TaskError


def add(a: int, b: int = 1) -> int:
    """Add.

    Args:
        a: first.
        b: second.
    """
    return a + b


def say(word: str) -> str:
    """Say.

    Args:
        word: the word.
    """
    return word


TOOLS = Toolbox([add, say])
ADD = ToolCall("add", {"a": 1, "b": 2})
SAY = ToolCall("say", {"word": "1"})


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ('Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', "hermes", [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>\n<tool_call>{"name": "say", '
         '"arguments": {"word": "1"}}</tool_call>', "hermes", [ADD, SAY]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', "hermes", [ADD]),  # cut by the end token
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', "hermes", [ADD]),
        ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
         "</tool_call>", "qwen_xml", [ADD]),
        ("<tool_call><function=say><parameter=word>1</parameter></function></tool_call>", "qwen_xml", [SAY]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', "json", [ADD]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', "json", [ADD]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "c1"}]', "json",
         [ToolCall("add", {"a": 1, "b": 2}, id="c1")]),
        ('```json\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```', "json", [ADD]),
        ('{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}', "json", [ADD]),
        ('[add(a=1, b=2), say(word="1")]', "python", [ADD, SAY]),
        ("add(1, b=2)", "python", [ADD]),
        ("<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|>", "python", [ADD]),
        ("<function_calls>\nadd(a=1, b=2)\nsay(word='1')\n</function_calls>", "python", [ADD, SAY]),
        ('<think><tool_call>{"name": "say"}</tool_call></think>[add(a=1, b=2)]', "python", [ADD]),
    ],
)  # fmt: skip
def test_each_format_is_read_under_its_name_and_by_itself(text: str, form: str, expected: list[ToolCall]) -> None:
    assert list(read_calls(text, TOOLS, form)) == expected
    assert list(read_calls(text, TOOLS)) == expected


@pytest.mark.parametrize(
    "text",
    ["The answer is 3.", "", '{"answer": 3}', "[1, 2]", "f(3)", "sin(x)", "[f(1)]", "(add)", '{"name": "Ada"}', "{}"],
)
def test_an_answer_that_looks_like_a_call_is_an_answer(text: str) -> None:
    assert read_calls(text, TOOLS) == ()


@pytest.mark.parametrize(
    ("text", "form", "error"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>', "auto", "a tool call must be JSON"),
        ("<tool_call>add</tool_call>", "auto", "a tool call must be JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "auto", "a tool call must be JSON"),
        ('<tool_call>{"name": 3}</tool_call>', "auto", "a tool call must be an object"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "auto", "add: arguments must be an object"),
        ('<tool_call>{"name": "add", "arguments": "no"}</tool_call>', "auto", "no JSON"),
        ("<tool_call>nothing</tool_call>", "qwen_xml", "must have <function=name>"),
        ("[add(a=open('x'))]", "auto", "add: arguments must be plain values"),
        ("[add(**{'a': 1})]", "auto", "add: arguments must be written by name"),
        ("add(1, 2, 3)", "auto", "add takes 2 arguments; got 3"),
        ("[add(a=1", "auto", "must be written as name(argument=value)"),
    ],
)
def test_a_malformed_call_has_an_error(text: str, form: str, error: str) -> None:
    (call, *_) = read_calls(text, TOOLS, form)
    assert error in call.error


def test_a_turn_has_at_most_so_many_calls() -> None:
    assert len(read_calls('<tool_call>{"name": "add"}</tool_call>' * 100, TOOLS)) == MAX_CALLS


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(TaskError, match="did you mean 'hermes'"):
        read_calls("", TOOLS, "hermess")


def test_no_text_raises() -> None:
    words = (
        '<tool_call> </tool_call> { } "name" : add ( ) [ ] a=1 , <function= > <parameter=a> </function> 1e999 \\ NaN'
    )
    parts = [*words.split(), "\n", "\x00", "\ud800", "```", "</think>"]
    source = random.Random(0)
    for _ in range(2000):
        text = "".join(source.choice(parts) for _ in range(source.randrange(12)))
        for form in ("auto", *FORMATS):
            for call in read_calls(text, TOOLS, form):
                assert isinstance(call.arguments, dict)
