"""Write groups as JSON values with their token data in arrays beside them, and read them back.

Floats survive exactly: Python writes the shortest decimal that reads back as the same number, and arrays go as bytes.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from sapo.data.arrays import TOKEN_IDS, ArrayReader, FlatArrays, read_only
from sapo.data.rollouts import Completion, Group, Prompt, RoutedExperts, Score, Status

_TOKEN_DATA = ("token_ids", "logprobs", "old_logprobs", "reference_logprobs")


def group_to_json(group: Group, arrays: FlatArrays) -> dict[str, Any]:
    """Return a group as a JSON value, and put its token data into `arrays`.

    The row's further fields are left out: scored and encoded, the group needs them no more, and a row may hold what
    JSON does not (dates, decimals) or much of it (tests of programs).

    >>> completion = Completion((2, 0), (-0.1, -0.2), "stop", "2", Score(1.0))
    >>> group = Group(Prompt(1, "t", "1+1=", (1, 2), "2"), (completion,), (0.0,))
    >>> arrays = FlatArrays()
    >>> value = group_to_json(group, arrays)
    >>> group_from_json(value, ArrayReader(arrays.joined())) == group
    True
    """
    arrays.put("prompt.token_ids", read_only(group.prompt.token_ids, TOKEN_IDS))
    prompt = {k: v for k, v in vars(group.prompt).items() if k != "token_ids"}
    return {
        "prompt": {**prompt, "metadata": {}},
        "prompt_experts": _experts_to_json(group.prompt_experts, arrays),
        "completions": [_completion_to_json(c, arrays) for c in group.completions],
        "advantages": group.advantages,
        "shaped_rewards": group.shaped_rewards,
        "masked": group.masked,
    }


def group_from_json(value: dict[str, Any], arrays: ArrayReader) -> Group:
    """Return what `group_to_json` was given, also after a trip through text.

    Checkpoints of earlier versions hold the token data in the JSON value itself, and are read as well.
    """
    prompt = value["prompt"]
    ids = prompt["token_ids"] if "token_ids" in prompt else arrays.take("prompt.token_ids").tolist()
    return Group(
        prompt=Prompt(**{**prompt, "token_ids": tuple(ids), "stop": tuple(prompt["stop"])}),
        prompt_experts=_experts_from_json(value.get("prompt_experts"), arrays),
        completions=tuple(_completion_from_json(c, arrays) for c in value["completions"]),
        advantages=tuple(value["advantages"]),
        shaped_rewards=tuple(value["shaped_rewards"]),
        masked=tuple(value["masked"]),
    )


def _completion_to_json(completion: Completion, arrays: FlatArrays) -> dict[str, Any]:
    for name in _TOKEN_DATA:
        arrays.put(name, getattr(completion, name))
    return {
        "finish_reason": completion.finish_reason,
        "text": completion.text,
        "score": {**vars(completion.score), "figures": dict(completion.score.figures)},
        "experts": _experts_to_json(completion.experts, arrays),
    }


def _completion_from_json(value: dict[str, Any], arrays: ArrayReader) -> Completion:
    score = value["score"]
    return Completion(
        **{name: value[name] if name in value else arrays.take(name) for name in _TOKEN_DATA},
        finish_reason=value["finish_reason"],
        text=value["text"],
        score=Score(**{**score, "status": Status(score["status"])}),
        experts=_experts_from_json(value.get("experts"), arrays),
    )


def _experts_to_json(experts: RoutedExperts | None, arrays: FlatArrays) -> dict[str, Any] | None:
    if experts is None:
        return None
    arrays.put("experts", np.frombuffer(experts.indices, np.uint8))
    return {k: v for k, v in vars(experts).items() if k != "indices"}


def _experts_from_json(value: dict[str, Any] | None, arrays: ArrayReader) -> RoutedExperts | None:
    if value is None:
        return None
    inline = value.get("indices")
    indices = arrays.take("experts").tobytes() if inline is None else base64.b64decode(inline)
    return RoutedExperts(**{**value, "indices": indices})
