"""What an environment may say in messages of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sapo.environments import Messages

_FIELD = re.compile(r"[\w.:-]{0,64}")
"""What names and ids in messages may be made of. The template writes them as they stand."""


def check_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return messages with a role and a content of text.

    Raises:
        ValueError: there are none, or one is malformed.
    """
    if isinstance(messages, str) or not messages:
        raise ValueError(f"an observation must have at least one message; got {messages!r:.40}")
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message must have a role and a content of text; got {message!r:.80}")
        fields = {k: v for k, v in message.items() if k != "content"}
        for name, value in fields.items():
            if not isinstance(value, str) or not _FIELD.fullmatch(value):
                raise ValueError(
                    f"a message's {name} must be made of letters, digits and . : _ -; got {value!r:.40}; put what is "
                    "said into its content"
                )
        if fields.get("role") in (None, "", "assistant"):
            raise ValueError(f"an observation's role must be tool, user or another side's; got {fields.get('role')!r}")
        found.append({**fields, "content": message["content"]})
    return found


def with_our_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which the results of calls have ids that every template takes, in their order."""
    return [{**m, "tool_call_id": f"call{i:05d}"} if m["role"] == "tool" else dict(m) for i, m in enumerate(messages)]
