"""An engine of another kind: it draws completions from a list, with log-probabilities of its own."""

from __future__ import annotations

import math

import numpy as np

from sapo.data import Completion
from sapo.errors import Interrupted
from sapo.rollout.engine import Capabilities

TEXTS = ("7", "77+7=7", "123", "7777777", "0", "77-7", "5555")


class ListEngine:
    """Draws each completion from TEXTS, all alike, whatever the weights and the prompt."""

    capabilities = Capabilities(stop_strings=False, exact_logprobs=False)
    received: list[tuple[str, int]] = []  # noqa: RUF012 (what all engines of a test were told, in order)

    def __init__(self, policy) -> None:
        self.policy = policy
        self.version = -1
        self.weights: dict | None = None

    @classmethod
    def from_settings(cls, policy, settings):
        return cls(policy)

    def generate(self, requests, params, should_stop=lambda: False, experts=None):
        assert self.weights is not None, "it draws between `set_weights` and `sleep`"
        if should_stop():
            raise Interrupted
        return [tuple(self._draw(r.prompt, s, params) for s in range(r.samples)) for r in requests]

    def _draw(self, prompt, sample, params):
        text = TEXTS[np.random.default_rng([params.seed % 2**32, prompt.id, sample]).integers(len(TEXTS))]
        tokens = (*self.policy.encode(text), self.policy.tokenizer.eos_token_id)[: params.max_new_tokens]
        logprob = -math.log(len(TEXTS)) / len(tokens)
        finish = "stop" if tokens[-1] == self.policy.tokenizer.eos_token_id else "length"
        return Completion(tokens, (logprob,) * len(tokens), finish, text)

    def set_weights(self, weights, version) -> None:
        self.weights, self.version = dict(weights), version
        self.received.append(("weights", version))

    def sleep(self) -> None:
        self.weights = None

    def wake(self) -> None: ...

    def close(self) -> None:
        self.received.append(("closed", self.version))
