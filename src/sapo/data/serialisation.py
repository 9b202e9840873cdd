"""Write groups as JSON values and read them back.

Floats survive exactly: Python writes the shortest decimal that reads back as the same number.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, replace
from typing import Any

from sapo.data import Completion, Group, Prompt, RoutedExperts, Score, Status


def group_to_json(group: Group) -> dict[str, Any]:
    """A group as a JSON value, but for the row's further fields: scored and encoded, it needs them no more, and a row
    may hold what JSON does not (dates, decimals) or much of it (tests of programs).

    >>> completion = Completion((2, 0), (-0.1, -0.2), "stop", "2", Score(1.0))
    >>> group = Group(Prompt(1, "t", "1+1=", (1, 2), "2"), (completion,), (0.0,))
    >>> group_from_json(group_to_json(group)) == group
    True
    """
    value = asdict(replace(group, prompt=replace(group.prompt, metadata={})))
    for place, key in ((value, "prompt_experts"), *((c, "experts") for c in value["completions"])):
        if place[key] is not None:
            place[key]["indices"] = base64.b64encode(place[key]["indices"]).decode("ascii")
    return value


def group_from_json(value: dict[str, Any]) -> Group:
    """The inverse of `group_to_json`, also after a trip through text."""
    prompt = {**value["prompt"], **{k: tuple(value["prompt"][k]) for k in ("token_ids", "stop")}}
    return Group(
        prompt=Prompt(**prompt),
        completions=tuple(_completion_from_json(c) for c in value["completions"]),
        advantages=tuple(value["advantages"]),
        shaped_rewards=tuple(value["shaped_rewards"]),
        masked=tuple(value["masked"]),
        prompt_experts=_experts_from_json(value.get("prompt_experts")),
    )


def _completion_from_json(value: dict[str, Any]) -> Completion:
    score = value["score"]
    return Completion(
        token_ids=tuple(value["token_ids"]),
        logprobs=tuple(value["logprobs"]),
        finish_reason=value["finish_reason"],
        text=value["text"],
        score=Score(**{**score, "status": Status(score["status"])}),
        old_logprobs=tuple(value["old_logprobs"]),
        reference_logprobs=tuple(value["reference_logprobs"]),
        experts=_experts_from_json(value.get("experts")),
    )


def _experts_from_json(value: dict[str, Any] | None) -> RoutedExperts | None:
    return None if value is None else RoutedExperts(**{**value, "indices": base64.b64decode(value["indices"])})
