"""The local engine against transformers: greedy text, log-probabilities, and what may not depend on the batch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sapo.data import Prompt
from sapo.errors import ConfigError, Interrupted
from sapo.rollout.engine import Request
from sapo.rollout.local import engine as local
from sapo.rollout.local.decoder import decoder_of
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.layouts import DecodeLayout, PrefillLayout
from sapo.rollout.vllm.engine import VllmEngine
from support.engine_cases import (
    PROMPT_LENGTHS,
    SAMPLES,
    assert_same,
    flat,
    params,
    plain_logprobs,
    ragged_requests,
    random_ids,
    request,
)


class Calls:
    """What the engine asked of the decoder: tokens of each prefill, rows of each decode step."""

    def __init__(self, monkeypatch):
        self.prefills, self.decodes = [], []
        self.decoder = None
        monkeypatch.setattr(local, "decoder_of", self.watch)

    def watch(self, policy, calls, on_experts=None):
        self.decoder = decoder_of(policy, calls, on_experts)
        return self

    def hidden(self, token_ids_N, position_ids_N, layout):
        kinds = {PrefillLayout: self.prefills, DecodeLayout: self.decodes}
        kinds[type(layout)].append(len(token_ids_N))
        return self.decoder.hidden(token_ids_N, position_ids_N, layout)

    def logits(self, hidden_NH):
        return self.decoder.logits(hidden_NH)


def generate_by_transformers(model, token_ids, stops, max_new_tokens):
    ids = torch.tensor([token_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=16,
    )
    return tuple(output[0, len(token_ids) :].tolist())


def test_greedy_tokens_equal_those_of_transformers_generate(policy, plain):
    requests = ragged_requests(samples=(1,) * 6)
    free = LocalEngine(policy).generate(
        requests, params(temperature=0.0, max_new_tokens=24, stop_token_ids=frozenset())
    )
    # One stop token that some completion has in its middle, so that rows finish at different steps.
    stop = max(flat(free), key=lambda c: len(set(c.token_ids))).token_ids[7]
    for stops in (frozenset(), frozenset({stop})):
        settings = params(temperature=0.0, max_new_tokens=24, stop_token_ids=stops)
        for (completion,), asked in zip(LocalEngine(policy).generate(requests, settings), requests, strict=True):
            expected = generate_by_transformers(plain(policy), asked.prompt.token_ids, stops, 24)
            assert tuple(completion.token_ids) == expected
            stopped = expected[-1] in stops
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(expected) == 24
    assert any(stop in c.token_ids for c in flat(free))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_rows", [256, 5])
def test_sampled_logprobs_equal_a_plain_forward(policy, plain, temperature, max_rows):
    requests = ragged_requests()
    results = LocalEngine(policy, max_rows).generate(requests, params(temperature=temperature))
    for asked, group in zip(requests, results, strict=True):
        assert len(group) == asked.samples
        for completion in group:
            expected = plain_logprobs(plain(policy), asked.prompt.token_ids, completion, temperature)
            assert len(completion.logprobs) == len(completion.token_ids)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)
    assert len({len(c) for c in flat(results)}) > 4


def test_greedy_logprobs_are_those_of_the_untempered_policy(policies, plain):
    policy, asked = policies("qwen3"), request(random_ids(6, 0))
    ((completion,),) = LocalEngine(policy).generate([asked], params(temperature=0.0))
    expected = plain_logprobs(plain(policy), asked.prompt.token_ids, completion, 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_rows", [256, 5])
def test_each_prompt_is_prefilled_once_for_all_its_samples(policies, monkeypatch, max_rows):
    policy = policies("qwen3")
    calls = Calls(monkeypatch)
    LocalEngine(policy, max_rows).generate(ragged_requests(), params())
    assert sum(calls.prefills) == sum(PROMPT_LENGTHS)
    assert (len(calls.prefills) > 1) == (max_rows == 5)


@pytest.mark.parametrize(("common", "saved"), [(15, 0), (16, 3 * 16), (40, 3 * 40)])
def test_a_beginning_of_sixteen_tokens_that_all_share_is_prefilled_once(policies, plain, monkeypatch, common, saved):
    policy = policies("mistral")
    # Four prompts that differ right after what they share.
    prompts = [(*random_ids(common, 1), i, *random_ids(i, 2)) for i in range(4)]
    requests = [request(p, 2, prompt_id=i) for i, p in enumerate(prompts)]
    calls = Calls(monkeypatch)
    results = LocalEngine(policy).generate(requests, params())
    assert sum(calls.prefills) == sum(map(len, prompts)) - saved
    for asked, group in zip(requests, results, strict=True):
        for completion in group:
            expected = plain_logprobs(plain(policy), asked.prompt.token_ids, completion, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_long_prompts_are_prefilled_in_several_calls(policies, monkeypatch):
    policy = policies("qwen3")
    whole = LocalEngine(policy).generate(ragged_requests(), params())
    monkeypatch.setattr(local, "PREFILL_TOKENS", 20)
    calls = Calls(monkeypatch)
    parts = LocalEngine(policy).generate(ragged_requests(), params())
    # By hand from the lengths 5, 1, 23, 9, 5, 14: a prompt too long for the limit goes alone.
    assert calls.prefills == [6, 23, 14, 14]
    for ours, theirs in zip(flat(parts), flat(whole), strict=True):
        assert_same(ours, theirs)


def test_a_bias_of_the_output_embedding_counts(new_policy, plain):
    policy, asked = new_policy("qwen3"), request(random_ids(6, 0), 3)
    policy.model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 17))
    for completion in LocalEngine(policy).generate([asked], params())[0]:
        expected = plain_logprobs(plain(policy), asked.prompt.token_ids, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_a_completion_is_the_same_whatever_else_is_in_the_batch(policy):
    requests, settings = ragged_requests(), params()
    together = LocalEngine(policy).generate(requests, settings)
    order = [3, 5, 0, 2, 4, 1]
    reordered = LocalEngine(policy).generate([requests[i] for i in order], settings)
    for place, i in enumerate(order):
        for ours, theirs in zip(reordered[place], together[i], strict=True):
            assert_same(ours, theirs)
    for asked, group in zip(requests, together, strict=True):
        (alone,) = LocalEngine(policy).generate([asked], settings)
        (first,) = LocalEngine(policy).generate([Request(asked.prompt, 1)], settings)
        for ours, theirs in zip((*alone, *first), (*group, group[0]), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("max_rows", [1, 2, 5, 6, 7, 9, 11, 15, 16])
def test_the_number_of_rows_changes_no_completion(policies, monkeypatch, max_rows):
    policy, requests = policies("qwen3"), ragged_requests()
    together = LocalEngine(policy).generate(requests, params())
    calls = Calls(monkeypatch)
    results = LocalEngine(policy, max_rows).generate(requests, params())
    for ours, theirs in zip(flat(results), flat(together), strict=True):
        assert_same(ours, theirs)
    # A group of five samples decodes as one, whatever max_rows says.
    assert max(calls.decodes) <= max(max_rows, max(SAMPLES))


def test_samples_and_seeds_differ_and_repeat(policies):
    engine, asked = LocalEngine(policies("llama")), [request(random_ids(8, 3), 12)]
    settings = params(stop_token_ids=frozenset())
    (group,) = engine.generate(asked, settings)
    assert len({tuple(c.token_ids) for c in group}) == 12
    assert engine.generate(asked, settings) == [group]
    (other,) = engine.generate(asked, params(stop_token_ids=frozenset(), seed=6))
    assert not {tuple(c.token_ids) for c in group} & {tuple(c.token_ids) for c in other}
    (renamed,) = engine.generate([request(random_ids(8, 3), 12, prompt_id=1)], settings)
    assert not {tuple(c.token_ids) for c in group} & {tuple(c.token_ids) for c in renamed}


def test_finished_rows_leave_the_batch(policies, monkeypatch):
    policy = policies("qwen3")
    calls = Calls(monkeypatch)
    completions = flat(LocalEngine(policy).generate(ragged_requests(), params()))
    # The first token comes from the prefill; decode step t makes token t + 1 of those that go on.
    expected = [sum(len(c) > t for c in completions) for t in range(1, max(map(len, completions)))]
    assert calls.decodes == expected
    assert len(set(expected)) > 4


def test_waiting_prompts_take_the_places_of_finished_rows(policies, monkeypatch):
    policy, requests = policies("qwen3"), [request(random_ids(4, i), 1, prompt_id=i) for i in range(12)]
    calls = Calls(monkeypatch)
    completions = flat(LocalEngine(policy, max_rows=3).generate(requests, params()))
    assert sum(calls.decodes) == sum(len(c) - 1 for c in completions)
    # By hand, one line of three seats: whoever is next sits down as soon as a seat is free.
    free_at = [0, 0, 0]
    for completion in completions:
        seat = free_at.index(min(free_at))
        free_at[seat] += len(completion)
    assert len(calls.prefills) > 3
    assert len(calls.decodes) <= max(free_at)


def test_a_completion_stops_at_its_first_stop_token_and_keeps_it(policies):
    settings = params()
    completions = flat(LocalEngine(policies("qwen3")).generate(ragged_requests(), settings))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        assert not settings.stop_token_ids & set(c.token_ids[:-1])
        if c.finish_reason == "stop":
            assert c.token_ids[-1] in settings.stop_token_ids
        else:
            assert len(c) == 16
            assert c.token_ids[-1] not in settings.stop_token_ids


def test_a_stop_token_in_the_last_place_counts_as_a_stop(policies):
    engine, asked = LocalEngine(policies("qwen3")), [request(random_ids(6, 0))]
    (((free),),) = engine.generate(asked, params(max_new_tokens=5, stop_token_ids=frozenset()))
    last = free.token_ids[-1]
    assert last not in free.token_ids[:-1]
    ((stopped,),) = engine.generate(asked, params(max_new_tokens=5, stop_token_ids=frozenset({last})))
    assert tuple(stopped.token_ids) == tuple(free.token_ids)
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_one_new_token_needs_no_decode_step(policies, monkeypatch):
    policy = policies("llama")
    calls = Calls(monkeypatch)
    results = LocalEngine(policy).generate(ragged_requests(), params(max_new_tokens=1))
    assert [len(group) for group in results] == list(SAMPLES)
    assert all(len(c) == 1 for c in flat(results))
    assert calls.decodes == []


def test_results_come_in_the_order_of_the_requests(policies, plain):
    # The shortest budget of rows and prompts of one token: each group's tokens must suit its own prompt.
    policy, tokens = policies("llama"), (3, 9, 1, 14, 6)
    requests = [request((token,), 2, prompt_id=token) for token in tokens]
    results = LocalEngine(policy, max_rows=2).generate(requests, params(max_new_tokens=6, temperature=0.0))
    expected = [generate_by_transformers(plain(policy), (t,), params().stop_token_ids, 6) for t in tokens]
    assert len(set(expected)) == len(tokens)
    assert [[tuple(c.token_ids) for c in group] for group in results] == [[e, e] for e in expected]


def test_text_is_decoded_without_the_stop_token_and_special_tokens(policies):
    policy = policies("qwen3")
    completions = flat(LocalEngine(policy).generate(ragged_requests(), params(stop_token_ids=frozenset({2}))))
    # By hand from the alphabet: token i is its character i, 15 is the end, 16 is padding.
    for c in completions:
        body = c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids
        assert c.text == "".join("0123456789+-*=?"[i] for i in body if i < 15)
    ids = {i for c in completions for i in c.token_ids}
    assert {2, 15, 16} <= ids


def test_what_does_not_fit_the_positions_of_the_model_is_refused(new_policy):
    engine = LocalEngine(new_policy("llama", max_length=32))
    fits = engine.generate([request(random_ids(16, 0))], params(stop_token_ids=frozenset()))
    assert len(fits[0][0]) == 16
    with pytest.raises(ValueError, match=r"the model's 32 positions; got a prompt of 17 tokens and max_new_tokens 16"):
        engine.generate([request(random_ids(3, 0)), request(random_ids(17, 0))], params())


def test_generation_can_be_interrupted_between_two_tokens(policies, monkeypatch):
    policy = policies("qwen3")
    calls = Calls(monkeypatch)
    answers = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        LocalEngine(policy).generate(ragged_requests(), params(), lambda: next(answers))
    assert (len(calls.prefills), len(calls.decodes)) == (1, 2)
    with pytest.raises(Interrupted):
        LocalEngine(policy).generate(ragged_requests(), params(), lambda: True)
    assert (len(calls.prefills), len(calls.decodes)) == (1, 2)


def test_nothing_asked_gives_nothing(policies):
    assert LocalEngine(policies("qwen3")).generate([], params()) == []


def test_generation_leaves_no_graph_and_no_gradient(policies):
    policy = policies("qwen3")
    LocalEngine(policy).generate(ragged_requests(), params(max_new_tokens=3))
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_a_bfloat16_policy_samples_with_logprobs_near_a_plain_forward(policies, plain, architecture):
    # bfloat16 keeps 8 bits: the mean log-probability may be off by a few hundredths, a single one by more.
    policy = policies(architecture, dtype=torch.bfloat16)
    requests = ragged_requests()
    results = LocalEngine(policy).generate(requests, params())
    off = [
        (torch.tensor(c.logprobs) - plain_logprobs(plain(policy).float(), r.prompt.token_ids, c, 1.0)).abs().mean()
        for r, group in zip(requests, results, strict=True)
        for c in group
    ]
    assert torch.stack(off).mean() < 0.03


@pytest.mark.parametrize("max_rows", [256, 5])
def test_each_sample_is_held_to_its_own_limit(policies, max_rows):
    policy = policies("qwen3")
    settings = params(stop_token_ids=frozenset())
    free = LocalEngine(policy).generate(ragged_requests(), settings)
    generator = np.random.default_rng(0)
    requests = [replace(r, limits=tuple(generator.integers(1, 17, r.samples).tolist())) for r in ragged_requests()]
    for asked, group, whole in zip(
        requests, LocalEngine(policy, max_rows).generate(requests, settings), free, strict=True
    ):
        for limit, short, long in zip(asked.limits, group, whole, strict=True):
            assert tuple(short.token_ids) == tuple(long.token_ids[:limit])
            assert short.finish_reason == "length"
            assert len(short) == limit


def test_groups_whose_last_rows_linger_keep_their_prompts_and_lose_no_completion(policies):
    policy = policies("qwen3")
    settings = params(stop_token_ids=frozenset())
    requests = [Request(Prompt(i, "t", "", tuple(random_ids(5, seed=i))), 4, limits=(16, 1, 1, 1)) for i in range(12)]
    together = LocalEngine(policy).generate(requests, settings)
    # Nine rows hold two groups whole, and the last rows of many more.
    in_turns = LocalEngine(policy, max_rows=9).generate(requests, settings)
    ours, expected = ([[tuple(c.token_ids) for c in group] for group in drawn] for drawn in (in_turns, together))
    assert ours == expected


def test_a_request_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a sample or more of a prompt of a token or more; got 0 of 5 tokens"):
        request(random_ids(5, seed=0), samples=0)
    with pytest.raises(ValueError, match="got 2 of 0 tokens"):
        request((), samples=2)


def test_limits_that_do_not_fit_the_request_are_refused(policies):
    asked = request(random_ids(5, seed=0), samples=2)
    for limits in ((3,), (3, 0)):
        with pytest.raises(ValueError, match=r"each of the 2 samples one token or more; got \(3"):
            replace(asked, limits=limits)
    with pytest.raises(ValueError, match="must not exceed max_new_tokens; got 17 and 16"):
        LocalEngine(policies("qwen3")).generate([replace(asked, limits=(3, 17))], params())


def test_the_room_of_vllm_is_asked_for_each_request_and_not_for_the_longest_of_each_kind():
    """In a wave one episode has a long history and little left, another the reverse."""
    long, short = request(random_ids(12, seed=0), samples=1), request(random_ids(4, seed=1), samples=1)
    asked = [replace(long, limits=(2,)), replace(short, limits=(10,))]
    VllmEngine._check_room(SimpleNamespace(max_length=14), asked, params(max_new_tokens=10))
    with pytest.raises(ConfigError, match="got 14 tokens and a cache for 13"):
        VllmEngine._check_room(SimpleNamespace(max_length=13), asked, params(max_new_tokens=10))
    with pytest.raises(ConfigError, match="got 22 tokens and a cache for 14"):
        VllmEngine._check_room(SimpleNamespace(max_length=14), [long, short], params(max_new_tokens=10))
