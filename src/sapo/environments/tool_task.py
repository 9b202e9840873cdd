"""Tasks whose model may call tools before it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from sapo.data import Prompt, Score, Status
from sapo.environments.base import Answer, Ask, ToolError
from sapo.environments.calls import check_format, read_calls
from sapo.environments.clock import tool_seconds
from sapo.environments.side import Side
from sapo.environments.tools import Result, Toolbox
from sapo.environments.wrapping import Wrapped
from sapo.errors import TaskError


class ToolTask(ABC):
    """A task with tools: the model calls them as often as it likes, and its last turn is the answer.

        class Sums(ToolTask):
            name = "sums_with_tools"
            tools = [calculator]
            def train_prompt(self, index): ...
            def held_out(self, count): ...
            def verify(self, text, prompt): ...

    The tools are shown to the model by its chat template. A prompt whose metadata has `tools`, a list of names or
    schemas, is offered those alone.
    """

    name: str
    tools: ClassVar[Sequence[Callable[..., Any]]] = ()
    """Functions with type hints and a docstring; coroutines too."""
    calls: str = "auto"
    """How the model writes calls: one of `sapo.environments.calls.FORMATS`, or auto."""
    prefers_chat = True

    @abstractmethod
    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of an index, as any task."""

    @abstractmethod
    def held_out(self, count: int) -> list[Prompt]:
        """Return the first held-out prompts, as any task."""

    @abstractmethod
    def verify(self, text: str, prompt: Prompt) -> Score:
        """Score the text of the last turn."""

    @property
    def toolbox(self) -> Toolbox:
        """Return the tools of this task, checked.

        Raises:
            TaskError: it has none, or one that is no tool.
        """
        kept: Toolbox | None = self.__dict__.get("_toolbox")
        if kept is None:
            kept = self.__dict__["_toolbox"] = self.made_toolbox()
        return kept

    def made_toolbox(self) -> Toolbox:
        """Check the tools; see `toolbox`."""
        check_format(self.calls)
        made = Toolbox(self.tools)
        if not made.tools:
            raise TaskError(f"task {self.name!r} must have tools; got none; write tools = [calculator]")
        return made

    def toolbox_of(self, prompt: Prompt) -> Toolbox:
        """Return the tools that a prompt offers.

        Raises:
            TaskError: its metadata names one that the task has not.
        """
        return offered(self.toolbox, prompt)

    async def play(self, prompt: Prompt, ask: Ask) -> Score | Answer:
        """Ask the model, carry out its calls in order, and ask again until it calls nothing: that is its answer."""
        tools = self.toolbox_of(prompt)
        async with Side() as side:
            text, results = await converse(ask, "", tools, self.calls, side)
        figures = figures_of(tools.names, results)
        if text is None and not getattr(self, "score_truncated", False):
            return Score(0.0, Status.TRUNCATED, "the last turn has no end token", figures=figures)
        return Answer(text or "", figures)


async def converse(
    ask: Ask,
    opening: str,
    tools: Toolbox,
    calls: str,
    side: Side,
    tells: tuple[type[BaseException], ...] = (ToolError, ValueError),
) -> tuple[str | None, list[Result]]:
    """Ask the model, carry out its calls in order and ask again, until it calls nothing.

    Args:
        opening: said before the first turn.
        calls: format of calls.
        side: makes the calls.
        tells: exceptions of a tool that are for the model to read.

    Returns:
        The text of the last turn, None where a limit cut it, and what became of the calls.
    """
    results: list[Result] = []
    turn = await ask(opening)
    while turn.finish_reason != "length" and (wanted := turn.calls or read_calls(turn.text, tools, calls)):
        answers = []
        for call in wanted:  # the model wrote as many and as slow ones as it liked: that is no fault of the environment
            if tool_seconds() <= 0:
                call = replace(call, error="no time left for this call; make fewer in one turn")
            answers.append(await tools.run(call, side.call, tells))
        results += answers
        turn = await ask([answer.message for answer in answers])
    return None if turn.finish_reason == "length" else turn.text, results


class WithTools(Wrapped, ToolTask):
    """Another task, played with tools: `tasks: [{name: file, path: sums.jsonl, tools: [calculator]}]`.

    Args:
        task: source of the prompts and of the verdict about the last turn.
        tools: functions.
        calls: format of calls.
    """

    def __init__(self, task: Any, tools: Sequence[Callable[..., Any]], calls: str = "auto") -> None:
        super().__init__(task)
        self.tools = list(tools)  # type: ignore[misc]
        self.calls = calls
        self._toolbox = self.made_toolbox()


def offered(tools: Toolbox, prompt: Prompt) -> Toolbox:
    """Return the tools that a prompt offers: those that its column `tools` names, or all.

    Raises:
        TaskError: it names one that the task has not.
    """
    named = named_tools(prompt)
    return tools if named is None else tools.only(named)


def named_tools(prompt: Prompt) -> tuple[str, ...] | None:
    """Return the names of the tools that a row offers: names or schemas in its column `tools`. None without it."""
    column = prompt.metadata.get("tools")
    if not isinstance(column, list | tuple):
        return None
    return tuple(dict.fromkeys(_name_of(entry) for entry in column))


def figures_of(names: Sequence[str], results: Sequence[Result]) -> dict[str, float]:
    """Return how often each tool was called in an episode, and how often it failed.

    >>> from sapo.environments import ToolCall
    >>> figures_of(["add"], [Result(ToolCall("add"), "3"), Result(ToolCall("ad"), "error: unknown tool", failed=True)])
    {'tools/add/calls': 1.0, 'tools/add/errors': 0.0, 'tools/unknown/calls': 1.0}
    """
    figures: dict[str, float] = {}
    for name in names:
        mine = [r for r in results if r.call.name == name]
        figures |= {f"tools/{name}/calls": float(len(mine)), f"tools/{name}/errors": float(sum(r.failed for r in mine))}
    return {**figures, "tools/unknown/calls": float(sum(r.call.name not in names for r in results))}


def _name_of(entry: Any) -> str:
    """Return the name of a tool in a row: itself, or that of its schema."""
    if isinstance(entry, dict):
        inner = entry.get("function", entry)
        entry = inner.get("name") if isinstance(inner, dict) else None
    return str(entry)
