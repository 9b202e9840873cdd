"""Products and decode steps of packed.c against float64, the plain model and themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sapo.data import Group, Prompt
from sapo.rollout.engine import Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.cpu import native
from sapo.rollout.local.cpu.packed import PackedBlocks, Panels
from sapo.rollout.local.decoder import FastDecoder, copied_bytes
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.layouts import Arrangement
from sapo.rollout.local.packing import PACKED_CALLS
from sapo.rollout.params import SamplingParams
from support.decoder_cases import MODELS, make
from support.plain_models import plain_copy

FOUND = native.kernels(torch.device("cpu"), torch.float32)
KNOWN = set() if FOUND is None else FOUND.packed_precisions
pytestmark = pytest.mark.skipif(not KNOWN, reason="packed.c is not for this processor, or there is no compiler")

PRECISIONS = [torch.float32, torch.bfloat16]
every_precision = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
# Tiles of 1 to 14 rows, several tiles, and more rows than are taken at once; whole panels and parts of one.
every_size = pytest.mark.parametrize("rows", [*range(1, 15), 15, 43, 225])
every_width = pytest.mark.parametrize("outputs", [32, 96, 1, 21, 50])
MIXTURES = [name for name in MODELS if "moe" in name]


def panels(dtype):
    if dtype not in KNOWN:
        pytest.skip(f"packed.c does not multiply {dtype} on this processor")
    return Panels(FOUND, dtype)


def normal(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got, exact, dtype):
    """To the rounding of 24 bits with sums of some dozens, or of 8."""
    torch.testing.assert_close(got.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=2e-5)


@every_precision
@every_size
@every_width
def test_products_are_those_of_float64(rows, outputs, dtype):
    x, bias = normal(rows, 70, seed=1, dtype=dtype), normal(outputs, seed=2, dtype=dtype)
    weight = normal(outputs, 70, seed=3, dtype=dtype)
    exact = x.double() @ weight.double().T
    plain, biased = (panels(dtype).linear([weight], [b]) for b in (None, bias))
    assert_near(plain(x), exact, dtype)
    assert_near(biased(x), exact + bias.double(), dtype)
    assert biased(x).dtype == dtype
    assert biased.widened(x).dtype == torch.float32
    assert torch.equal(biased.widened(x), biased(x).float())


@every_precision
def test_joined_weights_give_their_outputs_one_behind_the_other(dtype):
    x, weights = normal(9, 70, seed=1, dtype=dtype), [normal(n, 70, seed=n, dtype=dtype) for n in (48, 16, 21)]
    joined = panels(dtype).linear(weights, [None] * 3)
    each = [panels(dtype).linear([w], [None])(x) for w in weights]
    assert torch.equal(joined(x), torch.cat(each, dim=1))


@every_precision
@every_size
@pytest.mark.parametrize("bias", [False, True])
def test_gates_are_those_of_float64(rows, dtype, bias):
    packer = panels(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gate, up = (nn.Linear(70, 48, bias=bias).to(dtype) for _ in range(2))
    x = 3 * normal(rows, 70, seed=1, dtype=dtype)
    got = packer.gated((gate.weight, up.weight), (gate.bias, up.bias))(x)
    exact = F.silu(gate.double()(x.double())) * up.double()(x.double())
    # In bfloat16 gate, silu(gate) and up are rounded as well, each to 8 bits.
    torch.testing.assert_close(got.double(), exact, rtol=1e-5 if dtype == torch.float32 else 2**-5, atol=1e-4)


@every_precision
def test_a_row_of_a_product_is_the_same_to_the_bit_whatever_the_rows_around_it(dtype):
    linear = panels(dtype).linear([normal(50, 576, seed=3, dtype=dtype)], [None])
    x = normal(300, 576, seed=1, dtype=dtype)
    whole = linear(x)
    for start, stop in ((0, 1), (7, 9), (3, 16), (100, 164), (223, 300)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop])


def requests(count=5, samples=3, common=0):
    ids = [tuple((3 * i + j * (i + 1)) % 19 for j in range(3 + 7 * i)) for i in range(count)]
    return [Request(Prompt(i, "test", "", (4,) * common + own), samples) for i, own in enumerate(ids)]


def settings(**options):
    return SamplingParams(**{"max_new_tokens": 40, "stop_token_ids": frozenset({2, 7}), **options})


def drawn(policy, asked, **options):
    return LocalEngine(policy, max_rows=8).generate(asked, settings(**options))


@torch.no_grad()
def logprobs_of(model, prompt, completion):
    """By transformers, of the completion's tokens."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    logp_TV = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    first = len(prompt.token_ids) - 1
    return logp_TV[range(first, first + len(completion)), list(completion.token_ids)]


@pytest.mark.parametrize("common", [0, 17], ids=["no preamble", "preamble"])
@pytest.mark.parametrize("name", MODELS)
def test_drawn_logprobs_are_those_of_transformers(name, common, monkeypatch):
    steps = []
    add = PackedBlocks.add
    monkeypatch.setattr(PackedBlocks, "add", lambda self, *given: (steps.append(1), add(self, *given))[1])
    policy, asked = make(name), requests(common=common)
    results, model = drawn(policy, asked), plain_copy(policy.model)
    assert len(steps) > 12  # rows leave and others take their places meanwhile
    for request, group in zip(asked, results, strict=True):
        for completion in group:
            expected = logprobs_of(model, request.prompt, completion)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=3e-5)
    assert len({len(c) for group in results for c in group}) > 4


@pytest.mark.parametrize("name", ["llama", "llama, biases", "mistral, window", "qwen2", "qwen3", "qwen3, wide heads"])
def test_in_bfloat16_drawn_logprobs_are_as_near_to_float32_as_those_of_transformers(name):
    panels(torch.bfloat16)
    policy, asked = make(name, torch.bfloat16), requests(common=17)
    assert FastDecoder(policy, PACKED_CALLS).blocks is not None
    pairs = [(r.prompt, c) for r, group in zip(asked, drawn(policy, asked), strict=True) for c in group]
    model = plain_copy(policy.model)
    theirs = torch.cat([logprobs_of(model, *pair) for pair in pairs])
    exact = torch.cat([logprobs_of(model.float(), *pair) for pair in pairs])
    ours = torch.cat([torch.tensor(c.logprobs) for _, c in pairs])
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean() + 1e-3


@every_precision
def test_threads_and_repetition_change_no_bit_of_a_completion(dtype):
    panels(dtype)
    policy, asked = make("qwen3", dtype), requests()
    found = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(drawn(policy, asked))
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1] == found[2] == found[3]


def test_weights_that_do_not_fit_are_left_to_other_products():
    """By hand: 100 inner units are no whole registers of 16; a head of 8 numbers is half of one."""
    assert FastDecoder(make("llama"), PACKED_CALLS).blocks is not None
    for options in ({"intermediate_size": 100}, {"num_attention_heads": 8, "hidden_size": 64}):
        assert FastDecoder(make("llama", **options), PACKED_CALLS).blocks is None
    assert FastDecoder(make("llama"), PACKED_CALLS - 1).blocks is None
    assert FastDecoder(make("qwen3_moe"), PACKED_CALLS).blocks is not None
    assert FastDecoder(make("qwen3_moe", moe_intermediate_size=40), PACKED_CALLS).blocks is None


def recorded(policy, asked):
    """Drawn completions, and the experts of each one's tokens: (tokens, layers, experts of a token)."""
    log = ExpertLog()
    drawn = LocalEngine(policy, max_rows=8).generate(asked, settings(), experts=log)

    def array(experts):
        return np.frombuffer(experts.indices, np.uint8).reshape(-1, experts.layers, experts.per_token)

    groups = log.attach([Group(r.prompt, completions) for r, completions in zip(asked, drawn, strict=True)])
    prompts = {i: array(group.prompt_experts) for i, group in enumerate(groups)}
    decoded = {(i, j): array(c.experts) for i, group in enumerate(groups) for j, c in enumerate(group.completions)}
    return drawn, prompts, decoded


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_told_are_those_that_transformers_chooses(name):
    policy, asked = make(name), requests()
    groups, prompts, decoded = recorded(policy, asked)
    model, told = plain_copy(policy.model), []
    routers = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]
    for router in routers:
        router.register_forward_hook(lambda module, given, output: told.append(output[2]))
    for i, (request, group) in enumerate(zip(asked, groups, strict=True)):
        for j, completion in enumerate(group):
            told.clear()
            logprobs_of(model, request.prompt, completion)
            expected_Nlk = torch.stack(told, dim=1).numpy()
            # The last token drawn went through no model.
            ours = np.concatenate([prompts[i], decoded[i, j]])
            assert np.array_equal(ours, expected_Nlk[: len(ours)])
            assert len(ours) == len(expected_Nlk) - 1
    assert len(set(np.concatenate(list(decoded.values())).ravel().tolist())) == 6  # all of MOE's experts


@every_precision
@pytest.mark.parametrize("name", MIXTURES)
def test_threads_and_company_change_no_bit_of_a_mixture(name, dtype):
    panels(dtype)
    policy, asked = make(name, dtype), requests()
    free = settings(stop_token_ids=frozenset())
    together = LocalEngine(policy).generate(asked, free)
    # All prompts are here, for their prefill is computed together; all but one sample leave after a token.
    alone = [Request(r.prompt, r.samples, (40,) + (1,) * (r.samples - 1)) for r in asked]
    lonely = LocalEngine(policy).generate(alone, free)
    assert [group[0] for group in lonely] == [group[0] for group in together]
    # Of the kernels alone: torch's own operations on the prompts may round differently.
    for threads in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda count=threads: count)
            assert LocalEngine(policy).generate(asked, free) == together


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe, shares left"])
def test_a_mixture_in_bfloat16_is_as_near_to_float32_as_that_of_transformers(name):
    """A token whose router is undecided may go to another expert, so most tokens are looked at, and not all."""
    panels(torch.bfloat16)
    policy, asked = make(name, torch.bfloat16), requests(common=17)
    assert FastDecoder(policy, PACKED_CALLS).blocks is not None
    pairs = [(r.prompt, c) for r, group in zip(asked, drawn(policy, asked), strict=True) for c in group]
    model = plain_copy(policy.model)
    theirs = torch.cat([logprobs_of(model, *pair) for pair in pairs])
    exact = torch.cat([logprobs_of(model.float(), *pair) for pair in pairs])
    ours = torch.cat([torch.tensor(c.logprobs) for _, c in pairs])
    assert (ours - exact).abs().median() <= 1.5 * (theirs - exact).abs().median() + 1e-3


@pytest.mark.parametrize("place", [0, 5])
def test_a_router_that_is_not_a_number_leaves_no_log_probability(place):
    policy = make("qwen3_moe")
    with torch.no_grad():
        policy.decoder.layers[1].mlp.gate.weight[place] = torch.nan
    decoder = FastDecoder(policy, PACKED_CALLS)
    assert decoder.blocks is not None
    for completion in drawn(policy, requests(1, 2))[0]:
        assert np.isnan(completion.logprobs[1:]).all()
        assert all(0 <= token < 21 for token in completion.token_ids)


def test_the_panels_of_experts_are_counted():
    policy = make("qwen3_moe, one dense layer")
    decoder = FastDecoder(policy, PACKED_CALLS)
    linears = [decoder.head]
    for layer in decoder.layers:
        linears += [layer.qkv, layer.out]
        packed = getattr(layer.mlp, "packed", None)
        linears += [layer.mlp.gated, layer.mlp.down] if packed is None else [packed.router, *packed.gated, *packed.down]
    assert copied_bytes(policy, PACKED_CALLS) == sum(linear.weight.numel() for linear in linears)


def test_rows_are_not_gathered_by_prompt_where_torch_attends_to_nothing(monkeypatch):
    policy = make("qwen3")
    expected = drawn(policy, requests())
    monkeypatch.setattr(Arrangement, "gathered", property(lambda _: pytest.fail("rows were gathered")))
    assert drawn(policy, requests()) == expected
