"""The local engine: continuous decoding with the trainer's own weights.

Each prompt is prefilled once and kept once for all its samples, and what all prompts begin with once for all
(cache.py); rows that finish leave the batch and waiting prompts take their place; one uniform per token comes from a
counter (utils/rng.py). On a GPU the host looks every few tokens only (device_steps.py). The weights are the trainer's,
arranged anew for each call where the model allows a faster forward (decoder.py), so that there is nothing to
synchronise, and the log-probabilities of the draws are log pi_old. Weights that are not the trainer's (a sampler of
another precision) lie in a twin of the policy (twin.py). A model for which all this is not exact is decoded in rows
(proof.py, rows.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sapo.config import RolloutConfig
from sapo.data import Completion
from sapo.errors import Interrupted, ModelError
from sapo.model.policy import Policy
from sapo.model.prefix_tree import PromptSpan, common_beginning, join_spans
from sapo.rollout.engine import Capabilities, Drawn, Request, Weights, check_lengths
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.decoder import Decoder, FastDecoder, decoder_of
from sapo.rollout.local.device_steps import DeviceSteps, GraphChoice, RowState, capture_on, uses_device_steps
from sapo.rollout.local.experts import ExpertRecorder
from sapo.rollout.local.layouts import Arrangement, DecodeLayout, PrefillLayout
from sapo.rollout.local.proof import CACHED, PACKED, choose_way
from sapo.rollout.local.rows import RowsDecoding, own_attention
from sapo.rollout.local.sampling import request_uniforms, sample_tokens
from sapo.rollout.local.twin import Twin
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules
from sapo.utils.spans import span

PREFILL_TOKENS = 8192
"""Prompt tokens of one prefill, unless a single prompt has more: bounds its memory and changes no completion."""

STREAMED_CALLS = 1024
"""Calls that the weights are arranged for where streams share them: many."""


class LocalEngine:
    """Samples completions with the policy's own weights, or with others that it was given.

    Args:
        policy: the model; its weights are read where they are.
        max_rows: sequences decoded together; bounds the memory of the cache. A group never decodes in two parts, so a
            request of more samples raises it.
        cuda_graphs: see device_steps.py.

    Raises:
        ModelError: no way to decode the model is exact (proof.py).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(records_experts=True)
    interleaves: ClassVar[bool] = True

    def __init__(self, policy: Policy, max_rows: int = 256, cuda_graphs: GraphChoice = "auto") -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.cuda_graphs = cuda_graphs
        self.version = 0
        self._twin: Twin | None = None
        self._sampler = policy
        self._asleep = False
        self._decoder: Decoder | None = None  # of streams: arranged once for all of them
        self.way = choose_way(policy, self._draw_for_proof)
        """Way to decode: one of those of proof.py."""
        if self.way != PACKED and cuda_graphs is True:
            raise ModelError(
                f"{type(policy.model).__name__} is decoded in rows, for which there are no CUDA graphs; set "
                "rollout.cuda_graphs=auto"
            )

    @classmethod
    def from_settings(cls, policy: Policy, settings: RolloutConfig) -> Self:
        """See `RecipeEngine.from_settings`."""
        return cls(policy, settings.max_rows, settings.cuda_graphs)

    @classmethod
    def prove(cls, policy: Policy) -> None:
        """Find out how a policy is decoded, before copies of it are made that are not to be asked.

        Raises:
            ModelError: no way to decode it is exact.
        """
        LocalEngine(policy)  # and not cls: what a subclass does when it is made belongs into the engine's own process

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`."""
        assert not self._asleep, "an engine draws after `wake` and `set_weights`, not while it sleeps"
        if not requests:
            return []
        check_lengths(requests, params, self.policy.max_length)
        return self._draw(self.way, requests, params, should_stop, experts)

    @torch.no_grad()
    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Drawn]]:
        """See `StreamingEngine.stream`. On a GPU the tokens come a few at a time (device_steps.py)."""
        assert not self._asleep, "an engine draws after `wake` and `set_weights`, not while it sleeps"
        check_lengths(requests, params, self.policy.max_length)
        if self.way != PACKED:
            yield from self._stream_rows(requests, params)
            return
        if self._decoder is None:
            self._decoder = decoder_of(self._sampler, STREAMED_CALLS)
        decoding = _Decoding(self._sampler, requests, params, self.max_rows, None, self.cuda_graphs, self._decoder)
        while decoding.unfinished:
            decoding.admit()
            decoding.step()
            drawn = decoding.take_new()
            decoding.retire()
            yield [_with_completion(new, decoding.results) for new in drawn]

    def _stream_rows(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[list[Drawn]]:
        decoding = RowsDecoding(self._sampler, requests, params, self.max_rows, cached=self.way == CACHED)
        while decoding.unfinished:
            with own_attention(self._sampler):  # for one step alone: another stream may take the next
                decoding.admit()
                decoding.step()
            drawn = decoding.take_new()
            decoding.retire()
            yield [_with_completion(new, decoding.results) for new in drawn]

    def _draw(
        self,
        way: str,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool],
        experts: ExpertLog | None,
        cuda_graphs: GraphChoice | None = None,
    ) -> list[tuple[Completion, ...]]:
        if way != PACKED:
            return self._in_rows(way, requests, params, should_stop, experts)
        recorder = None if experts is None else ExpertRecorder(self._sampler, experts)
        graphs = self.cuda_graphs if cuda_graphs is None else cuda_graphs
        decoding = _Decoding(self._sampler, requests, params, self.max_rows, recorder, graphs)
        with nullcontext() if recorder is None else recorder.recording(hooked=decoding.decoder is self._sampler):
            while decoding.unfinished:
                if should_stop():
                    raise Interrupted
                with span("prefill"):
                    decoding.admit()
                decoding.step()
                decoding.retire()
        return decoding.completions()

    def _in_rows(
        self,
        way: str,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool],
        experts: ExpertLog | None,
    ) -> list[tuple[Completion, ...]]:
        name = type(self.policy.model).__name__
        if experts is not None:
            raise ModelError(f"{name} is decoded in rows, where experts are not recorded; set model.routing_replay=R2")
        decoding = RowsDecoding(self._sampler, requests, params, self.max_rows, cached=way == CACHED)
        with own_attention(self._sampler):
            while decoding.unfinished:
                if should_stop():
                    raise Interrupted
                decoding.admit()
                decoding.step()
                decoding.retire()
        return decoding.completions()

    @torch.no_grad()
    def _draw_for_proof(
        self, way: str, requests: Sequence[Request], params: SamplingParams
    ) -> list[tuple[Completion, ...]]:
        # Without CUDA graphs, which repeat the same steps.
        return self._draw(way, requests, params, lambda: False, None, cuda_graphs=False)

    def set_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.set_weights`. The policy's own tensors are read where they are; others make a twin of it."""
        given, own = dict(weights), dict(self.policy.weights())
        self._decoder = None
        if given.keys() != own.keys():
            odd = sorted(given.keys() ^ own.keys())
            raise ValueError(f"weights must be those of the policy, each by its name; {odd[0]!r} is of one side only")
        if all(given[name].data_ptr() == own[name].data_ptr() for name in own):
            self._sampler = self.policy
        else:
            self._twin = self._twin or Twin(self.policy)
            self._twin.put(given)
            self._sampler = self._twin.policy
        self.version = version

    def sleep(self) -> None:
        """See `Engine.sleep`. Between two calls only weights that are not the policy's own take memory."""
        if self._twin is not None:
            self._twin.release()
        self._sampler, self._asleep, self._decoder = self.policy, True, None

    def wake(self) -> None:
        """See `Engine.wake`."""
        self._asleep = False

    def close(self) -> None:
        """See `Engine.close`."""
        self.sleep()
        self._twin = None


def _with_completion(new: Drawn, results: Sequence[Sequence[Completion | None]]) -> Drawn:
    """Return what was drawn of a sample, with its completion where it has one by now."""
    return replace(new, completion=results[new.request][new.sample])


class _Decoding:
    """One call of generate: rows 0..active-1 of every array are the sequences being decoded."""

    def __init__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        params: SamplingParams,
        max_rows: int,
        experts: ExpertRecorder | None,
        cuda_graphs: GraphChoice,
        decoder: Decoder | None = None,
    ) -> None:
        self.policy = policy
        self.experts = experts
        self.decoder: Decoder = decoder or decoder_of(
            policy, params.max_new_tokens, None if experts is None else experts.chosen
        )
        self.requests = requests
        self.params = params
        self.waiting = deque(range(len(requests)))
        samples = [r.samples for r in requests]
        rows = min(sum(samples), max(max_rows, *samples))
        device = policy.device
        # Experts are recorded prompt by prompt, so each prompt is then computed whole.
        self.preamble = 0 if experts is not None else common_beginning([r.prompt for r in requests])
        lengths = [len(r.prompt.token_ids) - self.preamble for r in requests]
        self.cache = KVCache(rows, params.max_new_tokens, lengths, samples, self.preamble)
        self.arrangement: Arrangement | None = None
        self.active = 0
        self.request = np.zeros(rows, dtype=np.int64)
        self.sample = np.zeros(rows, dtype=np.int64)
        self.generated = np.zeros(rows, dtype=np.int64)
        self.limit = np.zeros(rows, dtype=np.int64)  # most tokens to generate
        self.taken = np.zeros(rows, dtype=np.int64)  # tokens that a stream has given away
        self.left = np.array(samples)  # rows of each request that have not finished
        self.uniform = torch.zeros(rows, params.max_new_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, params.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, params.max_new_tokens, dtype=torch.float32, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)  # of the token decoded next
        self.hidden: Tensor | None = None  # (fresh rows, H): last hidden states not sampled from yet
        self.fresh = 0
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        stop_sets = sorted({r.prompt.stop for r in requests})
        self.stop_set_of = [stop_sets.index(r.prompt.stop) for r in requests]
        self.stop_set = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rules = StopRules(policy, stop_sets, params.stop_token_ids)
        self.results: list[list[Completion | None]] = [[None] * r.samples for r in requests]
        state = RowState(self.uniform, self.tokens, self.logprobs, self.position, self.stop_set, self.stopped)
        recording = experts is not None
        self.device_steps = (
            DeviceSteps(self.decoder, self.cache, samples, state, self.rules, params, capture_on(device, cuda_graphs))
            if uses_device_steps(policy, cuda_graphs, recording) and isinstance(self.decoder, FastDecoder)
            else None
        )
        if self.preamble:
            layout = PrefillLayout(self.cache, None, device)
            self._run([(requests[0].prompt, 0, self.preamble)], layout)
            self.cache.preamble_states = layout.kept

    def _run(self, spans: Sequence[PromptSpan], layout: PrefillLayout) -> Tensor:
        """Compute the hidden states of parts of prompts; what they show goes through the policy's own modules."""
        device = self.policy.device
        tokens = join_spans(spans)
        token_ids, position_ids = (torch.from_numpy(a).to(device) for a in (tokens.token_ids, tokens.position_ids))
        pictures = tokens.packed_pictures(device)
        if pictures is None:
            return self.decoder.hidden(token_ids, position_ids, layout)
        heard = self.experts is not None and self.decoder is not self.policy
        with self.experts.listening() if self.experts is not None and heard else nullcontext():
            return self.policy.hidden(token_ids, position_ids, layout, pictures)

    @property
    def unfinished(self) -> bool:
        return bool(self.active or self.waiting)

    def admit(self) -> None:
        """Prefill waiting prompts into free rows, each prompt once."""
        chosen: list[int] = []
        rows = self.active
        tokens = 0
        while self.waiting and rows + self.requests[self.waiting[0]].samples <= self.cache.rows:
            prompt_tokens = int(self.cache.prompt_length[self.waiting[0]])
            if not self.cache.has_slot(self.waiting[0]) or (chosen and tokens + prompt_tokens > PREFILL_TOKENS):
                break
            self.cache.admit(self.waiting[0])
            tokens += prompt_tokens
            rows += self.requests[self.waiting[0]].samples
            chosen.append(self.waiting.popleft())
        if chosen:
            self._prefill(chosen)

    def _prefill(self, chosen: list[int]) -> None:
        spans: list[PromptSpan] = []
        tokens = 0
        last: list[int] = []
        paths: list[np.ndarray] = []
        first_row = self.active
        for i in chosen:
            request, row = self.requests[i], self.active
            count, length = request.samples, len(request.prompt.token_ids)
            paths.append(np.arange(tokens, tokens + length - self.preamble))
            spans.append((request.prompt, self.preamble, length))
            tokens += length - self.preamble
            samples = np.arange(count)
            self.request[row : row + count], self.sample[row : row + count] = i, samples
            uniforms = request_uniforms(request, self.params)
            self.uniform[row : row + count] = torch.from_numpy(uniforms).to(self.uniform.device)
            self.stop_set[row : row + count] = self.stop_set_of[i]
            self.position[row : row + count] = request.prompt.next_position
            self.limit[row : row + count] = request.limits or self.params.max_new_tokens
            self.generated[row : row + count] = 0
            self.taken[row : row + count] = 0
            last += [tokens - 1] * count
            self.active += count
        layout = PrefillLayout(self.cache, chosen, self.policy.device)
        hidden = self._run(spans, layout)
        counts = torch.tensor([self.requests[i].samples for i in chosen], device=hidden.device)
        prompt_R = torch.arange(len(chosen), device=hidden.device).repeat_interleave(counts)
        rows_R = torch.arange(first_row, self.active, device=hidden.device)
        self.cache.row_states.fill(rows_R, layout.kept, prompt_R)
        if self.experts is not None:
            self.experts.prefilled(chosen, paths)
        self.hidden = hidden[torch.tensor(last, device=hidden.device)]
        self.fresh = self.active - first_row
        self.arrangement = None

    def step(self) -> None:
        """Decode the rows in flight, join the rows just prefilled, and draw one token for each.

        With device steps, draw for the rows just prefilled alone; where there are none, several tokens for each row.
        """
        if self.device_steps is not None and self.hidden is None:
            self._take_device_steps(self.device_steps)
            return
        first = 0 if self.device_steps is None else self.active - self.fresh
        old = self.active - self.fresh - first
        parts = []
        if old:
            with span("decode"):
                parts.append(self._decode(old))
            if self.experts is not None:
                self.experts.decoded(self.request[:old], self.sample[:old])
        if self.hidden is not None:
            parts.append(self.hidden)
        self.hidden, self.fresh = None, 0
        with span("head"):
            logits = self.decoder.logits(parts[0] if len(parts) == 1 else torch.cat(parts))
        rows = slice(first, self.active)
        at = torch.from_numpy(self.generated[rows, None]).to(logits.device)
        uniform = self.uniform[rows].gather(1, at)[:, 0]
        with span("sample"):
            tokens, logprobs = sample_tokens(logits, uniform, self.params, unused_K=self.policy.unused_K)
        self.tokens[rows].scatter_(1, at, tokens[:, None])
        self.logprobs[rows].scatter_(1, at, logprobs[:, None])
        self.generated[rows] += 1
        generated = torch.from_numpy(self.generated[rows]).to(logits.device)
        stopped = self.rules.stopped(self.stop_set[rows], tokens, self.tokens[rows], generated)
        self.stopped[rows] = stopped
        self.finished[rows] = stopped | torch.from_numpy(self.generated[rows] >= self.limit[rows]).to(stopped.device)

    def _take_device_steps(self, steps: DeviceSteps) -> None:
        rows = slice(0, self.active)
        with span("decode"):
            generated, finished = steps.run(self.request[rows], self.generated[rows], self.limit[rows])
        self.generated[rows] = generated
        self.finished[rows] = torch.from_numpy(finished).to(self.finished.device)

    def _decode(self, rows: int) -> Tensor:
        """Compute the hidden states of the first rows after the token each has drawn last."""
        if self.arrangement is None or len(self.arrangement.prompt_R) != rows:
            self.arrangement = Arrangement(self.cache, self.request[:rows], self.policy.device)
        drawn = self.generated[:rows] - 1
        newest = self.tokens[:rows].gather(1, torch.from_numpy(drawn[:, None]).to(self.tokens.device))[:, 0]
        hidden = self.decoder.hidden(newest, self.position[:rows], DecodeLayout(self.arrangement, drawn))
        self.position[:rows] += 1
        return hidden

    def take_new(self) -> list[Drawn]:
        """Return what each row has drawn since it was asked last."""
        first, last = int(self.taken[: self.active].min()), int(self.generated[: self.active].max())
        tokens = self.tokens[: self.active, first:last].tolist()
        logprobs = self.logprobs[: self.active, first:last].tolist()
        new = []
        for row in range(self.active):
            fresh = slice(int(self.taken[row]) - first, int(self.generated[row]) - first)
            place = int(self.request[row]), int(self.sample[row])
            new.append(Drawn(*place, tuple(tokens[row][fresh]), tuple(logprobs[row][fresh])))
        self.taken[: self.active] = self.generated[: self.active]
        return new

    def retire(self) -> None:
        """Take finished rows out and close the gaps with the last rows in use."""
        done = self.finished[: self.active].nonzero()[:, 0].tolist()
        if not done:
            return
        for row in done:
            self.results[self.request[row]][self.sample[row]] = self._completion(row)
            self.left[self.request[row]] -= 1
            if not self.left[self.request[row]]:
                self.cache.release(int(self.request[row]))
        remaining = self.active - len(done)
        holes = [row for row in done if row < remaining]
        leaving = set(done)
        movers = [row for row in range(remaining, self.active) if row not in leaving]
        if holes:
            source = torch.tensor(movers, device=self.position.device)
            target = torch.tensor(holes, device=self.position.device)
            self.cache.move(source, target, int(self.generated[movers].max()))
            for array in (self.uniform, self.tokens, self.logprobs, self.position, self.stop_set):
                array[target] = array[source]
            for numbers in (self.request, self.sample, self.generated, self.limit, self.taken):
                numbers[holes] = numbers[movers]
        self.finished[: self.active] = False
        self.active = remaining
        self.arrangement = None

    def _completion(self, row: int) -> Completion:
        count = int(self.generated[row])
        token_ids = self.tokens[row, :count].cpu()
        stopped = bool(self.stopped[row])
        prompt = self.requests[self.request[row]].prompt
        return Completion(  # which copies: another request takes the row
            token_ids=token_ids.numpy(),
            logprobs=self.logprobs[row, :count].cpu().numpy(),
            finish_reason="stop" if stopped else "length",
            text=self.rules.text(int(self.stop_set[row]), token_ids.tolist(), prompt.special_tokens),
        )

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return all results, in the order of the requests."""
        finished: list[tuple[Completion, ...]] = []
        for samples in self.results:
            assert all(c is not None for c in samples), "a row was lost"
            finished.append(tuple(c for c in samples if c is not None))
        return finished
