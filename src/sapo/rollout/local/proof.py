"""The proof, when an engine is made, that it gives a token the log-probability that the trainer gives it.

A few completions are drawn of prompts longer than every window that the config names (model/proof.py) and held against
one forward of training. The first way to decode for which that holds is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sapo.data import Completion, Prompt, Segment
from sapo.errors import ModelError
from sapo.model.attention import TreeLayout
from sapo.model.policy import Policy
from sapo.model.proof import TOLERANCE, TOLERANCES, make_probe, within_reach
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams
from sapo.utils.faults import is_bug_of_ours
from sapo.utils.text import first_line

PACKED, CACHED, WHOLE = "packed", "rows", "whole rows"
"""Ways to decode: the packed engine, transformers' own cache, and no cache at all."""

SAMPLES, NEW_TOKENS = 2, 4
_SHARED = 2
"""Tokens that only the first of the two prompts has."""

Draw = Callable[[str, Sequence[Request], SamplingParams], list[tuple[Completion, ...]]]
"""Draws completions in a way to decode."""


def choose_way(policy: Policy, draw: Draw) -> str:
    """Return how a policy is decoded: the first way that is exact. What was found is kept with the policy.

    Raises:
        ModelError: none is.
    """
    ways: tuple[str, ...] = (CACHED, WHOLE)
    if policy.vision is not None:
        ways = (PACKED,)
    elif policy.path == "packed":
        ways = (PACKED, CACHED, WHOLE)
    for way in ways:
        if way not in policy.engine_paths:
            if policy.is_built_elsewhere or policy.device.type == "meta" or policy.sharded is not None:
                return way  # nothing can be drawn yet, or not in this process
            policy.engine_paths[way] = _fault(policy, way, draw)
            if policy.engine_paths[way] is None and way != ways[0]:
                policy.notices.append(_slower(policy, way, ways[0]))
        if policy.engine_paths[way] is None:
            return way
    reasons = "; ".join(f"{way}: {policy.engine_paths[way]}" for way in ways)
    raise ModelError(
        f"{type(policy.model).__name__} is decoded exactly in no way ({reasons}); draw with another engine "
        "(rollout.engine=vllm), or take a model of another family"
    )


def _slower(policy: Policy, way: str, first: str) -> str:
    how = "in rows with transformers' own cache" if way == CACHED else "in whole rows, each token computed again"
    return f"{type(policy.model).__name__} is decoded {how}: slower, and exact; otherwise: {policy.engine_paths[first]}"


def _fault(policy: Policy, way: str, draw: Draw) -> str | None:
    """Return what is wrong with a way to decode; None where its log-probabilities are the trainer's.

    What the model's own code raises is a reason too. A programming error of this package keeps its traceback.
    """
    try:
        with torch.no_grad(), within_reach(policy.model) as widest:
            requests, room = _requests(policy, widest)
            if room < 1:
                return None
            params = SamplingParams(max_new_tokens=room, seed=0, stop_token_ids=frozenset())
            difference = _difference(policy, requests, draw(way, requests, params))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_bug_of_ours(error):
            raise
        return first_line(error) or type(error).__name__
    tolerance = TOLERANCES.get(policy.dtype, TOLERANCE)
    if difference <= tolerance:
        return None
    return f"log-probabilities differ by up to {difference:.3g} from the trainer's (allowed {tolerance:g})"


def _requests(policy: Policy, widest: int) -> tuple[list[Request], int]:
    """Return two requests of prompts that begin alike, and how many tokens there is room to draw."""
    most = policy.max_length
    probe = make_probe(policy.model, policy.tokenizer, widest, most)
    ids = probe.ids_N[: probe.segments[0].length].tolist()
    prompts = [ids, [*ids[: -_SHARED - 1], ids[-1]]] if len(ids) > _SHARED + 1 else [ids]
    room = NEW_TOKENS if most is None else min(NEW_TOKENS, most - len(ids))
    limits = (max(1, room - 2), *[max(1, room)] * (SAMPLES - 1))  # a row that leaves before the others
    return [
        Request(Prompt(id=i, task="proof", text="", token_ids=tuple(p)), SAMPLES, limits) for i, p in enumerate(prompts)
    ], room


def _difference(policy: Policy, requests: Sequence[Request], drawn: Sequence[Sequence[Completion]]) -> float:
    """Return how far the engine's log-probabilities are from those of one forward of training: at most, or in the
    median."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    scored: list[tuple[list[int], Completion]] = []
    for request, completions in zip(requests, drawn, strict=True):
        prompt, root = list(request.prompt.token_ids), len(segments)
        start = len(ids)
        segments.append(Segment(start, len(prompt), -1))
        ids, positions = ids + prompt, [*positions, *range(len(prompt))]
        for completion in completions:
            own = completion.token_ids.tolist()
            first = len(ids)
            segments.append(Segment(first, len(own), root))
            ids, positions = ids + own, [*positions, *range(len(prompt), len(prompt) + len(own))]
            scored.append(([start + len(prompt) - 1, *range(first, first + len(own) - 1)], completion))
    ids_N, positions_N = (torch.tensor(x, device=policy.device) for x in (ids, positions))
    layout = TreeLayout(segments, policy.device)
    logits_NV = policy.run(lambda: policy.logits(policy.hidden(ids_N, positions_N, layout)))
    if policy.unused_K is not None:  # no part of what is drawn from
        logits_NV.index_fill_(1, policy.unused_K, float("-inf"))
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1).cpu()
    ours = torch.cat([torch.from_numpy(completion.logprobs.copy()) for _, completion in scored])
    theirs = torch.cat([logprobs_NV[at, torch.from_numpy(c.token_ids.copy()).long()] for at, c in scored])
    # Weights that are no numbers give none on both sides: that is the weights' fault, and said where they are loaded.
    apart = (theirs - ours).abs().masked_fill(theirs.isnan() & ours.isnan(), 0)
    # In 16 bits a router may send a token elsewhere by rounding alone; a way that is wrong is wrong of most tokens.
    return (apart.median() if policy.dtype in TOLERANCES else apart.max()).item()
