"""The engine `vllm` draws as the protocol says, which the local engine and plain forward passes are the measure of."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from sapo.data import Prompt
from sapo.errors import Interrupted
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.vllm import core
from sapo.rollout.vllm.engine import VllmEngine
from support.engine_cases import assert_same, flat, params, plain_logprobs, ragged_requests, random_ids, request
from support.plain_models import plain_copy
from support.vllm_cases import needs_vllm, wide_policy

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def policy():
    return wide_policy("qwen3", max_length=64)


@pytest.fixture(scope="module")
def engine(policy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "PREFILL_TOKENS", 64)  # so that prompts wait for a later prefill
        made = VllmEngine(policy, max_rows=11)
    made.wake()
    made.set_weights(policy.weights(), 3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain_model(policy):
    return plain_copy(policy.model)


def test_the_engine_holds_the_version_it_was_given(engine) -> None:
    assert engine.version == 3


@pytest.mark.parametrize("stops", [frozenset(), frozenset({2, 7, 15})])
def test_greedy_completions_are_those_of_the_local_engine(engine, policy, stops) -> None:
    settings = params(temperature=0.0, max_new_tokens=24, stop_token_ids=stops)
    local = LocalEngine(policy).generate(ragged_requests(), settings)
    for ours, theirs in zip(flat(engine.generate(ragged_requests(), settings)), flat(local), strict=True):
        assert_same(ours, theirs)
    assert {c.finish_reason for c in flat(local)} == ({"stop", "length"} if stops else {"length"})


@pytest.mark.parametrize(("temperature", "of"), [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_logprobs_are_those_of_the_distribution_drawn_from(engine, plain_model, temperature, of) -> None:
    requests = ragged_requests()
    for asked, group in zip(requests, engine.generate(requests, params(temperature=temperature)), strict=True):
        assert len(group) == asked.samples
        for completion in group:
            expected = plain_logprobs(plain_model, asked.prompt.token_ids, completion, of)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def first_token_distribution(plain_model, ids) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(plain_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], dim=-1)


def test_first_tokens_come_as_often_as_the_policy_says(engine, plain_model) -> None:
    ids, draws = random_ids(6, 0), 3000
    p_V = first_token_distribution(plain_model, ids).double()
    (group,) = engine.generate([request(ids, draws)], params(max_new_tokens=1, stop_token_ids=frozenset()))
    seen_V = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=len(p_V)).double() / draws
    # six standard deviations of a binomial share
    assert ((seen_V - p_V).abs() <= 6 * (p_V * (1 - p_V) / draws).sqrt() + 1e-9).all()
    assert len({int(c.token_ids[0]) for c in group}) > 3


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_a_cut_tail_is_cut_and_its_logprobs_are_of_what_is_left(engine, plain_model, cut) -> None:
    ids = random_ids(6, 0)
    p_V = first_token_distribution(plain_model, ids)
    ordered, order = p_V.sort(descending=True)
    if "top_k" in cut:
        kept = order[:3]
    elif "top_p" in cut:
        kept = order[: int((ordered.cumsum(0) < 0.6).sum()) + 1]
    else:
        kept = (p_V >= 0.3 * p_V.max()).nonzero()[:, 0]
    (group,) = engine.generate([request(ids, 64)], params(max_new_tokens=1, stop_token_ids=frozenset(), **cut))
    assert {int(c.token_ids[0]) for c in group} <= set(kept.tolist())
    for completion in group:
        expected = float((p_V[completion.token_ids[0]] / p_V[kept].sum()).log())
        assert float(completion.logprobs[0]) == pytest.approx(expected, abs=1e-5)


def test_a_completion_is_the_same_whatever_else_is_in_the_batch(engine) -> None:
    requests, settings = ragged_requests(), params()
    together = engine.generate(requests, settings)
    order = [3, 5, 0, 2, 4, 1]
    reordered = engine.generate([requests[i] for i in order], settings)
    for place, i in enumerate(order):
        for ours, theirs in zip(reordered[place], together[i], strict=True):
            assert_same(ours, theirs)
    (alone,) = engine.generate([requests[5]], settings)
    for ours, theirs in zip(alone, together[5], strict=True):
        assert_same(ours, theirs)


def test_samples_prompts_and_seeds_draw_different_noise(engine) -> None:
    settings = params(stop_token_ids=frozenset())
    asked = [request(random_ids(8, 3), 12)]
    (group,) = engine.generate(asked, settings)
    assert len({tuple(c.token_ids) for c in group}) == 12
    assert engine.generate(asked, settings) == [group]
    (other,) = engine.generate(asked, replace(settings, seed=6))
    (renamed,) = engine.generate([request(random_ids(8, 3), 12, prompt_id=1)], settings)
    for different in (other, renamed):
        assert not {tuple(c.token_ids) for c in group} & {tuple(c.token_ids) for c in different}


def test_each_sample_is_held_to_its_own_limit(engine) -> None:
    settings = params(stop_token_ids=frozenset())
    free = engine.generate(ragged_requests(), settings)
    generator = np.random.default_rng(0)
    requests = [replace(r, limits=tuple(generator.integers(1, 17, r.samples).tolist())) for r in ragged_requests()]
    for asked, group, whole in zip(requests, engine.generate(requests, settings), free, strict=True):
        for limit, short, long in zip(asked.limits, group, whole, strict=True):
            assert tuple(short.token_ids) == tuple(long.token_ids[:limit])
            assert (short.finish_reason, len(short)) == ("length", limit)


@pytest.mark.parametrize("stop", [("7",), ("12",), ("34", "9"), ("0=", "=0")])
def test_a_completion_ends_with_the_first_token_that_completes_a_stop_string(engine, policy, stop) -> None:
    settings = params(max_new_tokens=20, stop_token_ids=policy.stop_token_ids)
    prompt = Prompt(id=1, task="t", text="", token_ids=(1, 10, 2, 13))
    (free,) = engine.generate([Request(prompt, 200)], settings)
    (stopped,) = engine.generate([Request(replace(prompt, stop=stop), 200)], settings)
    ended = 0
    for without, completion in zip(free, stopped, strict=True):
        # By hand: the shortest beginning of the free draw whose text holds a stop string.
        parts = [policy.decode(without.token_ids[:n]) for n in range(1, len(without) + 1)]
        complete = [n for n, text in enumerate(parts, start=1) if any(string in text for string in stop)]
        if complete:
            ended += 1
            whole = parts[complete[0] - 1]
            assert tuple(completion.token_ids) == tuple(without.token_ids[: complete[0]])
            assert completion.text == whole[: min(whole.find(string) for string in stop if string in whole)]
            assert completion.finish_reason == "stop"
        else:
            assert_same(completion, without)
    assert ended > 0


def test_a_stop_in_the_last_place_counts_as_a_stop(engine, policy) -> None:
    asked, settings = request(random_ids(6, 0), 16), params(max_new_tokens=5, stop_token_ids=frozenset())
    (drawn,) = engine.generate([asked], settings)
    # The first draw whose last token is a character of its own (ids from 15 on are special).
    sample, free = next(
        (i, c) for i, c in enumerate(drawn) if c.token_ids[-1] not in c.token_ids[:-1] and max(c.token_ids) < 15
    )
    last = int(free.token_ids[-1])
    (by_id,) = engine.generate([asked], replace(settings, stop_token_ids=frozenset({last})))
    with_string = replace(asked, prompt=replace(asked.prompt, stop=(policy.decode([last]),)))
    (by_string,) = engine.generate([with_string], settings)
    for stopped in (by_id[sample], by_string[sample]):
        assert tuple(stopped.token_ids) == tuple(free.token_ids)
        assert (free.finish_reason, stopped.finish_reason, stopped.text) == ("length", "stop", free.text[:-1])


def test_generation_can_be_interrupted_and_leaves_nothing_behind(engine) -> None:
    expected = engine.generate(ragged_requests(), params())
    answers = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        engine.generate(ragged_requests(), params(), lambda: next(answers))
    assert not engine._core.engine.has_unfinished_requests()
    assert engine.generate(ragged_requests(), params()) == expected


def test_what_does_not_fit_is_refused_in_the_words_of_the_local_engine(engine) -> None:
    (fits,) = engine.generate([request(random_ids(48, 0))], params(stop_token_ids=frozenset()))
    assert len(fits[0]) == 16
    with pytest.raises(ValueError, match=r"the model's 64 positions; got a prompt of 49 tokens and max_new_tokens 16"):
        engine.generate([request(random_ids(49, 0))], params())
    with pytest.raises(ValueError, match="must not exceed max_new_tokens; got 17 and 16"):
        engine.generate([replace(request(random_ids(5, 0)), limits=(17,))], params())


def test_nothing_asked_gives_nothing(engine) -> None:
    assert engine.generate([], params()) == []


def test_it_draws_between_set_weights_and_sleep(engine, policy) -> None:
    engine.sleep()
    with pytest.raises(AssertionError, match="after `set_weights`"):
        engine.generate(ragged_requests(), params())
    engine.wake()
    engine.set_weights(policy.weights(), 3)
    assert len(engine.generate(ragged_requests(), params())) == 6


def test_the_process_is_left_as_it_was(engine) -> None:
    torch.set_num_threads(2)  # vLLM's CPU worker puts a function there that ignores it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert (threads, torch.get_num_threads()) == (2, 1)


def test_what_a_start_does_to_the_global_generators_is_undone() -> None:
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    # Only one vLLM can run in a process, so its start is left out: the guard alone.
    with core._process_kept():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_the_likeliest_tokens_of_a_stream_are_those_of_the_local_engine(engine, policy, options) -> None:
    settings = params(max_new_tokens=6, **options)
    asked = [replace(ragged_requests()[0], top_logprobs=3), ragged_requests()[1]]
    steps = [new for step in engine.stream(asked, settings) for new in step]
    assert all(new.likeliest == () for new in steps if new.request == 1)
    ids = asked[0].prompt.token_ids
    first = [new for new in steps if (new.request, new.sample) == (0, 0)]
    for token, likeliest in ((t, of) for new in first for t, of in zip(new.token_ids, new.likeliest, strict=True)):
        # The local engine's, of the next token after the same ones.
        one = replace(request(ids), top_logprobs=3)
        [[drawn]] = list(LocalEngine(policy).stream([one], replace(settings, max_new_tokens=1)))
        assert [t for t, _ in likeliest] == [t for t, _ in drawn.likeliest[0]]
        assert [p for _, p in likeliest] == pytest.approx([p for _, p in drawn.likeliest[0]], abs=1e-4)
        ids += (token,)
    assert len(ids) > len(asked[0].prompt.token_ids) + 1
