"""Decoding in rows: the same draws as the packed engine, and exact for models that the packed engine cannot decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sapo.errors import Interrupted, ModelError
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.proof import CACHED, PACKED, WHOLE, choose_way
from support.engine_cases import assert_same, flat, params, plain_logprobs, ragged_requests
from support.row_cases import TOKENIZER, stablelm


def in_rows(policy: Policy, way: str, max_rows: int = 256) -> LocalEngine:
    engine = LocalEngine(policy, max_rows)
    engine.way = way
    return engine


@pytest.mark.parametrize("max_rows", [1, 5, 256])
@pytest.mark.parametrize("way", [CACHED, WHOLE])
def test_the_draws_are_those_of_the_packed_engine(policies: Any, way: str, max_rows: int) -> None:
    policy = policies("qwen3")
    asked = ragged_requests()
    asked[2] = replace(asked[2], limits=(1, 16, 3, 2))
    asked[0] = replace(asked[0], prompt=replace(asked[0].prompt, stop=("12", "7")))
    ours = flat(in_rows(policy, way, max_rows).generate(asked, params()))
    theirs = flat(LocalEngine(policy).generate(asked, params()))
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("way", [CACHED, WHOLE])
def test_sampled_logprobs_are_those_of_the_models_own_forward(way: str) -> None:
    model = stablelm()
    policy = prepare_policy(stablelm(), TOKENIZER)
    assert policy.path == "rows"
    asked = ragged_requests()
    for request, completions in zip(asked, in_rows(policy, way).generate(asked, params()), strict=True):
        for completion in completions:
            own = plain_logprobs(model, request.prompt.token_ids, completion, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), own, rtol=0, atol=1e-4)


def test_weights_of_another_policy_are_drawn_from_a_twin() -> None:
    policy, other = prepare_policy(stablelm(), TOKENIZER), prepare_policy(stablelm(), TOKENIZER)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.5)
    engine = LocalEngine(policy)
    assert engine.way == CACHED
    engine.set_weights(other.weights(), version=1)
    asked = ragged_requests()
    assert engine.generate(asked, params()) == LocalEngine(other).generate(asked, params())


def test_what_rows_cannot_do_is_refused_and_they_stop_when_asked() -> None:
    policy = prepare_policy(stablelm(), TOKENIZER)
    engine = LocalEngine(policy)
    with pytest.raises(ModelError, match="experts are not recorded"):
        engine.generate(ragged_requests(), params(), experts=ExpertLog())
    with pytest.raises(Interrupted):
        engine.generate(ragged_requests(), params(), should_stop=lambda: True)
    with pytest.raises(ModelError, match="no CUDA graphs"):
        LocalEngine(prepare_policy(stablelm(), TOKENIZER), cuda_graphs=True)


def test_a_policy_that_no_way_decodes_is_refused_with_each_reason(new_policy: Any) -> None:
    def fail(way: str, *_: Any) -> Any:
        raise RuntimeError(f"no {way}")

    with pytest.raises(ModelError, match="packed: no packed; rows: no rows; whole rows: no whole rows"):
        choose_way(new_policy("llama"), fail)


def test_a_bug_of_ours_in_the_engine_is_no_reason_to_decode_in_rows(
    new_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapo.rollout.local import engine as packed

    monkeypatch.setattr(packed, "sample_tokens", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        LocalEngine(new_policy("llama"))


def test_a_cache_that_cannot_be_reordered_is_a_reason_to_compute_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapo.rollout.local.rows.CACHE_NAMES", ("another_name",))
    policy = prepare_policy(stablelm(), TOKENIZER)
    assert LocalEngine(policy).way == WHOLE
    assert policy.engine_paths[CACHED] == "it gives no cache whose rows can be put in another order"


def test_ways_are_tried_once_for_a_policy(new_policy: Any) -> None:
    policy = new_policy("llama")
    LocalEngine(policy)
    assert policy.engine_paths == {PACKED: None}
    assert choose_way(policy, lambda *_: pytest.fail("tried again")) == PACKED
