"""Tools that a client brings with a chat: the model's template shows them, and its calls are read from the answer.

The client carries the calls out. They are read by the parsers of `sapo.environments`; what cannot be read stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.environments.calls import read_calls, text_beside_calls


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
        parallel: give all calls of an answer; otherwise the first alone.

    >>> weather = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    >>> tools = OfferedTools([{"type": "function", "function": weather}])
    >>> written = 'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    >>> text, [call] = tools.split(written)
    >>> text, call["function"]
    ('Let me see.', {'name': 'weather', 'arguments': '{"city": "Rome"}'})
    >>> tools.split("It is warm.")
    ('It is warm.', [])
    """

    def __init__(self, schemas: Sequence[Mapping[str, Any]], parallel: bool = True) -> None:
        self._most = None if parallel else 1
        self.schemas = [dict(schema) for schema in schemas]
        self.tools = {s["function"]["name"]: OfferedTool(_hints(s["function"])) for s in self.schemas}

    def split(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Return what an answer says besides its calls, and the calls in OpenAI's form.

        An answer with a call that is broken, of no offered tool, or with arguments that JSON does not have, is all
        text. The ids of calls are made here: one that the model wrote may be another call's.
        """
        calls = read_calls(text, self, most=None)
        if not calls or any(call.error or call.name not in self.tools for call in calls):
            return text, []
        try:
            arguments = [json.dumps(dict(call.arguments), allow_nan=False) for call in calls]
        except (TypeError, ValueError, RecursionError):  # a set or an infinity, as Python writes them
            return text, []
        return text_beside_calls(text) or None, [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": call.name, "arguments": written},
            }
            for call, written in list(zip(calls, arguments, strict=True))[: self._most]
        ]


def _hints(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = (function.get("parameters") or {}).get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {
        name: str if isinstance(schema, dict) and schema.get("type") == "string" else object
        for name, schema in known.items()
    }
