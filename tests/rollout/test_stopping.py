"""Stop strings: held by one token, or completed by several; kept in the tokens, cut from the text."""

from __future__ import annotations

import pytest
import torch

from sapo.data import Completion, Prompt
from sapo.rollout.engine import Request
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules


def draw(policy, stop: tuple[str, ...], samples: int = 96, max_new_tokens: int = 20) -> tuple[Completion, ...]:
    prompt = Prompt(id=1, task="t", text="", token_ids=(1, 10, 2, 13), stop=stop)
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=4, stop_token_ids=policy.stop_token_ids)
    return LocalEngine(policy).generate([Request(prompt, samples)], params)[0]


@pytest.mark.parametrize("stop", [("7",), ("12",), ("34", "9"), ("0=", "=0")])
def test_a_completion_ends_with_the_first_token_that_completes_a_stop_string(policies, stop: tuple[str, ...]) -> None:
    policy = policies("qwen3", gain=2.0)
    free = draw(policy, ())
    stopped = draw(policy, stop)
    assert any(c.finish_reason == "stop" and c.token_ids[-1] not in policy.stop_token_ids for c in stopped)
    for without, completion in zip(free, stopped, strict=True):
        # The draws are the same: only where they end differs.
        assert tuple(without.token_ids[: len(completion)]) == tuple(completion.token_ids)
        parts = [policy.decode(without.token_ids[:n]) for n in range(1, len(without) + 1)]
        complete = [n for n, text in enumerate(parts, start=1) if any(string in text for string in stop)]
        if complete:
            whole = parts[complete[0] - 1]
            assert len(completion) == complete[0]
            assert completion.text == whole[: min(whole.find(string) for string in stop if string in whole)]
            assert completion.finish_reason == "stop"
        else:
            assert completion == without


def test_rows_of_one_batch_keep_their_own_stop_strings(policies) -> None:
    policy = policies("qwen3", gain=2.0)
    prompts = [
        Prompt(id=i, task="t", text="", token_ids=(1, 10, 2, 13), stop=stop)
        for i, stop in enumerate([("7",), (), ("3",)])
    ]
    params = SamplingParams(max_new_tokens=20, seed=4, stop_token_ids=policy.stop_token_ids)
    together = LocalEngine(policy, max_rows=8).generate([Request(p, 8) for p in prompts], params)
    for prompt, completions in zip(prompts, together, strict=True):
        (alone,) = LocalEngine(policy).generate([Request(prompt, 8)], params)
        assert [tuple(c.token_ids) for c in completions] == [tuple(c.token_ids) for c in alone]
        assert [c.text for c in completions] == [c.text for c in alone]


def test_only_tokens_that_can_complete_a_string_are_looked_at_twice(policies) -> None:
    policy = policies("qwen3")
    rules = StopRules(policy, [("12",), ("7",)], frozenset())
    two, seven = policy.encode("2")[0], policy.encode("7")[0]
    assert rules.may_SV[0].nonzero()[:, 0].tolist() == [two]
    assert rules.ends_SV[0].sum() == 0
    assert rules.ends_SV[1].nonzero()[:, 0].tolist() == [seven]
    assert rules.may_SV[1].sum() == 0


def test_a_string_counts_only_within_the_completion(policies) -> None:
    policy = policies("qwen3")
    rules = StopRules(policy, [("12",)], frozenset())
    one, two = policy.encode("12")

    def stopped(history: list[int]) -> bool:
        tokens = torch.tensor([history[-1]])
        return bool(
            rules.stopped(
                torch.zeros(1, dtype=torch.int64), tokens, torch.tensor([history]), torch.tensor([len(history)])
            )
        )

    for history, ends in (([one, two], True), ([two, two, one, two], True), ([two], False)):
        assert stopped(history) == ends  # the 1 before a lone 2 belongs to the prompt
        assert rules.ends(0, history) == ends
    assert not stopped([one, one])


def test_the_end_token_wins_over_the_text(policies) -> None:
    policy = policies("qwen3")
    rules = StopRules(policy, [("7",)], policy.stop_token_ids)
    end = next(iter(policy.stop_token_ids))
    assert rules.text(0, (*policy.encode("46"), end)) == "46"
    assert rules.text(0, policy.encode("467")) == "46"
    assert rules.text(0, policy.encode("46")) == "46"
