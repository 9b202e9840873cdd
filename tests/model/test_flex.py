"""The tree as a mask of flex_attention: against its definition, against our own attention, and compiled for training.

Without a GPU torch computes flex_attention in plain operations. Its check that gradients are asked for on a GPU only is
taken out: they are autograd's.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import flex_attention as torch_flex

from sapo.data import Completion, Group, Prompt
from sapo.errors import ModelError
from sapo.model import attention, flex
from sapo.model.attention import TreeLayout
from sapo.model.flex import BLOCK, TreeMask, padded_length
from sapo.training.batch import pack
from support.attention_cases import attention_by_definition, normal, query_key_value
from support.flex_cases import TREE, WIDE
from support.kernel_counts import KernelCount
from support.tree_cases import TREES, chain, visible_NN

CPU = torch.device("cpu")
every_window = pytest.mark.parametrize("window", [None, 1, 3, 17])


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


@every_window
@settings(max_examples=60, deadline=None, derandomize=True)
@given(segments=TREES)
def test_a_token_sees_what_the_definition_says_and_padding_itself(segments, window):
    mask = TreeMask(segments, CPU)
    at_N, nothing = torch.arange(mask.padded), torch.tensor(0)
    seen = mask.sees(window)(nothing, nothing, at_N[:, None], at_N)
    count = mask.num_tokens
    assert torch.equal(seen[:count, :count], visible_NN(segments, window))
    assert not seen[:count, count:].any()
    assert not seen[count:, :count].any()
    assert seen[range(count, mask.padded), range(count, mask.padded)].all()


@every_window
@pytest.mark.parametrize("segments", [TREE, WIDE, chain([400], [-1])], ids=["small", "wide", "one"])
def test_blocks_are_listed_whole_in_part_or_not_at_all(segments, window):
    mask = TreeMask(segments, CPU)
    at_N, nothing = torch.arange(mask.padded), torch.tensor(0)
    blocks = mask.blocks(window)
    # torch's own, which looks at all pairs at once.
    expected = torch_flex.create_block_mask(mask.sees(window), 1, 1, mask.padded, mask.padded, device="cpu")
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, theirs = (getattr(b, f"{part}_num_blocks")[0, 0] for b in (blocks, expected))
        assert torch.equal(counts, theirs)
        for row, count in enumerate(counts.tolist()):
            ours, others = (getattr(b, f"{part}_indices")[0, 0, row, :count].tolist() for b in (blocks, expected))
            assert sorted(ours) == sorted(others)
    seen = mask.sees(window)(nothing, nothing, at_N[:, None], at_N).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    assert int(blocks.full_kv_num_blocks.sum()) == int(seen.all(dim=3).all(dim=1).sum())


@every_window
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("segments", [TREE, WIDE], ids=["small", "wide"])
def test_flex_attention_and_its_gradient_equal_the_definition(segments, heads, kv_heads, window):
    inputs = query_key_value(segments[-1].stop, heads=heads, kv_heads=kv_heads)
    ours = TreeMask(segments, CPU).attend(*inputs, 0.7, window)
    theirs = attention_by_definition(*inputs, visible_NN(segments, window), 0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = normal(*ours.shape, seed=9)
    for a, b in zip(*(torch.autograd.grad((x * slope).sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@every_window
def test_sinks_equal_the_definition(window):
    inputs = (*query_key_value(WIDE[-1].stop), normal(4, seed=7))
    ours = TreeMask(WIDE, CPU).attend(*inputs[:3], 0.7, window, None, inputs[3])
    theirs = attention_by_definition(*inputs[:3], visible_NN(WIDE, window), 0.7, inputs[3])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_capped_scores_equal_those_of_our_own_attention():
    inputs = query_key_value(TREE[-1].stop)
    ours = TreeMask(TREE, CPU).attend(*inputs, 0.7, 3, softcap=1.5)
    theirs = TreeLayout(TREE).attend(0, *inputs, 0.7, 3, softcap=1.5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_a_policy_and_its_gradient_are_the_same_with_flex_attention(new_policy, monkeypatch, architecture):
    policy = new_policy(architecture, dtype=torch.float64)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 15, TREE[-1].stop))
    positions = torch.cat([torch.arange(s.length) + d for s, d in zip(TREE, (0, 9, 14, 14, 9, 0), strict=True)])
    found = []
    for flexible in (False, True):
        monkeypatch.setattr(attention, "takes_flex", lambda *_, flexible=flexible: flexible)
        policy.model.zero_grad()
        logits = policy.logits(policy.hidden(ids, positions, TreeLayout(TREE)))
        logits.double().log_softmax(-1)[:, 3].sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in policy.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the head is float32


def test_the_compiler_takes_the_tree_with_its_gradient_and_meets_new_trees_of_a_length_once(monkeypatch):
    # All of torch.compile but the kernels: what is traced, derived and kept for further trees.
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    plain = flex._attend
    monkeypatch.setattr(flex, "_attend", lambda _on_gpu, *inputs, **options: plain(True, *inputs, **options))
    torch._dynamo.reset()
    for segments, shapes in ((TREE, 1), (chain([30, 20, 3], [-1, 0, 0]), 1), (WIDE, 2), (TREE, 2)):
        inputs = query_key_value(segments[-1].stop)
        ours = TreeMask(segments, CPU).attend(*inputs, 0.7, None)
        theirs = attention_by_definition(*inputs, visible_NN(segments, None), 0.7)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert counter.frame_count == shapes


def test_a_kernel_that_cannot_be_compiled_names_what_does_without(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no Triton here\nand much more")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    with pytest.raises(ModelError, match=r"\(no Triton here\); SAPO_FLEX=0 does without it$"):
        flex._attend(True, torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_lengths_are_padded_to_few_sizes_and_by_half_at_most():
    sizes = {padded_length(n) for n in range(1, 65537)}
    assert all(n <= padded_length(n) < max(1.5 * n + BLOCK, 2 * BLOCK) for n in range(1, 65537))
    # By hand: one and two blocks, then two sizes to each doubling up to 512 blocks.
    assert len(sizes) == 2 + 2 * 8


def test_a_cpu_keeps_its_own_attention():
    assert not flex.takes_flex(*(torch.zeros(3, heads, 64) for heads in (4, 2, 2)))


def compiling_on_a_cpu(monkeypatch, backend):
    """Compile what a GPU would, by a backend that a CPU has; return it and a count of what was traced."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    torch._dynamo.reset()
    return counter


def test_a_shape_beyond_the_most_warns_and_goes_on(monkeypatch):
    # FailOnRecompileLimitHit is no RuntimeError: it ended a run at its 65th shape.
    counter = compiling_on_a_cpu(monkeypatch, "eager")
    monkeypatch.setattr(flex, "MOST_SHAPES", 2)

    def attend(tokens):
        query, key, value = (torch.zeros(1, heads, tokens, 16) for heads in (2, 1, 1))
        blocks = TreeMask(chain([tokens], [-1]), CPU).blocks(None)
        return flex._attend(True, query, key, value, block_mask=blocks, scale=0.25, enable_gqa=True)

    attend(128)
    attend(256)
    with pytest.warns(UserWarning, match="compiled for 2 shapes"):
        assert attend(384).shape == (1, 2, 384, 16)
    attend(384)
    assert counter.frame_count == 3


HEADS = flex.Heads(2, 1, 16, 16, torch.float32, CPU)


@pytest.mark.parametrize("heads", [HEADS, dataclasses.replace(HEADS, capped=True, sinks=True)], ids=["plain", "sinks"])
def test_a_head_shape_is_compiled_forward_and_backward_before_it_is_used(heads, monkeypatch):
    compiling_on_a_cpu(monkeypatch, "aot_eager")
    flex.kernel_for.cache_clear()
    assert flex.kernel_for(heads) == flex.Kernel(usable=True, options=None)


@pytest.mark.parametrize(("refused", "usable"), [(1, True), (2, False)])
def test_a_card_with_little_shared_memory_gets_small_tiles_or_buckets(refused, usable, monkeypatch, recwarn):
    tried = []

    def try_block(heads, options):
        tried.append(options)
        if len(tried) <= refused:
            raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(flex, "_try_block", try_block)
    flex.kernel_for.cache_clear()
    kernel = flex.kernel_for(HEADS)
    flex.kernel_for.cache_clear()
    assert tried == list(flex.KERNEL_OPTIONS)
    assert kernel == flex.Kernel(usable, flex.KERNEL_OPTIONS[1] if usable else None)
    assert ["out of resource" in str(w.message) for w in recwarn] == ([] if usable else [True])


def test_no_buckets_are_made_where_flex_attention_computes(monkeypatch):
    monkeypatch.setattr(attention, "takes_flex", lambda *_: True)
    made = []
    monkeypatch.setattr(attention, "_buckets", lambda *given: made.append(given))
    TreeLayout(TREE).attend(0, *query_key_value(TREE[-1].stop), 0.7, None)
    assert not made


def test_blocks_of_a_long_layout_take_no_operation_a_block_on_the_device():
    # One upload of the lists, and the cuts of it, however many blocks there are; ten operations a block before.
    counts = []
    for tokens in (1024, 8192):
        mask = TreeMask(chain([tokens // 2, tokens // 4, tokens // 4], [-1, 0, 0]), CPU)
        with KernelCount() as counted:
            mask._find_blocks(None)
        counts.append(counted.kernels)
    assert counts[0] == counts[1]


def test_the_micro_batches_of_many_steps_have_few_lengths_to_compile_for():
    # Two grad modes and the windows multiply this; each length took one compilation before it was counted too.
    random, lengths, count = np.random.default_rng(1), set(), 0
    for _ in range(60):
        groups = []
        for number in range(8):
            drawn = np.minimum(1024, random.lognormal(5.7, 0.7, 8).astype(int) + 1)
            completions = tuple(Completion((1,) * n, (0.0,) * n, "stop", "") for n in drawn.tolist())
            prompt = Prompt(number, "t", "", (number + 1,) + (0,) * int(random.integers(60, 300)))
            groups.append(Group(prompt, completions, (1.0, -1.0) * 4))
        settings = {"normalizer": "sequence_mean", "tokens_per_microbatch": 8192, "max_new_tokens": 1024}
        shares = pack(groups, **settings, include_all=True)
        lengths |= {padded_length(b.num_tokens) for b in shares.microbatches}
        count += len(shares.microbatches)
    assert count >= 180
    assert len(lengths) <= 12, lengths
