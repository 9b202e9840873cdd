"""Read the calls that a model wrote in its turn, in the formats of the usual chat templates.

| format | written as | by |
|---|---|---|
| hermes | `<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>` | Hermes, Qwen2.5, Qwen3, SmolLM3 |
| qwen_xml | `<tool_call><function=f><parameter=a>1</parameter></function></tool_call>` | Qwen3-Coder, Qwen3.5 |
| json | `{"name": "f", "parameters": {"a": 1}}`, or a list of such, alone in the turn | Llama 3, Mistral |
| python | `[f(a=1), g()]` | Llama 4, LFM2, Olmo 3 |

The text of a turn is parsed for the environment alone and never written back: the history keeps the ids that were
drawn. What looks like a call and cannot be read becomes a call with an error, which the model is answered with.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from sapo.environments.base import ToolCall
from sapo.errors import TaskError
from sapo.utils.names import did_you_mean

MAX_CALLS = 32
"""Calls of one turn that are carried out."""

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_TAGGED_FUNCTION = re.compile(rf"(?:<tool_call>\s*)?{_FUNCTION.pattern}(?:\s*</tool_call>)?", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_BEFORE_JSON = re.compile(r"\A\s*(?:<\|python_tag\|>|\[TOOL_CALLS\]|```(?:json)?\s*\n)?\s*")
_AFTER_JSON = re.compile(r"\s*(?:```)?\s*\Z")
_BEFORE_PYTHON = re.compile(r"\A\s*(?:<\|tool_call_start\|>|<function_calls>|```(?:python|tool_code)?\s*\n)?\s*")
_AFTER_PYTHON = re.compile(r"\s*(?:<\|tool_call_end\|>|</function_calls>|```)?\s*\Z")


class KnownTool(Protocol):
    """What the readers of calls look at of a tool."""

    @property
    def hints(self) -> Mapping[str, Any]:
        """Return the types of its parameters, in their order."""


class KnownTools(Protocol):
    """Tools that may be called: a Toolbox, or what a client of a served model offers."""

    @property
    def tools(self) -> Mapping[str, KnownTool]:
        """Return the tools by name."""


def read_calls(text: str, tools: KnownTools, form: str = "auto", most: int | None = MAX_CALLS) -> tuple[ToolCall, ...]:
    """Return the calls in a turn, in the order in which they are written; none where it is an answer.

    Args:
        text: of the turn. What a model thinks, up to the last `</think>`, holds no calls.
        tools: those that may be called; texts become values of the types that they declare.
        form: one of FORMATS, or auto: tags wherever they are; JSON or Python alone in the turn only where they name a
            tool, since an answer may look like either.
        most: calls that are read; None reads all.

    >>> from sapo.environments.toolkit import calculator
    >>> from sapo.environments.tools import Toolbox
    >>> written = '<tool_call>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool_call>'
    >>> read_calls(written, Toolbox([calculator]))[0].arguments
    {'expression': '2*3'}
    """
    check_format(form)
    said = text.rpartition("</think>")[2]
    if form != "auto":
        return tuple(FORMATS[form](said, tools))[:most]
    if "<function=" in said:
        return tuple(_qwen_xml(said, tools))[:most]
    if "<tool_call>" in said:
        return tuple(_hermes(said, tools))[:most]
    for read in (_json, _python):
        calls = tuple(read(said, tools))[:most]
        if any(call.name in tools.tools for call in calls):
            return calls
    return ()


def text_beside_calls(text: str) -> str:
    r"""Return what a turn says besides its calls, its thoughts included.

    Args:
        text: of a turn in which `read_calls` found calls in the form auto. Calls in JSON or Python are all of it.

    >>> text_beside_calls('Let me see. <tool_call>{"name": "f"}</tool_call> One moment.')
    'Let me see.  One moment.'
    """
    thought, closed, said = text.rpartition("</think>")
    if "<function=" in said:
        beside = _TAGGED_FUNCTION.sub("", said)
    else:
        beside = _HERMES.sub("", said) if "<tool_call>" in said else ""
    return f"{thought}{closed}{beside}".strip()


def check_format(form: Any) -> None:
    """Refuse a format of calls that does not exist.

    Raises:
        TaskError: it does not.
    """
    known = ("auto", *FORMATS)
    if form not in known:
        raise TaskError(f"calls must be one of {', '.join(known)}; got {form!r:.60}{did_you_mean(str(form), known)}")


def _hermes(text: str, tools: KnownTools) -> Iterable[ToolCall]:
    for found in _HERMES.finditer(text):
        yield from _of_json(found[1])


def _json(text: str, tools: KnownTools) -> Iterable[ToolCall]:
    body = _AFTER_JSON.sub("", text[_BEFORE_JSON.match(text).end() :])  # type: ignore[union-attr]
    return _of_json(body) if body[:1] in ("{", "[") and body[:1] else ()


def _of_json(body: str) -> Iterable[ToolCall]:
    """Return the calls of a JSON text: an object, or a list of such."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        return [_unread(f"a tool call must be JSON; {reason}")]
    return [_of_object(one) for one in (value if isinstance(value, list) else [value])]


def _of_object(value: Any) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) else None
    inner = function if isinstance(function, dict) else value
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        return _unread('a tool call must be an object as {"name": ..., "arguments": {...}}')
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's form
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return ToolCall(name, error=f"{name}: arguments must be an object; got a text that is no JSON")
    own = value.get("id")
    return ToolCall(
        name,
        arguments if isinstance(arguments, dict) else {},
        id=own[:100] if isinstance(own, str) else "",
        error="" if isinstance(arguments, dict | None) else f"{name}: arguments must be an object",
    )


def _qwen_xml(text: str, tools: KnownTools) -> Iterable[ToolCall]:
    found = list(_FUNCTION.finditer(text))
    if not found and "<tool_call>" in text:
        yield _unread("a tool call must have <function=name> in it")
    for function in found:
        name = function[1]
        arguments: dict[str, Any] = {}
        for parameter in _PARAMETER.finditer(function[2]):
            arguments[parameter[1]] = _value_of(parameter[2], tools, name, parameter[1])
        yield ToolCall(name, arguments)


def _value_of(text: str, tools: KnownTools, name: str, parameter: str) -> Any:
    """Return what a text without quotes stands for: itself where the tool takes a text, otherwise JSON."""
    tool = tools.tools.get(name)
    hint = tool.hints.get(parameter, str) if tool else str
    if hint is str:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _python(text: str, tools: KnownTools) -> Iterable[ToolCall]:
    body = _AFTER_PYTHON.sub("", text[_BEFORE_PYTHON.match(text).end() :])  # type: ignore[union-attr]
    if not re.match(r"\[?\s*[A-Za-z_][\w.]*\s*\(", body):
        return ()
    try:
        tree = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        try:  # one call a line
            lines = ast.parse(body).body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return [_unread("a tool call must be written as name(argument=value)", _leading_name(body))]
        return [
            _of_expression(line.value, tools) if isinstance(line, ast.Expr) else _unread("not a call") for line in lines
        ]
    return [_of_expression(one, tools) for one in (tree.elts if isinstance(tree, ast.List) else [tree])]


def _of_expression(node: ast.expr, tools: KnownTools) -> ToolCall:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return _unread("a tool call must be written as name(argument=value)")
    name = node.func.id
    tool = tools.tools.get(name)
    try:
        arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
        positional = [ast.literal_eval(value) for value in node.args]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ToolCall(name, error=f"{name}: arguments must be plain values")
    if len(arguments) < len(node.keywords):
        return ToolCall(name, error=f"{name}: arguments must be written by name")
    names = list(tool.hints) if tool else []
    if len(positional) > len(names):
        return ToolCall(name, error=f"{name} takes {len(names)} arguments; got {len(positional)}")
    arguments |= dict(zip(names, positional, strict=False))
    return ToolCall(name, {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()})


def _leading_name(body: str) -> str:
    found = re.match(r"\[?\s*([A-Za-z_]\w*)", body)
    return found[1] if found else ""


def _unread(reason: str, name: str = "") -> ToolCall:
    return ToolCall(name, error=reason)


FORMATS: dict[str, Callable[[str, KnownTools], Iterable[ToolCall]]] = {
    "hermes": _hermes,
    "qwen_xml": _qwen_xml,
    "json": _json,
    "python": _python,
}
"""Formats of calls by name."""
