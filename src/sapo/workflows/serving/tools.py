"""Tools that a client brings with a chat: the model's template shows them, and its calls are read from the answer.

The client carries the calls out. They are read by the parsers of `sapo.environments`; what cannot be read stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.environments.calls import read_calls

_CALL = re.compile(r"<tool_call>|<function=|<\|python_tag\|>|\[TOOL_CALLS\]|<\|tool_call_start\|>|<function_calls>")
"""What a call begins with; text before it is said to the user. JSON or Python alone has nothing before it."""


@dataclass(frozen=True)
class OfferedTool:
    """One tool, as the parsers of calls look at it.

    >>> OfferedTool({"city": str}).hints["city"]
    <class 'str'>
    """

    hints: Mapping[str, Any]
    """Types of its parameters: str of texts, object of all else, which is then read as JSON."""


class OfferedTools:
    """The tools of one request.

    Args:
        schemas: as OpenAI's clients send them and chat templates take them.

    >>> weather = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    >>> tools = OfferedTools([{"type": "function", "function": weather}])
    >>> written = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    >>> text, [call] = tools.split(written)
    >>> text, call["function"]
    ('Let me see.', {'name': 'weather', 'arguments': '{"city": "Rome"}'})
    >>> tools.split("It is warm.")
    ('It is warm.', [])
    """

    def __init__(self, schemas: Sequence[Mapping[str, Any]]) -> None:
        self.schemas = [dict(schema) for schema in schemas]
        self.tools = {s["function"]["name"]: OfferedTool(_hints(s["function"])) for s in self.schemas}

    def split(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Return what an answer says, and its calls in OpenAI's form; where one is broken all of it is text."""
        calls = read_calls(text, self)
        if not calls or any(call.error or call.name not in self.tools for call in calls):
            return text, []
        thought, closed, said = text.rpartition("</think>")
        begins = _CALL.search(said)
        before = f"{thought}{closed}{said[: begins.start()] if begins else ''}".strip()
        return before or None, [
            {
                "id": call.id or f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
            }
            for call in calls
        ]


def _hints(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = (function.get("parameters") or {}).get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {
        name: str if isinstance(schema, dict) and schema.get("type") == "string" else object
        for name, schema in known.items()
    }
