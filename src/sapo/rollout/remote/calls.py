"""The calls of an engine as messages, and what comes back: both directions, so that they are read side by side."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sapo.errors
from sapo.data import Completion, Group, Prompt
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.data.messages import Message
from sapo.data.serialisation import group_from_json, group_to_json
from sapo.rollout.engine import Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams


def generate_message(requests: Sequence[Request], params: SamplingParams, record_experts: bool) -> Message:
    """Return the message that asks for completions; `read_requests` is the inverse.

    Prompts travel without the further fields of their rows, which are the verifiers', and with the bytes of their
    pictures: an engine on another machine has no file of the run.
    """
    arrays = FlatArrays()
    asked = [
        {
            "of": group_to_json(Group(_self_contained(r.prompt), ()), arrays),
            **{"samples": r.samples, "limits": r.limits, "first_sample": r.first_sample, "drawn": r.drawn},
        }
        for r in requests
    ]
    settings = {**asdict(params), "stop_token_ids": sorted(params.stop_token_ids)}
    header = {"call": "generate", "requests": asked, "params": settings, "record_experts": record_experts}
    return Message(header, _tensors(arrays))


def read_requests(message: Message) -> tuple[list[Request], SamplingParams]:
    """Return the requests and the sampling settings of a message."""
    arrays = _reader(message)
    requests = [
        Request(
            group_from_json(r["of"], arrays).prompt,
            r["samples"],
            r["limits"] and tuple(r["limits"]),
            first_sample=r["first_sample"],
            drawn=r["drawn"],
        )
        for r in message.header["requests"]
    ]
    settings = message.header["params"]
    return requests, SamplingParams(**{**settings, "stop_token_ids": frozenset(settings["stop_token_ids"])})


def completions_message(drawn: Sequence[Sequence[Completion]], experts: ExpertLog | None) -> Message:
    """Return the message of what was drawn; `read_completions` is the inverse."""
    arrays = FlatArrays()
    groups = [Group(_NOBODY, tuple(completions)) for completions in drawn]
    if experts is not None:
        groups = experts.attach(groups)
    return Message({"groups": [group_to_json(g, arrays) for g in groups]}, _tensors(arrays))


def read_completions(message: Message) -> list[Group]:
    """Return what was drawn for each request, in groups without their prompts, with the experts that were recorded."""
    arrays = _reader(message)
    return [group_from_json(value, arrays) for value in message.header["groups"]]


def note_experts(log: ExpertLog, request: int, group: Group) -> tuple[Completion, ...]:
    """Take down the experts that a group carries; return its completions as an engine gives them, without experts."""
    assert group.prompt_experts is not None, "a record was asked for and the engine made none"
    log.note_prompt(request, group.prompt_experts)
    bare = []
    for sample, completion in enumerate(group.completions):
        if completion.experts is not None and completion.experts.num_tokens:
            log.note_completion(request, sample, completion.experts)
        c = completion
        bare.append(Completion(c.token_ids, c.logprobs, c.finish_reason, c.text, versions=c.versions))
    return tuple(bare)


def error_message(error: Exception) -> Message:
    """Return the message of an exception; `raise_error` raises it on the other side."""
    return Message(
        {"error": type(error).__name__, "text": str(error), "traceback": "".join(traceback.format_exception(error))}
    )


def raise_error(answer: Message, where: str) -> None:
    """Raise the error that an answer tells of, if it does: one of `sapo.errors` as it is, others with their traceback.

    Args:
        where: names the worker.
    """
    name = answer.header.get("error")
    if name is None:
        return
    known = getattr(sapo.errors, name, None)
    if isinstance(known, type) and issubclass(known, (sapo.errors.UserError, sapo.errors.RunFailure)):
        raise known(answer.header["text"])
    raise RuntimeError(
        f"{where} has raised {name}: {answer.header['text']}\n\nits traceback:\n{answer.header['traceback']}"
    )


def _self_contained(prompt: Prompt) -> Prompt:
    """Return a prompt that needs no file."""
    return replace(prompt, pictures=tuple(replace(p, data=p.read(), path=None) for p in prompt.pictures))


_NOBODY = Prompt(0, "", "")


def _tensors(arrays: FlatArrays) -> Mapping[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.joined().items()}


def _reader(message: Message) -> ArrayReader:
    joined: dict[str, Any] = {name: tensor.numpy() for name, tensor in message.tensors.items()}
    return ArrayReader(joined)
