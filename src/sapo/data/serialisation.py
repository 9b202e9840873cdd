"""Write groups as JSON values with their token data in arrays beside them, and read them back.

Floats survive exactly: Python writes the shortest decimal that reads back as the same number, and arrays go as bytes.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from sapo.data.arrays import TOKEN_IDS, ArrayReader, FlatArrays, read_only
from sapo.data.pictures import Picture, PictureTokens
from sapo.data.rollouts import Completion, Group, Observation, Prompt, RoutedExperts, Score, Status

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
    return {
        "prompt": _prompt_to_json(group.prompt, arrays),
        "prompt_experts": _experts_to_json(group.prompt_experts, arrays),
        "completions": [_completion_to_json(c, arrays) for c in group.completions],
        "advantages": group.advantages,
        "shaped_rewards": group.shaped_rewards,
        "masked": group.masked,
        **({"turn_advantages": group.turn_advantages} if group.turn_advantages else {}),
    }


def group_from_json(value: dict[str, Any], arrays: ArrayReader) -> Group:
    """Return what `group_to_json` was given, also after a trip through text.

    Checkpoints of earlier versions hold the token data in the JSON value itself, and are read as well.
    """
    return Group(
        prompt=_prompt_from_json(value["prompt"], arrays),
        prompt_experts=_experts_from_json(value.get("prompt_experts"), arrays),
        completions=tuple(_completion_from_json(c, arrays) for c in value["completions"]),
        advantages=tuple(value["advantages"]),
        shaped_rewards=tuple(value["shaped_rewards"]),
        masked=tuple(value["masked"]),
        turn_advantages=tuple(map(tuple, value.get("turn_advantages", ()))),
    )


def _prompt_to_json(prompt: Prompt, arrays: FlatArrays) -> dict[str, Any]:
    """Write a prompt; pictures by their hash, the bytes of those that have no file once for all groups."""
    arrays.put("prompt.token_ids", read_only(prompt.token_ids, TOKEN_IDS))
    apart = ("token_ids", "pictures", "picture_tokens")
    value = {k: v for k, v in vars(prompt).items() if k not in apart} | {"metadata": {}}
    if prompt.pictures:
        value["pictures"] = [_picture_to_json(picture, arrays) for picture in prompt.pictures]
    if prompt.picture_tokens is not None:
        tokens = prompt.picture_tokens
        for places in tokens.places:
            arrays.put("prompt.places", read_only(places, TOKEN_IDS))
        for axis in tokens.positions or ():
            arrays.put("prompt.positions", read_only(axis, TOKEN_IDS))
        value["picture_tokens"] = {"pictures": len(tokens.places), "positions": len(tokens.positions or ())}
    return value


def _prompt_from_json(value: dict[str, Any], arrays: ArrayReader) -> Prompt:
    ids = value["token_ids"] if "token_ids" in value else arrays.take("prompt.token_ids").tolist()
    taken: dict[str, Any] = {"token_ids": tuple(ids), "stop": tuple(value["stop"])}
    taken["pictures"] = tuple(_picture_from_json(p, arrays) for p in value.get("pictures", ()))
    if counts := value.get("picture_tokens"):
        places = tuple(tuple(arrays.take("prompt.places").tolist()) for _ in range(counts["pictures"]))
        positions = tuple(tuple(arrays.take("prompt.positions").tolist()) for _ in range(counts["positions"]))
        taken["picture_tokens"] = PictureTokens(places, positions or None)
    return Prompt(**{**value, **taken})


def _picture_to_json(picture: Picture, arrays: FlatArrays) -> dict[str, Any]:
    value: dict[str, Any] = {"sha256": picture.sha256, "size": picture.size}
    if picture.data is None:
        return value | {"path": picture.path}
    return value | {"stored": arrays.put_once("pictures", picture.sha256, np.frombuffer(picture.data, np.uint8))}


def _picture_from_json(value: dict[str, Any], arrays: ArrayReader) -> Picture:
    size = (int(value["size"][0]), int(value["size"][1]))
    if "stored" not in value:
        return Picture(value["sha256"], size, path=value["path"])
    return Picture(value["sha256"], size, data=arrays.at("pictures", value["stored"]).tobytes())


def _completion_to_json(completion: Completion, arrays: FlatArrays) -> dict[str, Any]:
    for name in _TOKEN_DATA:
        arrays.put(name, getattr(completion, name))
    return {
        "finish_reason": completion.finish_reason,
        "text": completion.text,
        "score": {**vars(completion.score), "figures": dict(completion.score.figures)},
        "experts": _experts_to_json(completion.experts, arrays),
        **({"versions": completion.versions} if completion.versions else {}),
        **(
            {"observations": [_observation_to_json(o, arrays) for o in completion.observations]}
            if completion.observations
            else {}
        ),
    }


def _completion_from_json(value: dict[str, Any], arrays: ArrayReader) -> Completion:
    score = value["score"]
    return Completion(
        **{name: value[name] if name in value else arrays.take(name) for name in _TOKEN_DATA},
        finish_reason=value["finish_reason"],
        text=value["text"],
        score=Score(
            **{**score, "status": Status(score["status"]), "turn_rewards": tuple(score.get("turn_rewards", ()))}
        ),
        experts=_experts_from_json(value.get("experts"), arrays),
        versions=tuple((tokens, version) for tokens, version in value.get("versions", ())),
        observations=tuple(_observation_from_json(o, arrays) for o in value.get("observations", ())),
    )


def _observation_to_json(observation: Observation, arrays: FlatArrays) -> dict[str, Any]:
    arrays.put("observation.token_ids", read_only(observation.token_ids, TOKEN_IDS))
    return {k: v for k, v in vars(observation).items() if k != "token_ids"}


def _observation_from_json(value: dict[str, Any], arrays: ArrayReader) -> Observation:
    speakers = tuple((who, length) for who, length in value.get("speakers", ()))
    ids = tuple(arrays.take("observation.token_ids").tolist())
    return Observation(**{**value, "token_ids": ids, "speakers": speakers})


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
