"""Packing: what goes where, by hand, and what never changes, on random groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data import Completion, Group, PackedBatch, Prompt, Score, Segment
from sapo.model.prefix_tree import MIN_PREAMBLE, prefix_tree
from sapo.objectives import NORMALIZERS, group_advantages
from sapo.training.batch import pack


def group(prompt: tuple[int, ...], responses: list[tuple[int, ...]], rewards: list[float]) -> Group:
    completions = tuple(
        Completion(r, tuple(-float(t) for t in r), "stop", score=Score(reward))
        for r, reward in zip(responses, rewards, strict=True)
    )
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    return Group(Prompt(0, "t", "", prompt), completions, tuple(advantages.tolist()))


def pack_all(groups: list[Group], tokens: int = 1000, **options) -> tuple[PackedBatch, ...]:
    options = {"normalizer": "sequence_mean", "max_new_tokens": 8, **options}
    return pack(groups, tokens_per_microbatch=tokens, **options).microbatches


def test_a_group_packs_as_its_docstring_says() -> None:
    (batch,) = pack_all([group((5, 6), [(7, 1), (8, 9, 1)], [1.0, 0.0])])
    assert batch.token_ids_N.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 2, 3]
    assert batch.segments == (Segment(0, 2, -1), Segment(2, 1, 0), Segment(3, 2, 0))
    assert batch.predictor_M.tolist() == [1, 2, 1, 3, 4]
    assert batch.target_M.tolist() == [7, 1, 8, 9, 1]
    assert batch.sequence_M.tolist() == [0, 0, 1, 1, 1]
    assert batch.weights_B.tolist() == [1 / 4, 1 / 6]
    assert batch.old_logprobs_M.tolist() == [-7, -1, -8, -9, -1]
    assert batch.sequence_ids == (0, 1)


def test_a_response_of_one_token_has_a_target_and_no_input() -> None:
    (batch,) = pack_all([group((5,), [(1,), (2, 1)], [1.0, 0.0])])
    assert batch.token_ids_N.tolist() == [5, 2]
    assert batch.predictor_M.tolist() == [0, 0, 1]
    assert batch.segments == (Segment(0, 1, -1), Segment(1, 1, 0))


def test_recomputed_log_pi_old_goes_before_the_samplers() -> None:
    plain = group((5,), [(7, 1), (8, 1)], [1.0, 0.0])
    first = Completion((7, 1), (-7.0, -1.0), "stop", score=Score(1.0), old_logprobs=(-0.5, -0.25))
    (batch,) = pack_all([Group(plain.prompt, (first, plain.completions[1]), plain.advantages)])
    assert batch.old_logprobs_M.tolist() == [-0.5, -0.25, -8, -1]


def test_a_long_common_beginning_becomes_one_segment_for_all_prompts() -> None:
    preamble = tuple(range(MIN_PREAMBLE))
    tree = prefix_tree([(*preamble, 50), (*preamble, 51, 52), (*preamble, 51, 53)])
    assert tree.segments == [
        Segment(0, MIN_PREAMBLE, -1),
        Segment(MIN_PREAMBLE, 1, 0),
        Segment(MIN_PREAMBLE + 1, 2, 0),
        Segment(MIN_PREAMBLE + 3, 2, 0),
    ]
    assert tree.leaves == [1, 2, 3]
    assert tree.position_ids[-2:].tolist() == [MIN_PREAMBLE, MIN_PREAMBLE + 1]


def test_a_short_common_beginning_stays_with_each_prompt() -> None:
    shared = tuple(range(MIN_PREAMBLE - 1))
    assert [s.parent for s in prefix_tree([(*shared, 50), (*shared, 51)]).segments] == [-1, -1]


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    prompt = tuple(range(MIN_PREAMBLE + 4))
    tree = prefix_tree([prompt, prompt])
    assert [s.length for s in tree.segments] == [MIN_PREAMBLE + 3, 1, 1]


def test_a_group_is_cut_only_when_it_would_not_fit_an_empty_microbatch() -> None:
    groups = [group((5, 6), [(7, 7, 1), (8, 8, 1)], [1.0, 0.0]) for _ in range(3)]  # 2 + 2 x 2 = 6 inputs each
    assert [b.num_tokens for b in pack_all(groups, tokens=13)] == [12, 6]
    assert [b.num_tokens for b in pack_all(groups, tokens=11)] == [6, 6, 6]
    assert [b.num_tokens for b in pack_all(groups[:1], tokens=5)] == [4, 4], "the prompt is computed for each half"


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_masked_completion_leaves_the_batch_as_if_it_had_not_been_sampled(normalizer: str) -> None:
    whole = group((5, 6), [(7, 1), (8, 9, 1), (8, 8, 8, 8)], [1.0, 0.0, 0.0])
    flat = group((5,), [(7, 7, 7), (7, 1)], [1.0, 1.0])
    masked = [replace(whole, masked=(False, False, True)), replace(flat, masked=(True, False))]
    smaller = [
        Group(whole.prompt, whole.completions[:2], whole.advantages[:2]),
        Group(flat.prompt, flat.completions[1:], flat.advantages[1:]),
    ]
    options = {"normalizer": normalizer, "tokens_per_microbatch": 1000, "max_new_tokens": 8}
    with_mask, without = pack(masked, **options), pack(smaller, **options)
    assert (with_mask.num_sequences, with_mask.num_tokens) == (without.num_sequences, without.num_tokens) == (3, 7)
    (left,), (right,) = with_mask.microbatches, without.microbatches
    for name in ("token_ids_N", "position_ids_N", "predictor_M", "target_M", "sequence_M", "advantages_B", "weights_B"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.sequence_ids == (0, 1)


def test_a_masked_completion_can_still_be_measured() -> None:
    whole = replace(group((5, 6), [(7, 1), (8, 9, 1)], [1.0, 0.0]), masked=(False, True))
    (batch,) = pack_all([whole], include_all=True)
    assert batch.sequence_ids == (0, 1)
    assert batch.weights_B.tolist() == [1 / 2, 0.0]


def test_no_groups_or_none_unmasked_pack_to_nothing() -> None:
    masked = replace(group((5, 6), [(7, 1), (8, 9, 1)], [1.0, 0.0]), masked=(True, True))
    for groups in ([], [masked]):
        for normalizer in NORMALIZERS:
            minibatch = pack(groups, normalizer=normalizer, tokens_per_microbatch=9, max_new_tokens=8)
            assert (minibatch.microbatches, minibatch.num_sequences, minibatch.num_tokens) == ((), 0, 0)


responses = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple), min_size=2, max_size=4)
random_groups = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple), responses, st.booleans()),
    min_size=1,
    max_size=5,
).map(lambda parts: [group(p, rs, [1.0 if flat else float(i % 2) for i in range(len(rs))]) for p, rs, flat in parts])


@settings(max_examples=150, deadline=None)
@given(random_groups, st.integers(1, 30))
def test_every_teaching_token_is_a_target_once_predicted_by_its_own_past(groups: list[Group], tokens: int) -> None:
    batches = pack_all(groups, tokens)
    flat = [(g.prompt, c, a) for g in groups for c, a in zip(g.completions, g.advantages, strict=True)]
    total = len(flat)
    seen = []
    for batch in batches:
        longest = max(len(flat[i][0].token_ids) + len(flat[i][1]) for i in batch.sequence_ids)
        assert batch.num_tokens <= max(tokens, longest - 1)
        paths = _paths(batch)
        for b, i in enumerate(batch.sequence_ids):
            prompt, completion, advantage = flat[i]
            seen.append(i)
            own = batch.sequence_M == b
            assert batch.target_M[own].tolist() == completion.token_ids.tolist()
            assert batch.advantages_B[b].item() == advantage
            assert batch.weights_B[b].item() == 1 / (len(completion) * total)
            for t, predictor in enumerate(batch.predictor_M[own].tolist()):
                past = paths[predictor]
                assert batch.token_ids_N[past].tolist() == [*prompt.token_ids, *completion.token_ids[:t]]
                assert batch.position_ids_N[past].tolist() == list(range(len(past)))
    teaching = [i for i, (_, _, a) in enumerate(flat) if a != 0]
    assert sorted(seen) == sorted({*teaching, *_members_of_teaching_groups(groups)})


def _members_of_teaching_groups(groups: list[Group]) -> list[int]:
    members, first = [], 0
    for g in groups:
        if not g.zero_variance:
            members += range(first, first + len(g.completions))
        first += len(g.completions)
    return members


def _paths(batch: PackedBatch) -> dict[int, list[int]]:
    """Packed position -> the positions it may see, itself last; by walking up the segments."""
    paths = {}
    for segment in batch.segments:
        ancestors: list[int] = []
        parent = segment.parent
        while parent >= 0:
            above = batch.segments[parent]
            ancestors = [*range(above.start, above.stop), *ancestors]
            parent = above.parent
        for position in range(segment.start, segment.stop):
            paths[position] = [*ancestors, *range(segment.start, position + 1)]
    return paths
