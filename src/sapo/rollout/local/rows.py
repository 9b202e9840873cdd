"""Decoding as transformers does it, for models whose step the packed engine does not compute: slower, and right.

Prompts of the same length stand in rows side by side, each once for every sample, so that nothing is padded. The
model's own cache keeps what it carries from token to token, or each step computes whole rows again where that cache is
not exact. Draws are those of the other engine: the same uniforms, stop rules and sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapo.data import Completion
from sapo.errors import ModelError
from sapo.model.attention import ATTENTION_NAME, attend_by
from sapo.model.policy import Policy
from sapo.model.rows import last_hidden, row_positions
from sapo.rollout.engine import Drawn, Likeliest, Request
from sapo.rollout.local.sampling import likeliest_tokens, request_uniforms, sample_tokens
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules
from sapo.utils.spans import span

CACHE_NAMES = ("past_key_values", "cache_params")
"""Names that transformers has for the cache of a decoder."""


@contextmanager
def own_attention(policy: Policy) -> Iterator[None]:
    """Let a model attend by transformers' own code for a while."""
    if policy.path == "rows":  # it always does
        yield
        return
    attend_by(policy.model, policy.own_attention)
    try:
        yield
    finally:
        attend_by(policy.model, ATTENTION_NAME)


class RowsDecoding:
    """One call of generate: a batch of rows of one length after the other.

    Args:
        cached: the model's own cache is used; otherwise each step computes whole rows.
        max_rows: rows of a batch, which holds one request at least.
    """

    def __init__(
        self, policy: Policy, requests: Sequence[Request], params: SamplingParams, max_rows: int, cached: bool
    ) -> None:
        if any(request.prompt.pictures for request in requests):
            raise ModelError(f"{type(policy.model).__name__} is decoded in rows, which have no pictures")
        self.policy, self.requests, self.params, self.cached = policy, requests, params, cached
        self.max_rows = max_rows
        by_length = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt.token_ids))
        self.waiting = deque(by_length)
        self.rules = StopRules(policy, sorted({r.prompt.stop for r in requests}), params.stop_token_ids)
        self.results: list[list[Completion | None]] = [[None] * r.samples for r in requests]
        self.batch: _Batch | None = None

    @property
    def unfinished(self) -> bool:
        return bool(self.batch or self.waiting)

    def admit(self) -> None:
        """Begin the next batch when the one before has ended."""
        if self.batch is not None:
            return
        chosen = [self.waiting.popleft()]
        rows = self.requests[chosen[0]].samples
        length = len(self.requests[chosen[0]].prompt.token_ids)
        while self.waiting:
            following = self.requests[self.waiting[0]]
            if len(following.prompt.token_ids) != length or rows + following.samples > self.max_rows:
                break
            rows += following.samples
            chosen.append(self.waiting.popleft())
        self.batch = _Batch(self.policy, self.requests, chosen, self.params, self.cached)

    def step(self) -> None:
        """Draw one token for each row."""
        assert self.batch is not None, "a batch is begun before it is stepped"
        with span("decode"):
            logits = self.batch.logits()
        with span("sample"):
            self.batch.note_likeliest(logits)
            self.batch.draw(logits, self.rules)

    def take_new(self) -> list[Drawn]:
        """Return the token that each row has just drawn."""
        assert self.batch is not None, "a batch is stepped before its tokens are taken"
        return self.batch.newest()

    def retire(self) -> None:
        """Take finished rows out."""
        assert self.batch is not None, "a batch is stepped before its rows are taken out"
        for request, sample, completion in self.batch.take_finished(self.rules):
            self.results[request][sample] = completion
        if not len(self.batch.request_R):
            self.batch = None

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return all results, in the order of the requests."""
        assert all(c is not None for samples in self.results for c in samples), "a row was lost"
        return [tuple(c for c in samples if c is not None) for samples in self.results]


class _Batch:
    """Rows at the same position: what each has drawn, and what the model keeps of it."""

    def __init__(
        self, policy: Policy, requests: Sequence[Request], chosen: Sequence[int], params: SamplingParams, cached: bool
    ) -> None:
        device = policy.device
        self.policy, self.params, self.cached = policy, params, cached
        samples = [requests[i].samples for i in chosen]
        self.request_R = np.repeat(chosen, samples)
        self.sample_R = np.concatenate([np.arange(n) for n in samples])
        limits = [requests[i].limits or (params.max_new_tokens,) * requests[i].samples for i in chosen]
        self.limit_R = np.concatenate(limits)
        self.stop_sets = sorted({r.prompt.stop for r in requests})
        self.stop_R = torch.tensor([self.stop_sets.index(requests[i].prompt.stop) for i in self.request_R]).to(device)
        uniforms = [request_uniforms(requests[i], params) for i in chosen]
        self.uniform_RT = torch.from_numpy(np.concatenate(uniforms)).to(device)
        prompts = np.array([requests[i].prompt.token_ids for i in chosen], dtype=np.int64)
        self.prompt_bP = torch.from_numpy(prompts).to(device)
        self.of_row_R = torch.from_numpy(np.repeat(np.arange(len(chosen)), samples)).to(device)
        self.tokens_RT = torch.zeros(len(self.request_R), params.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs_RT = torch.zeros(len(self.request_R), params.max_new_tokens, device=device)
        self.drawn = 0
        self.stopped_R = np.zeros(len(self.request_R), dtype=bool)
        self.special_R = np.array([requests[i].prompt.special_tokens for i in self.request_R], dtype=bool)
        self.top_R = np.array([requests[i].top_logprobs for i in self.request_R])
        self.likeliest: list[tuple[Likeliest, ...]] = []
        """Of the step taken last; empty where no row asks for them."""
        self.cache: Any = None
        self.cache_name = ""

    def logits(self) -> Tensor:
        """Compute (R, V) logits of each row's next token."""
        hidden_RH = self._hidden()
        scale = self.policy.logit_scale
        return self.policy.logits(hidden_RH if scale == 1.0 else hidden_RH * scale)

    def _hidden(self) -> Tensor:
        decoder: Any = self.policy.decoder
        prompts, length = self.prompt_bP.shape
        at, rows, device = length + self.drawn, len(self.request_R), self.prompt_bP.device
        if not self.drawn:
            positions = row_positions(decoder, prompts, 0, length, device)
            output = decoder(input_ids=self.prompt_bP, use_cache=self.cached, **positions)
            if self.cached:
                self.cache_name, self.cache = _cache_of(output)
                self.cache.reorder_cache(self.of_row_R)
            return last_hidden(output)[:, -1].index_select(0, self.of_row_R)
        if self.cached:
            newest_R1 = self.tokens_RT[:, self.drawn - 1 : self.drawn]
            kept = {self.cache_name: self.cache} | row_positions(decoder, rows, at - 1, at, device)
            output = decoder(input_ids=newest_R1, use_cache=True, **kept)
            return last_hidden(output)[:, -1]
        prompts_RP = self.prompt_bP.index_select(0, self.of_row_R)
        whole = torch.cat([prompts_RP, self.tokens_RT[:, : self.drawn]], dim=1)
        positions = row_positions(decoder, rows, 0, at, device)
        return last_hidden(decoder(input_ids=whole, use_cache=False, **positions))[:, -1]

    def note_likeliest(self, logits_RV: Tensor) -> None:
        """Keep each row's likeliest next tokens, where it asks for them."""
        self.likeliest = []
        if not self.top_R.any():
            return
        found = likeliest_tokens(logits_RV, self.params, int(self.top_R.max()), self.policy.unused_K)
        self.likeliest = [(of[:count],) if count else () for of, count in zip(found, self.top_R, strict=True)]

    def draw(self, logits_RV: Tensor, rules: StopRules) -> None:
        """Draw a token for each row, and see which rows it ends."""
        at = self.drawn
        self.tokens_RT[:, at], self.logprobs_RT[:, at] = sample_tokens(
            logits_RV, self.uniform_RT[:, at], self.params, unused_K=self.policy.unused_K
        )
        self.drawn += 1
        generated_R = torch.full_like(self.stop_R, self.drawn)
        stopped_R = rules.stopped(self.stop_R, self.tokens_RT[:, at], self.tokens_RT, generated_R)
        self.stopped_R = stopped_R.cpu().numpy()

    def newest(self) -> list[Drawn]:
        """Return the token that each row has just drawn."""
        at = self.drawn - 1
        columns = zip(
            *(self.request_R, self.sample_R, self.tokens_RT[:, at].tolist(), self.logprobs_RT[:, at].tolist()),
            self.likeliest or [()] * len(self.request_R),
            strict=True,
        )
        return [Drawn(int(i), int(sample), (token,), (p,), likeliest=of) for i, sample, token, p, of in columns]

    def take_finished(self, rules: StopRules) -> Iterator[tuple[int, int, Completion]]:
        """Yield request, sample and completion of each row that has ended, which leaves the batch."""
        over_R = self.stopped_R | (self.drawn >= self.limit_R)
        if not over_R.any():
            return
        for row in np.flatnonzero(over_R):
            token_ids = self.tokens_RT[row, : self.drawn].cpu()
            completion = Completion(
                token_ids=token_ids.numpy(),
                logprobs=self.logprobs_RT[row, : self.drawn].cpu().numpy(),
                finish_reason="stop" if self.stopped_R[row] else "length",
                text=rules.text(int(self.stop_R[row]), token_ids.tolist(), bool(self.special_R[row])),
            )
            yield int(self.request_R[row]), int(self.sample_R[row]), completion
        self._keep(np.flatnonzero(~over_R))

    def _keep(self, rows: np.ndarray) -> None:
        for name in ("request_R", "sample_R", "limit_R", "stopped_R", "special_R", "top_R"):
            setattr(self, name, getattr(self, name)[rows])
        index = torch.from_numpy(rows).to(self.tokens_RT.device)
        for name in ("stop_R", "uniform_RT", "of_row_R", "tokens_RT", "logprobs_RT"):
            setattr(self, name, getattr(self, name)[index])
        if self.cache is not None and len(rows):
            self.cache.reorder_cache(index)


def _cache_of(output: Any) -> tuple[str, Any]:
    """Return the name and the object of the cache that a decoder gave.

    Raises:
        ModelError: it gave none, or one whose rows cannot be put in another order.
    """
    for name in CACHE_NAMES:
        cache = getattr(output, name, None)
        if hasattr(cache, "reorder_cache"):
            return name, cache
    raise ModelError("it gives no cache whose rows can be put in another order")
