"""Groups to packed batches: the only owner of masks, weights and normalizers.

A mini-batch is some whole groups; its weights are normalised once, over all its sequences, and passed down to the
micro-batches, so that how it is split changes no gradient. Groups whose rewards are all equal have no gradient: they
are not packed and cost nothing, but they stay in every denominator. Masked completions are not packed either and leave
every denominator, as if they had not been sampled. A completion without a token of the policy's own, as of an episode
that ended before its first turn, is not packed and counts as a sequence of no tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sapo.data import Completion, Group, PackedBatch, Segment
from sapo.data.packed import PER_TARGET
from sapo.model.prefix_tree import PrefixTree, prompt_tree
from sapo.model.routing import pack_experts
from sapo.objectives import sequence_weights
from sapo.training.ranks import Shares
from sapo.training.trajectories import PROMPT, ROOT, Layout, lay_out


def split_minibatches(groups: Sequence[Group], minibatches: int, uneven: bool = False) -> list[tuple[Group, ...]]:
    """Deal out the groups of a rollout batch like cards: mini-batch i gets groups i, i + minibatches, ...

    The prompts of a step come task by task, so each mini-batch gets every task's share.

    Args:
        uneven: allow mini-batches that differ by one group, and empty ones, as when groups have been dropped.

    Raises:
        ValueError: when the groups do not divide evenly.
    """
    if len(groups) % minibatches and not uneven:
        raise ValueError(
            f"prompts_per_step must be a multiple of minibatches; got {len(groups)} and {minibatches}; "
            f"use {-(-len(groups) // minibatches) * minibatches} prompts"
        )
    return [tuple(groups[i::minibatches]) for i in range(minibatches)]


def pack(
    groups: Sequence[Group],
    *,
    normalizer: str,
    tokens_per_microbatch: int,
    max_new_tokens: int,
    device: torch.device | str = "cpu",
    include_flat: bool = False,
    include_all: bool = False,
    ranks: int = 1,
    picture_tokens_per_microbatch: int | None = None,
) -> Shares:
    """Pack the groups of one mini-batch into micro-batches of at most `tokens_per_microbatch` input tokens.

    Whole groups are dealt to ranks, the longest first and each to the rank that has least. All ranks get equally many
    micro-batches, since their passes are collectives: what is missing is one token that predicts nothing.

    Args:
        groups: with their advantages set.
        normalizer: see `objectives.sequence_weights`.
        tokens_per_microbatch: bounds memory only; a single longer sequence gets a micro-batch of its own.
        max_new_tokens: the constant of the `constant_length` normalizer.
        include_flat: pack groups whose rewards are all equal too: a penalty that is not the rewards' pulls on them.
        include_all: pack whatever there is, masked completions as well (for measurements over the whole batch).
        ranks: of the training group.
        picture_tokens_per_microbatch: bounds the memory of the vision tower only; a single group with more gets a
            micro-batch of its own. None for no bound.
    """
    counted_B = torch.tensor([counts for g in groups for counts in g.counted], dtype=torch.bool)
    lengths = torch.tensor([len(c) for g in groups for c in g.completions], dtype=torch.int64)[counted_B]
    weights_B = torch.zeros(len(counted_B), dtype=torch.float64)
    weights_B[counted_B] = sequence_weights(lengths, normalizer, max_length=max_new_tokens)
    packed = [members for members in _members(groups, include_flat, include_all) if members]
    dealt = [
        _plan([packed[i] for i in share], tokens_per_microbatch, picture_tokens_per_microbatch)
        for share in _deal(packed, ranks)
    ]
    shares = [[_pack_members(members, weights_B, device) for members in plan] for plan in dealt]
    most = max(map(len, shares))
    if any(len(share) < most for share in shares):
        empty = _without_targets(next(share for share in shares if share)[0])
        shares = [share + [empty] * (most - len(share)) for share in shares]
    return Shares(tuple(map(tuple, shares)), num_sequences=len(lengths), num_tokens=int(lengths.sum()))


def cut_groups(
    groups: Sequence[Group], tokens_per_microbatch: int, picture_tokens_per_microbatch: int | None = None
) -> list[list[Group]]:
    """Return the groups of one rank as `pack` cuts them into micro-batches; a group that is cut is in several.

    Nothing is packed, so that the number of micro-batches of a large batch can be had without its tokens.
    """
    plan = _plan(
        [members for members in _members(groups, False, True) if members],
        tokens_per_microbatch,
        picture_tokens_per_microbatch,
    )
    cut: list[list[Group]] = []
    for members in plan:
        of_group: dict[int, list[_Member]] = {}
        for member in members:
            of_group.setdefault(id(member.group), []).append(member)
        cut.append(
            [
                replace(
                    same[0].group,
                    completions=tuple(m.completion for m in same),
                    advantages=tuple(m.advantage for m in same),
                    turn_advantages=tuple(m.by_turn for m in same) if same[0].group.turn_advantages else (),
                )
                for same in of_group.values()
            ]
        )
    return cut


def _members(groups: Sequence[Group], include_flat: bool, include_all: bool) -> Iterator[list[_Member]]:
    """Yield the sequences of each group that are packed."""
    sequence = 0
    for group in groups:
        by_turn = group.turn_advantages or ((),) * len(group.completions)
        members = [
            _Member(group, c, sequence + i, group.advantages[i], by_turn[i]) for i, c in enumerate(group.completions)
        ]
        sequence += len(members)
        if include_all:
            yield [m for m in members if len(m.completion)]
        elif include_flat or not group.zero_variance:
            yield [m for m, counts in zip(members, group.counted, strict=True) if counts and len(m.completion)]


def _deal(packed: Sequence[Sequence[_Member]], ranks: int) -> list[list[int]]:
    """Deal groups to ranks, the longest first, each to the rank with the fewest tokens so far.

    A picture's token counts twice: the tower computes its patches before the decoder computes it.

    Returns:
        The places of each rank's groups, in their order.
    """
    tokens = [
        _prompt_tokens(members) + _picture_tokens(members) + sum(m.num_inputs for m in members) for members in packed
    ]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(packed)), key=lambda i: -tokens[i]):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return [sorted(share) for share in shares]


def _plan(
    packed: Sequence[Sequence[_Member]], tokens_per_microbatch: int, picture_tokens_per_microbatch: int | None = None
) -> list[list[_Member]]:
    """Cut the groups of one rank into micro-batches."""
    plan: list[list[_Member]] = [[]]
    budget = tokens_per_microbatch
    pictured = 0
    for members in packed:
        prompt_tokens, pictures = _prompt_tokens(members), _picture_tokens(members)
        if plan[-1] and pictures and pictured + pictures > (picture_tokens_per_microbatch or math.inf):
            plan.append([])
            budget = tokens_per_microbatch
        # A group that would fit a fresh micro-batch is not cut in two, since both halves would compute its prompt.
        whole = prompt_tokens + sum(m.num_inputs for m in members)
        if plan[-1] and budget < whole <= tokens_per_microbatch:
            plan.append([])
            budget = tokens_per_microbatch
        fresh_group = True
        pictured = pictures if not plan[-1] else pictured + pictures
        for member in members:
            cost = member.num_inputs + (prompt_tokens if fresh_group else 0)
            if plan[-1] and cost > budget:
                plan.append([])
                budget = tokens_per_microbatch
                cost, pictured = member.num_inputs + prompt_tokens, pictures
            plan[-1].append(member)
            budget -= cost
            fresh_group = False
    return [members for members in plan if members]


def _prompt_tokens(members: Sequence[_Member]) -> int:
    return len(members[0].group.prompt.token_ids)


def _picture_tokens(members: Sequence[_Member]) -> int:
    tokens = members[0].group.prompt.picture_tokens
    return 0 if tokens is None else tokens.num_tokens


def _without_targets(batch: PackedBatch) -> PackedBatch:
    """Return the first token of a batch alone: a pass over it computes no loss, and its gradient is 0."""
    cut: dict[str, Any] = {name: None if (t := getattr(batch, name)) is None else t[:0].clone() for name in PER_TARGET}
    cut |= {name: getattr(batch, name)[:0].clone() for name in ("advantages_B", "weights_B")}
    cut |= {name: getattr(batch, name)[..., :1].clone() for name in ("token_ids_N", "position_ids_N")}
    experts = None if batch.experts_Nlk is None else batch.experts_Nlk[:1].clone()
    return replace(batch, segments=(Segment(0, 1, -1),), sequence_ids=(), experts_Nlk=experts, pictures=None, **cut)


@dataclass(frozen=True)
class _Member:
    """One sequence of a mini-batch on its way into a micro-batch."""

    group: Group
    completion: Completion
    sequence: int
    advantage: float
    by_turn: tuple[float, ...] = ()
    """Advantages of its turns; empty where all have that of the episode."""

    def advantages(self) -> np.ndarray:
        """Return the advantage of each of its own tokens, (T,)."""
        if not self.by_turn:
            return np.full(len(self.completion), self.advantage)
        return np.repeat(np.array(self.by_turn), [stop - start for start, stop in self.completion.turns])

    @cached_property
    def layout(self) -> Layout:
        return lay_out(len(self.group.prompt.token_ids), self.completion)

    @property
    def num_inputs(self) -> int:
        return self.layout.num_inputs if self.completion.observations else len(self.completion) - 1

    @property
    def rewritten(self) -> bool:
        """Return whether inputs are other than the completion's sequence after the whole prompt."""
        return any(o.keep is not None for o in self.completion.observations)

    def inputs(self) -> np.ndarray:
        """Return the ids of its inputs, (R,)."""
        if not self.rewritten:
            return self.completion.sequence[: self.num_inputs]
        prompt = np.array(self.group.prompt.token_ids, np.int64)
        return np.concatenate([prompt, self.completion.sequence])[self.layout.source_R]

    def positions(self) -> np.ndarray:
        """Return the positions of its inputs, (R,). Only a rewritten prompt, which is text, has some below P."""
        prompt = self.group.prompt
        if prompt.pictures and any(parent == ROOT for *_, parent in self.layout.segments):
            raise ValueError(
                f"an observation must keep a prompt with pictures whole; prompt {prompt.id} was cut; keep "
                f"{len(prompt.token_ids)} tokens or more"
            )
        seen_R = self.layout.seen_R
        return np.where(seen_R < len(prompt.token_ids), seen_R, seen_R + prompt.next_position - len(prompt.token_ids))

    def segments(self, start: int, leaf: int, before: int) -> list[Segment]:
        """Return its segments.

        Args:
            start: packed position of its first input.
            leaf: segment that ends its prompt.
            before: number of segments before its own.
        """
        parents = {PROMPT: leaf, ROOT: -1}
        return [Segment(start + s, n, parents.get(p, before + p)) for s, n, p in self.layout.segments]


def _pack_members(members: Sequence[_Member], weights_B: torch.Tensor, device: torch.device | str) -> PackedBatch:
    groups: list[Group] = []
    for member in members:
        if not groups or groups[-1] is not member.group:
            groups.append(member.group)
    tree = prompt_tree([g.prompt for g in groups])
    leaf_of = {id(group): leaf for group, leaf in zip(groups, tree.leaves, strict=True)}
    leaves = [leaf_of[id(m.group)] for m in members]
    completions = [m.completion for m in members]
    lengths_B, inputs_B = np.array([*map(len, completions)]), np.array([m.num_inputs for m in members])
    starts_B = len(tree.token_ids) + np.cumsum(inputs_B) - inputs_B
    relative_M = np.concatenate([m.layout.predictor_T for m in members])
    ends_B = np.array([tree.segments[leaf].stop - 1 for leaf in leaves])
    predictor_M = np.where(
        relative_M == PROMPT, np.repeat(ends_B, lengths_B), relative_M + np.repeat(starts_B, lengths_B)
    )
    positions_R = np.concatenate([m.positions() for m in members])
    if tree.position_ids.ndim == 2:  # a response has its place in the text on all three axes
        positions_R = np.broadcast_to(positions_R, (3, len(positions_R)))
    segments = list(tree.segments)
    for member, start, leaf in zip(members, starts_B.tolist(), leaves, strict=True):
        segments += member.segments(start, leaf, len(segments))
    which = [m.sequence for m in members]
    references = [c.reference_logprobs for c in completions]
    return PackedBatch(
        token_ids_N=_joined([tree.token_ids, *(m.inputs() for m in members)], np.int64, device),
        position_ids_N=_joined([tree.position_ids, positions_R], np.int64, device),
        segments=tuple(segments),
        predictor_M=torch.from_numpy(predictor_M).to(device),
        target_M=_joined([c.token_ids for c in completions], np.int64, device),
        sequence_M=torch.from_numpy(np.repeat(np.arange(len(members)), lengths_B)).to(device),
        advantages_B=torch.tensor([m.advantage for m in members], dtype=torch.float64, device=device),
        weights_B=weights_B[which].to(device),
        old_logprobs_M=_joined(
            [c.old_logprobs if len(c.old_logprobs) else c.logprobs for c in completions], np.float32, device
        ),
        sequence_ids=tuple(which),
        reference_logprobs_M=_joined(references, np.float32, device) if any(map(len, references)) else None,
        experts_Nlk=_pack_experts(members, groups, tree, device),
        sampler_logprobs_M=_sampler_logprobs(completions, device),
        pictures=tree.tokens.packed_pictures(device),
        advantages_M=_joined([m.advantages() for m in members], np.float64, device)
        if any(m.by_turn for m in members)
        else None,
    )


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic], device: torch.device | str) -> torch.Tensor:
    """Join arrays end to end, along their last dimension, in a tensor of its own."""
    return torch.from_numpy(np.concatenate(parts, axis=-1, dtype=dtype)).to(device)


def _pack_experts(
    members: Sequence[_Member], groups: Sequence[Group], tree: PrefixTree, device: torch.device | str
) -> torch.Tensor | None:
    """Return the recorded experts in the order of the packed tokens, None where nothing was recorded.

    The tokens that all prompts begin with go to the experts of the first prompt.

    Raises:
        ValueError: a completion rewrote its history, whose branches no record covers.
    """
    if all(g.prompt_experts is None for g in groups) and all(m.completion.experts is None for m in members):
        return None
    for member in members:
        if member.rewritten:
            raise ValueError(
                f"routing replay has no record of a rewritten history; got one of prompt {member.group.prompt.id}; set "
                "model.routing_replay=false, or let observations keep all that came before"
            )
    shared = tree.segments[0].length if tree.leaves[0] else 0
    spans = [(groups[0].prompt_experts, 0, shared)]
    spans += [(g.prompt_experts, shared, len(g.prompt.token_ids)) for g in groups]
    spans += [(m.completion.experts, 0, m.num_inputs) for m in members]
    return pack_experts(spans).to(device)


def _sampler_logprobs(completions: Sequence[Completion], device: torch.device | str) -> torch.Tensor | None:
    """Return log mu of the completions' tokens, None where log pi_old is the same."""
    if not all(len(c.old_logprobs) for c in completions):
        return None
    return _joined([c.logprobs for c in completions], np.float32, device)
