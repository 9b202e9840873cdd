"""Shared-prefix attention against its definition and against transformers' own forward over every path."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sapo.data import Segment
from sapo.model.attention import TreeLayout, shared_prefix_attention
from sapo.model.gather import gather_rows
from sapo.model.loading import prepare_policy
from support.attention_cases import attention_by_definition, normal, query_key_value
from support.policies import ATTENTION_ONLY
from support.tree_cases import TREES, chain, leaves_of, path_of, positions_of, visible_NN

every_architecture = pytest.mark.parametrize("architecture", ATTENTION_ONLY)
every_window = pytest.mark.parametrize("window", [None, 1, 3, 17])


@every_window
@settings(max_examples=40, deadline=None, derandomize=True)
@given(segments=TREES)
def test_tree_attention_and_its_gradient_equal_the_definition(segments, window):
    inputs = query_key_value(segments[-1].stop)
    ours = TreeLayout(segments).attend(0, *inputs, 0.7, window)
    theirs = attention_by_definition(*inputs, visible_NN(segments, window), 0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = normal(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((x * slope).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 1.5])
@every_window
@settings(max_examples=20, deadline=None, derandomize=True)
@given(segments=TREES)
def test_attention_with_sinks_and_its_gradient_equal_the_definition(segments, window, softcap):
    inputs = (*query_key_value(segments[-1].stop), normal(4, seed=7).requires_grad_())
    ours = TreeLayout(segments).attend(0, *inputs[:3], 0.7, window, softcap, inputs[3])
    theirs = attention_by_definition(*inputs[:3], visible_NN(segments, window), 0.7, inputs[3], softcap)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = normal(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((x * slope).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_layer_that_attends_twice_in_a_forward_has_two_numbers():
    layout = TreeLayout((Segment(0, 5, -1),), on_keys=lambda layer, *_: seen.append(layer))
    seen: list[int] = []
    for _ in range(2):
        attend(packed_layout=layout)
    layout.calls.clear()  # as the next forward does
    attend(packed_layout=layout)
    assert len(set(seen)) == 2
    assert seen[0] == seen[2]


@every_window
@settings(max_examples=40, deadline=None, derandomize=True)
@given(segments=TREES)
def test_every_query_of_the_kernel_sees_a_key_even_where_it_is_padding(segments, window):
    # A row without keys is 0/0: what comes of it, NaN or 0, is left to the kernel, and its gradient too.
    for bucket in TreeLayout(segments).buckets:
        assert bool((bucket.mask(window, torch.float32) == 0).any(-1).all())


def run_paths(model, ids_N, segments):
    """{leaf: (path, its last hidden states)} by the model's own forward, one path at a time."""
    hidden = {}
    for leaf in leaves_of(segments):
        path = path_of(segments, leaf)
        output = model.get_decoder()(input_ids=ids_N[path][None], use_cache=False)
        hidden[leaf] = (path, output.last_hidden_state[0])
    return hidden


def random_ids(segments, vocabulary, seed=0):
    return torch.randint(vocabulary, (segments[-1].stop,), generator=torch.Generator().manual_seed(seed))


@every_architecture
@settings(max_examples=12, deadline=None, derandomize=True)
@given(segments=TREES)
def test_packed_forward_equals_a_plain_forward_over_every_path(architecture, segments, policies, plain):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        policy = policies(architecture, dtype=dtype)
        ids_N = random_ids(segments, policy.head_weight.shape[0])
        with torch.no_grad():
            packed_NH = policy.hidden(ids_N, positions_of(segments), TreeLayout(segments))
            for path, hidden in run_paths(plain(policy), ids_N, segments).values():
                torch.testing.assert_close(packed_NH[path], hidden, rtol=0, atol=tolerance)


TRAINING_TREE = chain([9, 3, 7, 1, 23, 11, 2, 5, 30, 30, 4, 1], [-1, 0, 1, 2, 2, 2, 2, 1, 7, 7, 7, -1])
"""Two preambles, two prompts with four and three responses, and a root of one token."""


@every_architecture
def test_gradients_of_the_packed_forward_equal_those_of_the_plain_paths(architecture, policies, plain):
    policy = policies(architecture, dtype=torch.float64)
    segments = TRAINING_TREE
    ids_N = random_ids(segments, policy.head_weight.shape[0])
    packed_NH = policy.hidden(ids_N, positions_of(segments), TreeLayout(segments))
    slope_NH = normal(*packed_NH.shape, seed=4)
    ours = torch.autograd.grad((packed_NH * slope_NH).sum(), decoder_parameters(policy.model))
    # A token on n paths is counted n times there, each time with a weight of 1/n.
    model = plain(policy)
    paths = run_paths(model, ids_N, segments).values()
    count_N = torch.zeros(len(ids_N), dtype=torch.float64)
    for path, _ in paths:
        count_N[path] += 1
    total = sum(((hidden * slope_NH[path]).sum(-1) / count_N[path]).sum() for path, hidden in paths)
    theirs = torch.autograd.grad(total, decoder_parameters(model))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)


def decoder_parameters(model):
    return list(model.get_decoder().parameters())


@every_architecture
def test_other_tokens_leave_a_segment_unchanged(architecture, policies):
    # Segments 3 and 4 differ by 22 tokens, 8 and 9 share a bucket; each may depend on its own path only.
    policy = policies(architecture, dtype=torch.float64)
    segments, vocabulary = TRAINING_TREE, policy.head_weight.shape[0]
    ids_N, layout = random_ids(segments, vocabulary), TreeLayout(TRAINING_TREE)
    with torch.no_grad():
        before_NH = policy.hidden(ids_N, positions_of(segments), layout)
        for i in range(len(segments)):
            path = path_of(segments, i)
            changed_N = (ids_N + 1) % vocabulary
            changed_N[path] = ids_N[path]
            after_NH = policy.hidden(changed_N, positions_of(segments), layout)
            torch.testing.assert_close(after_NH[path], before_NH[path], rtol=0, atol=1e-12)
            assert len(path) == len(ids_N) or not torch.equal(after_NH, before_NH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_not_even_nan_leaks_from_another_segment(dtype):
    segments = TRAINING_TREE
    inputs = [x.detach() for x in query_key_value(segments[-1].stop, dtype)]
    layout = TreeLayout(segments)
    clean = layout.attend(0, *inputs, 0.3, None)
    for i in range(len(segments)):
        path = path_of(segments, i)
        dirty = [torch.full_like(x, torch.nan) for x in inputs]
        for x, y in zip(dirty, inputs, strict=True):
            x[path] = y[path]
        assert torch.equal(layout.attend(0, *dirty, 0.3, None)[path], clean[path])


def test_the_window_of_the_tiny_mistral_is_honoured(policies):
    # By hand: two layers of a window of 6 carry a token at most 2 * 5 positions on.
    policy = policies("mistral", dtype=torch.float64)
    segments = chain([8, 12], [-1, 0])
    ids_N = random_ids(segments, policy.head_weight.shape[0])
    changed_N = ids_N.clone()
    changed_N[3] += 1 if ids_N[3] == 0 else -1
    with torch.no_grad():
        moved_N = (
            (
                policy.hidden(ids_N, positions_of(segments), TreeLayout(segments))
                - policy.hidden(changed_N, positions_of(segments), TreeLayout(segments))
            )
            .abs()
            .amax(-1)
        )
    assert bool((moved_N[:3] == 0).all())
    assert bool((moved_N[3:14] > 1e-9).all())
    assert bool((moved_N[14:] < 1e-13).all())


def test_segments_of_like_size_share_a_bucket_and_unlike_ones_do_not():
    # By hand from the rule: within 3/4 or 16 tokens of the first, in queries and in keys.
    prompts = chain([100, 80, 70, 20, 5], [-1] * 5)
    assert sorted(b.size for b in TreeLayout(prompts).buckets) == [(1, 70, 70), (2, 20, 20), (2, 100, 100)]
    responses = chain([200, 40, 30, 10], [-1, 0, 0, 0])
    assert sorted(b.size for b in TreeLayout(responses).buckets) == [(1, 10, 210), (1, 200, 200), (2, 40, 240)]


def test_responses_to_one_long_prompt_share_a_mask_and_take_their_turns():
    """By hand: 25 rows of 600 + 40 keys have 16,000, and one more would have 16,640 where 16,384 are allowed."""
    segments = chain([600, *[40] * 30, 620, *[40] * 4], [-1, *[0] * 30, -1, *[31] * 4])
    buckets = TreeLayout(segments).buckets
    assert sorted(b.size for b in buckets) == [(2, 620, 620), (4, 40, 660), (5, 40, 640), (25, 40, 640)]
    for bucket in buckets:
        _, queries, keys = bucket.size
        assert bucket.mask(None, torch.float32).shape == (1, 1, queries, keys)
        assert bucket.mask_numbers == queries * keys


@pytest.mark.parametrize("window", [None, 300])
def test_long_trees_attend_as_the_definition_says_with_masks_that_are_shared(window):
    """Responses of unequal length to two prompts of unequal length: queries and keys are padded."""
    segments = chain([530, 60, 7, 50, 3, 515, 49, 60, 20], [-1, 0, 0, 0, 0, -1, 5, 5, 5])
    assert any(len(b.padding) and b.size[0] > 1 and len(b.prefix_b) == 1 for b in TreeLayout(segments).buckets)
    inputs = query_key_value(segments[-1].stop)
    ours = TreeLayout(segments).attend(0, *inputs, 0.7, window)
    theirs = attention_by_definition(*inputs, visible_NN(segments, window), 0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = normal(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((x * slope).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "segments",
    [
        (Segment(1, 4, -1),),
        (Segment(0, 4, -1), Segment(5, 2, 0)),
        (Segment(0, 4, -1), Segment(4, 0, 0)),
        (Segment(0, 4, 0),),
        (Segment(0, 4, 1), Segment(4, 4, -1)),
    ],
    ids=["late start", "gap", "empty", "own parent", "child first"],
)
def test_segments_that_are_no_packed_tree_are_refused(segments):
    with pytest.raises(AssertionError, match="segment"):
        TreeLayout(segments)


def test_keys_are_handed_over_once_per_layer(policies):
    policy = policies("qwen3")
    segments = chain([5, 3, 2], [-1, 0, 0])
    seen = []
    layout = TreeLayout(segments, on_keys=lambda layer, key, value: seen.append((layer, key.shape, value.shape)))
    with torch.no_grad():
        policy.hidden(random_ids(segments, 17), positions_of(segments), layout)
    assert seen == [(layer, (10, 2, 8), (10, 2, 8)) for layer in range(2)]


class Layer(nn.Module):
    layer_idx = 0


def attend(num_tokens=5, **options):
    query, key, value = (x[None].transpose(1, 2) for x in query_key_value(num_tokens))
    layout = TreeLayout((Segment(0, num_tokens, -1),))
    return shared_prefix_attention(Layer(), query, key, value, None, **{"packed_layout": layout, **options})[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_layout": None}, r"packed_layout=.*set_attn_implementation\('sdpa'\)"),
        ({"dropout": 0.1}, r"dropout must be 0 .* got 0\.1"),
    ],
    ids=["layout", "dropout"],
)
def test_what_is_not_computed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attend(**options)


def test_scores_are_scaled_by_the_root_of_the_head_size_unless_told_otherwise():
    # The heads of these tests have 8 channels.
    assert torch.equal(attend(), attend(scaling=8**-0.5))
    assert not torch.equal(attend(), attend(scaling=1.0))
    assert attend().shape == (1, 5, 4, 8)


def test_a_prepared_model_called_without_a_layout_says_how_to_generate(policies):
    with pytest.raises(ValueError, match="packed_layout"):
        policies("llama").model(input_ids=torch.tensor([[1, 2, 3]]))


def test_preparing_a_model_twice_changes_nothing(new_policy):
    first = new_policy("qwen3")
    segments = chain([4, 3], [-1, 0])
    arguments = (random_ids(segments, 17), positions_of(segments), TreeLayout(segments))
    with torch.no_grad():
        before = first.hidden(*arguments)
        again = prepare_policy(first.model, first.tokenizer)
        assert torch.equal(again.hidden(*arguments), before)


def test_gather_rows_equals_indexing_with_its_gradient_at_repeated_indices():
    source = normal(6, 3, 2).requires_grad_()
    index = torch.tensor([5, 0, 0, 3, 5, 5, 1])
    slope = normal(7, 3, 2, seed=1)
    ours, theirs = gather_rows(source, index), source[index]
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad((x * slope).sum(), source)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-15)
    assert bool((gradients[0][[2, 4]] == 0).all())
    flat = normal(6, 3)
    assert torch.equal(gather_rows(flat, index), flat[index])
