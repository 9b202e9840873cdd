"""Requests of the tests of engines, and what plain forward passes say of their completions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapo.data import Completion, Prompt
from sapo.rollout.engine import Request
from sapo.rollout.params import SamplingParams

PROMPT_LENGTHS = (5, 1, 23, 9, 5, 14)


SAMPLES = (3, 1, 4, 2, 1, 5)


def random_ids(length, seed):
    # The 15 characters of the tiny alphabet, without end and padding.
    return tuple(np.random.default_rng(seed).integers(0, 15, length).tolist())


def request(token_ids, samples=1, prompt_id=0):
    return Request(Prompt(id=prompt_id, task="test", text="", token_ids=tuple(token_ids)), samples)


def ragged_requests(samples=SAMPLES):
    return [
        request(random_ids(length, seed=i), count, prompt_id=100 + i)
        for i, (length, count) in enumerate(zip(PROMPT_LENGTHS, samples, strict=True))
    ]


def params(**options):
    # Three stop tokens of 17, so that completions end at many different lengths.
    return SamplingParams(**{"max_new_tokens": 16, "seed": 5, "stop_token_ids": frozenset({2, 7, 15}), **options})


def flat(results):
    return [c for group in results for c in group]


@torch.no_grad()
def plain_logprobs(model, prompt_ids, completion, temperature):
    """log_softmax of a full forward over prompt and completion, at the completion's tokens."""
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    logp_TV = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0] / temperature, dim=-1)
    first, count = len(prompt_ids) - 1, len(completion)
    return logp_TV[range(first, first + count), list(completion.token_ids)]


def assert_same(ours: Completion, theirs: Completion) -> None:
    assert tuple(ours.token_ids) == tuple(theirs.token_ids)
    assert (ours.finish_reason, ours.text) == (theirs.finish_reason, theirs.text)
    # The shape of a matrix product may change the last bits.
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
