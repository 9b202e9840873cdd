"""The local engine: continuous decoding with the trainer's own weights.

Each prompt is prefilled once for all its samples; rows that finish leave the batch and waiting prompts take their
place; one uniform per token comes from a counter (rng.py). There is nothing to synchronise with the trainer, and the
log-probabilities of the draws are log pi_old.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from sapo.batch import prefix_tree
from sapo.data import Completion
from sapo.model.attention import TreeLayout
from sapo.model.policy import Policy
from sapo.rollout.cache import DecodeLayout, KVCache
from sapo.rollout.engine import Interrupted, Request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.rng import token_uniforms
from sapo.rollout.sampling import SamplingParams, sample_tokens
from sapo.rollout.stopping import StopRules
from sapo.spans import span

PREFILL_TOKENS = 8192


class LocalEngine:
    """Samples completions with the policy's own weights.

    Args:
        policy: the model; its weights are read where they are.
        max_rows: sequences decoded together; bounds the memory of the cache. A group never decodes in two parts, so a
            request of more samples raises it.
    """

    def __init__(self, policy: Policy, max_rows: int = 256) -> None:
        self.policy = policy
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`. `experts`: told which experts every token went through."""
        if not requests:
            return []
        self._check_lengths(requests, params)
        decoding = _Decoding(self.policy, requests, params, self.max_rows, experts)
        with nullcontext() if experts is None else experts.recording():
            while decoding.unfinished:
                if should_stop():
                    raise Interrupted
                with span("prefill"):
                    decoding.admit()
                decoding.step()
                decoding.retire()
        return decoding.completions()

    def _check_lengths(self, requests: Sequence[Request], params: SamplingParams) -> None:
        limit = self.policy.max_length
        longest = max(len(r.prompt.token_ids) for r in requests)
        if limit is not None and longest + params.max_new_tokens > limit:
            raise ValueError(
                f"prompt and completion must fit the model's {limit} positions; got a prompt of {longest} tokens and "
                f"max_new_tokens {params.max_new_tokens}; shorten one of them"
            )
        most = max((max(r.limits) for r in requests if r.limits), default=0)
        if most > params.max_new_tokens:
            raise ValueError(
                f"a sample's limit must not exceed max_new_tokens; got {most} and {params.max_new_tokens}; raise that"
            )


class _Decoding:
    """One call of generate: rows 0..active-1 of every array are the sequences being decoded."""

    def __init__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        params: SamplingParams,
        max_rows: int,
        experts: ExpertLog | None = None,
    ) -> None:
        self.policy = policy
        self.experts = experts
        self.requests = requests
        self.params = params
        self.waiting = deque(range(len(requests)))
        rows = min(sum(r.samples for r in requests), max(max_rows, max(r.samples for r in requests)))
        longest = max(len(r.prompt.token_ids) for r in requests)
        device = policy.device
        self.cache = KVCache(rows, longest + params.max_new_tokens)
        self.active = 0
        self.request = np.zeros(rows, dtype=np.int64)
        self.sample = np.zeros(rows, dtype=np.int64)
        self.uniform = torch.zeros(rows, params.max_new_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, params.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, params.max_new_tokens, dtype=torch.float32, device=device)
        self.generated = torch.zeros(rows, dtype=torch.int64, device=device)
        self.limit = torch.zeros(rows, dtype=torch.int64, device=device)  # most tokens to generate
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens in the cache
        self.hidden: Tensor | None = None  # (fresh rows, H): last hidden states not sampled from yet
        self.fresh = 0
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        stop_sets = sorted({r.prompt.stop for r in requests})
        self.stop_set_of = [stop_sets.index(r.prompt.stop) for r in requests]
        self.stop_set = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rules = StopRules(policy, stop_sets, params.stop_token_ids)
        self.results: list[list[Completion | None]] = [[None] * r.samples for r in requests]

    @property
    def unfinished(self) -> bool:
        return bool(self.active or self.waiting)

    def admit(self) -> None:
        """Prefill waiting prompts into free rows, each prompt once."""
        chosen: list[int] = []
        rows = self.active
        tokens = 0
        while self.waiting and rows + self.requests[self.waiting[0]].samples <= self.cache.rows:
            prompt_tokens = len(self.requests[self.waiting[0]].prompt.token_ids)
            if chosen and tokens + prompt_tokens > PREFILL_TOKENS:
                break
            tokens += prompt_tokens
            rows += self.requests[self.waiting[0]].samples
            chosen.append(self.waiting.popleft())
        if chosen:
            self._prefill(chosen)

    def _prefill(self, chosen: list[int]) -> None:
        tree = prefix_tree([self.requests[i].prompt.token_ids for i in chosen])
        first_row = self.active
        row_of = [first_row]
        for i in chosen:
            row_of.append(row_of[-1] + self.requests[i].samples)

        def store(layer: int, key: Tensor, value: Tensor) -> None:
            for leaf, row, i in zip(tree.leaves, row_of, chosen, strict=False):
                path = torch.from_numpy(layout.paths[leaf]).to(key.device)
                self.cache.write_prefix(layer, row, self.requests[i].samples, key[path], value[path])

        layout = TreeLayout(tree.segments, self.policy.device, on_keys=store)
        hidden = self.policy.hidden(
            torch.tensor(tree.token_ids, device=self.policy.device),
            torch.tensor(tree.position_ids, device=self.policy.device),
            layout,
        )
        if self.experts is not None:
            self.experts.prefilled(chosen, [layout.paths[leaf] for leaf in tree.leaves])
        last = []
        for leaf, i in zip(tree.leaves, chosen, strict=True):
            request, row = self.requests[i], self.active
            count = request.samples
            samples = np.arange(count)
            self.request[row : row + count], self.sample[row : row + count] = i, samples
            uniforms = token_uniforms(self.params.seed, request.prompt.id, samples, self.params.max_new_tokens)
            self.uniform[row : row + count] = torch.from_numpy(uniforms).to(self.uniform.device)
            self.stop_set[row : row + count] = self.stop_set_of[i]
            limits = request.limits or (self.params.max_new_tokens,) * count
            self.limit[row : row + count] = torch.tensor(limits, device=self.limit.device)
            self.length[row : row + count] = len(request.prompt.token_ids)
            self.generated[row : row + count] = 0
            last += [tree.segments[leaf].stop - 1] * count
            self.active += count
        self.hidden = hidden[torch.tensor(last, device=hidden.device)]
        self.fresh = self.active - first_row

    def step(self) -> None:
        """Decode the rows in flight, join the rows just prefilled, and draw one token for each."""
        old = self.active - self.fresh
        parts = []
        if old:
            length = self.length[:old]
            newest = self.tokens[:old].gather(1, self.generated[:old, None] - 1)[:, 0]
            with span("decode"):
                parts.append(self.policy.hidden(newest, length, DecodeLayout(self.cache, length)))
            if self.experts is not None:
                self.experts.decoded(self.request[:old], self.sample[:old])
            self.length[:old] += 1
        if self.hidden is not None:
            parts.append(self.hidden)
        self.hidden, self.fresh = None, 0
        hidden = torch.cat(parts)
        with span("head"):
            logits = self.policy.logits(hidden).float()
        at = self.generated[: self.active, None]
        uniform = self.uniform[: self.active].gather(1, at)[:, 0]
        with span("sample"):
            tokens, logprobs = sample_tokens(logits, uniform, self.params)
        self.tokens[: self.active].scatter_(1, at, tokens[:, None])
        self.logprobs[: self.active].scatter_(1, at, logprobs[:, None])
        self.generated[: self.active] += 1
        stopped = self.rules.stopped(
            self.stop_set[: self.active], tokens, self.tokens[: self.active], self.generated[: self.active]
        )
        self.stopped[: self.active] = stopped
        self.finished[: self.active] = stopped | (self.generated[: self.active] >= self.limit[: self.active])

    def retire(self) -> None:
        """Take finished rows out and close the gaps with the last rows in use."""
        done = self.finished[: self.active].nonzero()[:, 0].tolist()
        if not done:
            return
        for row in done:
            self.results[self.request[row]][self.sample[row]] = self._completion(row)
        remaining = self.active - len(done)
        holes = [row for row in done if row < remaining]
        leaving = set(done)
        movers = [row for row in range(remaining, self.active) if row not in leaving]
        if holes:
            source = torch.tensor(movers, device=self.length.device)
            target = torch.tensor(holes, device=self.length.device)
            self.cache.move(source, target, int(self.length[source].max()))
            for array in (
                self.uniform,
                self.tokens,
                self.logprobs,
                self.generated,
                self.limit,
                self.length,
                self.stop_set,
            ):
                array[target] = array[source]
            self.request[holes], self.sample[holes] = self.request[movers], self.sample[movers]
        self.finished[: self.active] = False
        self.active = remaining

    def _completion(self, row: int) -> Completion:
        count = int(self.generated[row])
        token_ids = tuple(self.tokens[row, :count].tolist())
        stopped = bool(self.stopped[row])
        return Completion(
            token_ids=token_ids,
            logprobs=tuple(self.logprobs[row, :count].tolist()),
            finish_reason="stop" if stopped else "length",
            text=self.rules.text(int(self.stop_set[row]), token_ids),
        )

    def completions(self) -> list[tuple[Completion, ...]]:
        """All results, in the order of the requests."""
        finished: list[tuple[Completion, ...]] = []
        for samples in self.results:
            assert all(c is not None for c in samples), "a row was lost"
            finished.append(tuple(c for c in samples if c is not None))
        return finished
