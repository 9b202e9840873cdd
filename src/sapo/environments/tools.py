"""Tools: plain functions that the model calls by writing, and what becomes of such a call.

    def lookup(word: str, limit: int = 3) -> str:
        '''Look a word up.

        Args:
            word: the word.
            limit: most meanings to give.
        '''

A function's type hints and docstring are its schema. What the model writes is untrusted: names and arguments are
checked against the hints before the function is called, and nothing is evaluated. A call that cannot be carried out is
answered with the reason, so that the model can do better in its next turn.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sapo.environments.base import ToolCall, ToolError
from sapo.errors import TaskError
from sapo.utils.names import did_you_mean
from sapo.utils.plugins import import_named

MAX_STRING_BYTES = 64 * 1024
"""Limit of each text in a call's arguments."""

MAX_ERROR = 500
"""Limit of the characters of an error that the model reads."""

MAX_RESULT = 16_000
"""Limit of the characters of a result that the model reads; what is cut is said."""

_NAME = re.compile(r"[\w.-]{1,64}")

_DEPTH = 20
"""Limit of lists within lists in a call's arguments."""

_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    >>> def add(a: int, b: int = 1) -> int:
    ...     '''Add two numbers.
    ...
    ...     Args:
    ...         a: the first number.
    ...         b: the second number.
    ...     '''
    ...     return a + b
    >>> tool = Tool.of(add)
    >>> tool.name, tool.arguments({"a": 2}), tool.schema["function"]["parameters"]["required"]
    ('add', {'a': 2}, ['a'])
    >>> tool.arguments({"a": "two"})
    Traceback (most recent call last):
    sapo.environments.base.ToolError: add: a must be a whole number; got 'two'
    """

    name: str
    function: Callable[..., Any]
    hints: Mapping[str, Any]
    """Type of each parameter."""
    required: tuple[str, ...]
    """Parameters without a default."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """Make a tool of a function or a bound method.

        Raises:
            TaskError: it has no name, no docstring, a parameter without a type, or one of a type that JSON has not.
        """
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise TaskError(f"a tool must be a function with a name; got {function!r:.80}; write it with def")
        if not inspect.getdoc(function):
            raise TaskError(f"tool {name!r} must have a docstring, which tells the model what it does; write one")
        try:
            found, parameters = get_type_hints(function), inspect.signature(function).parameters
        except Exception as error:  # a hint may name what the module does not have
            raise TaskError(
                f"tool {name!r}: its type hints cannot be read: {type(error).__name__}: {error}; correct them"
            ) from error
        hints = {}
        for parameter in parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TaskError(
                    f"a tool's parameters must have names; got {str(parameter)!r} in tool {name!r}; name each of them"
                )
            if parameter.name not in found:
                raise TaskError(
                    f"a tool's parameters must have type hints; got none for {parameter.name!r} in tool {name!r}; "
                    "write one, as in word: str"
                )
            hints[parameter.name] = found[parameter.name]
            if not _is_plain(hints[parameter.name]):
                raise TaskError(
                    f"a tool's parameter must be of a type that JSON has (str, int, float, bool, list, dict, Literal); "
                    f"got {parameter.name}: {hints[parameter.name]} in tool {name!r}; choose another"
                )
        required = tuple(p.name for p in parameters.values() if p.default is p.empty)
        return cls(name, function, hints, required)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """Return the JSON schema that a chat template shows to the model.

        Raises:
            TaskError: the docstring does not describe a parameter.
        """
        from transformers.utils import get_json_schema  # takes seconds, and a worker that only calls needs no schema

        try:
            schema: dict[str, Any] = get_json_schema(self.function)
        except Exception as error:
            raise TaskError(
                f"tool {self.name!r}: {' '.join(str(error).split())}; describe every parameter under `Args:` in its "
                "docstring, as in `word: the word to look up.`"
            ) from error
        return schema

    def arguments(self, given: Any) -> dict[str, Any]:
        """Return the arguments of a call in the types that the function declares.

        Raises:
            ToolError: a name is unknown or missing, or a value is of another type or too long.
        """
        if not isinstance(given, Mapping):
            raise ToolError(f"{self.name}: arguments must be an object; got {given!r:.60}")
        for name in given:
            if name not in self.hints:
                known = ", ".join(self.hints) or "no arguments"
                raise ToolError(f"{self.name} takes {known}; got {name!r:.60}{did_you_mean(str(name), self.hints)}")
        for name in self.required:
            if name not in given:
                raise ToolError(f"{self.name} needs the argument {name!r}; got {', '.join(map(str, given)) or 'none'}")
        return {name: _checked(f"{self.name}: {name}", value, self.hints[name]) for name, value in given.items()}


class Toolbox:
    """The tools of one task, by name.

    >>> from sapo.environments.toolkit import calculator
    >>> Toolbox([calculator]).names
    ('calculator',)
    """

    def __init__(self, functions: Iterable[Callable[..., Any] | Tool]) -> None:
        self.tools: dict[str, Tool] = {}
        for function in functions:
            tool = function if isinstance(function, Tool) else Tool.of(function)
            if tool.name in self.tools:
                raise TaskError(f"tools must have different names; got two of the name {tool.name!r}; rename one")
            self.tools[tool.name] = tool

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tools, in the order in which they were given."""
        return tuple(self.tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Return the schemas of all tools, as a chat template takes them.

        Raises:
            TaskError: as from `Tool.schema`.
        """
        return [tool.schema for tool in self.tools.values()]

    def only(self, names: Iterable[str]) -> Toolbox:
        """Return a toolbox of these tools alone.

        Raises:
            TaskError: one is not here.
        """
        for name in (names := list(names)):
            if name not in self.tools:
                raise TaskError(
                    f"a row may offer the tools {', '.join(self.tools)}; got {name!r}{did_you_mean(name, self.tools)}"
                )
        return Toolbox(self.tools[name] for name in names)

    async def run(
        self,
        call: ToolCall,
        through: Callable[..., Awaitable[Any]] | None = None,
        tells: tuple[type[BaseException], ...] = (ToolError, ValueError),
    ) -> Result:
        """Carry out one call and return what the model reads.

        Args:
            call: as the model wrote it; a call that could not be parsed is answered with its error.
            through: makes the call of a function that may block, as `Side.call`; None makes it here.
            tells: exceptions of a tool that are for the model to read. Others are raised: they are the tool's fault.
        """
        known = call.name in self.tools
        try:
            if call.error:
                raise ToolError(call.error)
            if call.name not in self.tools:
                raise ToolError(f"unknown tool {call.name!r:.60}; the tools are {', '.join(self.tools)}")
            tool = self.tools[call.name]
            arguments = tool.arguments(call.arguments)
        except ToolError as error:
            return Result(call, _error(error), failed=True, known=known)
        try:
            said = await through(tool.function, **arguments) if through else tool.function(**arguments)
            if inspect.isawaitable(said):
                said = await said
        except tells as error:
            return Result(call, _error(error), failed=True)
        return Result(call, shown(said))


@dataclass(frozen=True)
class Result:
    """What became of one call.

    >>> Result(ToolCall("add", {"a": 1, "b": 2}, id="c1"), "3").message
    {'role': 'tool', 'name': 'add', 'tool_call_id': 'c1', 'content': '3'}
    """

    call: ToolCall
    text: str
    failed: bool = False
    known: bool = True
    """Whether there is a tool of this name."""

    @property
    def message(self) -> dict[str, str]:
        """Return the message of a chat that answers the call. A name or an id that the model made up must not steer
        the template, which writes it as it stands."""
        own = {"tool_call_id": self.call.id} if _NAME.fullmatch(self.call.id) else {}
        name = self.call.name if self.known and _NAME.fullmatch(self.call.name) else "unknown"
        return {"role": "tool", "name": name, **own, "content": self.text}


def shown(value: Any) -> str:
    """Return what a tool gave as text that the model can read: at most MAX_RESULT characters, all of them encodable.

    >>> shown(42), shown(None), shown("a" * 20_000)[-40:]
    ('42', '', 'aaaaaaaaaaaaa... (20000 characters, cut)')
    """
    text = "" if value is None else value if isinstance(value, str) else str(value)
    if len(text) > MAX_RESULT:
        ending = f"... ({len(text)} characters, cut)"
        text = text[: MAX_RESULT - len(ending)] + ending
    return text.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which no tokenizer takes


def load_tools(specs: Sequence[Any]) -> list[Callable[..., Any]]:
    """Return the functions that a recipe names: tools of ours by name, others as `module:function`.

    Raises:
        TaskError: a name is unknown, or the import fails.

    >>> [tool.__name__ for tool in load_tools(["calculator"])]
    ['calculator']
    """
    from sapo.environments.toolkit import TOOLS

    if isinstance(specs, str) or not isinstance(specs, Sequence):
        raise TaskError(f"tools must be a list; got {specs!r:.60}; write tools: [calculator]")
    found = []
    for spec in specs:
        if callable(spec):
            found.append(spec)
        elif isinstance(spec, str) and ":" in spec:
            found.append(import_named(spec, what="tool", noun="function", error=TaskError))
        elif spec in TOOLS:
            found.append(TOOLS[spec])
        else:
            known = ", ".join(TOOLS)
            raise TaskError(
                f"a tool must be one of {known}, or module:function; got {spec!r:.60}{did_you_mean(str(spec), TOOLS)}"
            )
    return found


def _error(error: BaseException) -> str:
    text = " ".join(str(error).encode("utf-8", "replace").decode().split()) or type(error).__name__
    return f"error: {text}"[:MAX_ERROR]


def _is_plain(hint: Any) -> bool:
    """Return whether a type is made of those that JSON has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return all(isinstance(value, str | int | float | bool | None) for value in arguments)
    if origin in (Union, types.UnionType):
        return all(map(_is_plain, arguments))
    if origin is dict:
        return arguments[0] is str and _is_plain(arguments[1])
    if origin is list:
        return all(map(_is_plain, arguments))
    if origin is tuple:
        return len(arguments) > 1 and ... not in arguments and all(map(_is_plain, arguments))
    return hint is Any or hint in _WORDS


def _checked(where: str, value: Any, hint: Any) -> Any:
    """Return a value that JSON gave, in a declared type.

    Raises:
        ToolError: it is of another, or too long.
    """
    _bound(where, value)
    made = _converted(value, hint)
    if made is _UNFIT:
        raise ToolError(f"{where} must be {_in_words(hint)}; got {value!r:.60}")
    return made


_UNFIT = object()


def _converted(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return next((known for known in arguments if known == value and type(known) is type(value)), _UNFIT)
    if origin in (Union, types.UnionType):
        exact = [a for a in arguments if type(value) is a]  # of int | float, 3 is an int
        fits = (made for a in (*exact, *arguments) if (made := _converted(value, a)) is not _UNFIT)
        return next(fits, _UNFIT)
    kind = origin or hint
    if kind is float:
        return float(value) if _is_number(value) and math.isfinite(value) else _UNFIT
    if kind is int:
        whole = _is_number(value) and math.isfinite(value) and value == int(value)
        return int(value) if whole else _UNFIT
    if kind is dict and isinstance(value, Mapping):
        made = {k: _converted(v, arguments[1] if arguments else Any) for k, v in value.items()}
        return _UNFIT if any(v is _UNFIT for v in made.values()) else made
    if kind in (list, tuple) and isinstance(value, list):
        wanted = (
            [Any] * len(value) if not arguments else list(arguments) if kind is tuple else [*arguments] * len(value)
        )
        if len(wanted) != len(value):
            return _UNFIT
        items = [_converted(v, w) for v, w in zip(value, wanted, strict=True)]
        return _UNFIT if any(v is _UNFIT for v in items) else kind(items)
    return value if type(value) is kind else _UNFIT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _bound(where: str, value: Any, depth: int = 0) -> None:
    """Refuse long texts and deep lists before anything looks at them.

    Raises:
        ToolError: there is one.
    """
    if depth > _DEPTH:
        raise ToolError(f"{where} must have at most {_DEPTH} lists within lists")
    if isinstance(value, str) and (size := len(value.encode("utf-8", "surrogatepass"))) > MAX_STRING_BYTES:
        raise ToolError(f"{where} must have at most {MAX_STRING_BYTES} bytes; got {size}")
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    for item in value if isinstance(value, list) else ():
        _bound(where, item, depth + 1)


def _in_words(hint: Any) -> str:
    """Return a type as a model has seen it said."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(argument) for argument in arguments)
    if origin is list and arguments:
        return f"a list, each {_in_words(arguments[0])}"
    return _WORDS.get(origin or hint, "a value")
