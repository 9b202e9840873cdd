"""The local engine: continuous decoding with the trainer's own weights.

Each prompt is prefilled once and kept once for all its samples, and what all prompts begin with once for all
(cache.py); rows that finish leave the batch and waiting prompts take their place; one uniform per token comes from a
counter (utils/rng.py). On a GPU the host looks every few tokens only (device_steps.py). The weights are the trainer's,
arranged anew for each call where the model allows a faster forward (decoder.py), so that there is nothing to
synchronise, and the log-probabilities of the draws are log pi_old. Weights that are not the trainer's (a sampler of
another precision) lie in a twin of the policy (twin.py). A model for which all this is not exact is decoded in rows
(proof.py, rows.py). Between the turns of an episode rows stay where they are (conversation.py). Streams that are open
together share their steps (sharing.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sapo.config import RolloutConfig
from sapo.data import Completion
from sapo.errors import Interrupted, ModelError
from sapo.model.policy import Policy
from sapo.model.prefix_tree import PromptSpan, common_beginning, join_spans
from sapo.rollout.conversation import Conversation, Waves
from sapo.rollout.engine import Capabilities, Drawn, Likeliest, Request, TokenStream, Weights, check_lengths
from sapo.rollout.experts import ExpertLog
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.conversation import LocalConversation
from sapo.rollout.local.decoder import Decoder, FastDecoder, copied_bytes, decoder_of
from sapo.rollout.local.device_steps import (
    LOOK_EVERY,
    DeviceSteps,
    GraphChoice,
    RowState,
    capture_on,
    uses_device_steps,
)
from sapo.rollout.local.experts import ExpertRecorder
from sapo.rollout.local.layouts import Arrangement, DecodeLayout, PrefillLayout
from sapo.rollout.local.proof import CACHED, PACKED, choose_way
from sapo.rollout.local.room import rows_with_room
from sapo.rollout.local.rows import RowsDecoding, own_attention
from sapo.rollout.local.sampling import likeliest_tokens, request_uniforms, sample_tokens
from sapo.rollout.local.sharing import SharedRows
from sapo.rollout.local.twin import Twin
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules
from sapo.utils.spans import span

PREFILL_TOKENS = 8192
"""Prompt tokens of one prefill, unless a single prompt has more: bounds its memory and changes no completion."""

PREAMBLE_UNIT = 16
"""Where graphs repeat a step, what all prompts begin with is shared up to a multiple of so many tokens."""

KEPT_SHARE = 0.25
"""Of a GPU's memory: what a call of generate may leave for the next. The update wants the rest."""

_TAKEN_OVER = (
    "decoder",
    "cache",
    "rules",
    "uniform",
    "tokens",
    "logprobs",
    "position",
    "finished",
    "stopped",
    "stop_set",
)
"""What a call of generate takes over from one before that it can go on from."""

GROWING_TOKENS = 64
"""Tokens that a row of streams has room for at first."""

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

    capabilities: ClassVar[Capabilities] = Capabilities(records_experts=True, top_logprobs=True)
    interleaves: ClassVar[bool] = True

    def __init__(self, policy: Policy, max_rows: int = 256, cuda_graphs: GraphChoice = "auto") -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.cuda_graphs = cuda_graphs
        self.version = 0
        self._twin: Twin | None = None
        self._sampler = policy
        self._asleep = False
        self._shared: SharedRows | None = None  # of streams, as is the arrangement of the weights
        self._kept: RowsInPlace | None = None  # the last call's, whose cache and CUDA graphs may serve the next
        self.weights_set = 0
        """How often weights were set or given back: what was computed with others is of no use any more."""
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

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> TokenStream:
        """See `StreamingEngine.stream`. Streams that are open together are drawn in one batch, each step for all.

        A model that is decoded in rows takes a step for each stream. On a GPU the tokens come a few at a time
        (device_steps.py), but one by one while streams are open that draw by different settings, or show the likeliest
        tokens.
        """
        assert not self._asleep, "an engine draws after `wake` and `set_weights`, not while it sleeps"
        check_lengths(requests, params, self.policy.max_length)
        if self.way != PACKED:
            return self._stream_rows(requests, params)
        if self._shared is None:
            self._shared = SharedRows(self._rows_to_share(), self.max_rows)
        return self._shared.open(requests, params)

    @torch.no_grad()
    def _rows_to_share(self) -> Callable[[Sequence[Request], SamplingParams], RowsInPlace]:
        """Arrange the weights for streams; return what makes rows that further requests join."""
        decoder = decoder_of(self._sampler, STREAMED_CALLS)
        made = partial(RowsInPlace, max_rows=self.max_rows, experts=None, cuda_graphs=self.cuda_graphs, decoder=decoder)
        return partial(made, self._sampler, grows=True)

    @torch.no_grad()
    def _stream_rows(self, requests: Sequence[Request], params: SamplingParams) -> Generator[list[Drawn], None, None]:
        decoding = RowsDecoding(self._sampler, requests, params, self.max_rows, cached=self.way == CACHED)
        while decoding.unfinished:
            with own_attention(self._sampler):  # for one step alone: another stream may take the next
                decoding.admit()
                decoding.step()
            drawn = decoding.take_new()
            decoding.retire()
            yield [replace(new, completion=decoding.results[new.request][new.sample]) for new in drawn]

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
        before, self._kept = self._kept, None  # of a call that does not end nothing is kept
        decoding = RowsInPlace(self._sampler, requests, params, self.max_rows, recorder, graphs, before=before)
        del before
        with nullcontext() if recorder is None else recorder.recording(hooked=decoding.decoder is self._sampler):
            self.decode(decoding, should_stop)
        completions = decoding.completions()
        if decoding.device_steps is not None and decoding.may_serve_again:
            decoding.forget()
            self._kept = decoding
        return completions

    @staticmethod
    def decode(rows: RowsInPlace, should_stop: Callable[[], bool]) -> None:
        """Draw until all rows have ended.

        Raises:
            Interrupted: when `should_stop` says so between two tokens.
        """
        while rows.unfinished:
            if should_stop():
                raise Interrupted
            with span("prefill"):
                rows.admit()
            rows.step()
            rows.retire()

    def converse(self, params: SamplingParams) -> Conversation:
        """Begin a conversation; see `begin_conversation`.

        A model that transformers decodes takes waves, and so does a subclass that draws by a `generate` of its own.
        """
        own = getattr(self.generate, "__func__", None) is not LocalEngine.generate
        return Waves(self) if own or self.way != PACKED else LocalConversation(self, params)

    def rows_for(self, requests: Sequence[Request], params: SamplingParams, calls: int) -> RowsInPlace:
        """Make rows that are kept between the turns of a conversation, for about so many tokens of each."""
        assert not self._asleep, "an engine draws after `wake` and `set_weights`, not while it sleeps"
        decoder = decoder_of(self._sampler, calls)
        rows = RowsInPlace(
            *(self._sampler, requests, params, self.max_rows, None, self.cuda_graphs, decoder), keeps=True
        )
        rows.widen(calls)
        return rows

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
        self._shared = None
        self.weights_set += 1
        if given.keys() != own.keys():
            odd = sorted(given.keys() ^ own.keys())
            raise ValueError(f"weights must be those of the policy, each by its name; {odd[0]!r} is of one side only")
        if all(given[name].data_ptr() == own[name].data_ptr() for name in own):
            if self._sampler is not self.policy:
                self._kept = None
            self._sampler = self.policy
        else:
            self._kept = None
            self._twin = self._twin or Twin(self.policy)
            self._twin.put(given)
            self._sampler = self._twin.policy
        self.version = version

    def sleep(self) -> None:
        """See `Engine.sleep`. What is kept between two calls is a small part of a GPU's memory (`may_serve_again`)."""
        if self._twin is not None:
            self._twin.release()
        if self._sampler is not self.policy:
            self._kept = None  # whose decoder reads the weights that were given
        self._sampler, self._asleep, self._shared = self.policy, True, None
        self.weights_set += 1

    def wake(self) -> None:
        """See `Engine.wake`."""
        self._asleep = False

    def close(self) -> None:
        """See `Engine.close`."""
        self.sleep()
        self._twin = self._kept = None


class RowsInPlace:
    """One call of generate: rows 0..active-1 of every array are the sequences being decoded.

    Args:
        keeps: a row whose turn has ended is not given up but parked: rows active..active+parked-1 wait with all their
            keys and values until they go on with another turn (`resume`), or their room is needed.
        before: a call that has ended, whose tensors and CUDA graphs are taken over where they hold this one.
        grows: further requests join while others are drawn (`join`), so that there is no preamble, and the cache grows
            with what is drawn.
    """

    def __init__(
        self,
        policy: Policy,
        requests: Sequence[Request],
        params: SamplingParams,
        max_rows: int,
        experts: ExpertRecorder | None,
        cuda_graphs: GraphChoice,
        decoder: Decoder | None = None,
        keeps: bool = False,
        before: RowsInPlace | None = None,
        grows: bool = False,
    ) -> None:
        self.policy = policy
        self.experts = experts
        self.keeps = keeps
        self.requests = list(requests)
        self.params = params
        self.given: dict[int, SamplingParams] = {}
        """Settings of requests that have others than `params`."""
        self.settings = [replace(params, max_new_tokens=1, seed=0)]
        self.setting_of = np.zeros(len(requests), dtype=np.int64)  # which of them a request is drawn by
        self.shows_likeliest = any(r.top_logprobs for r in requests)
        self.likeliest: dict[tuple[int, int], list[Likeliest]] = {}  # of samples, since they were last taken
        self.waiting = deque(range(len(requests)))
        samples = [r.samples for r in requests]
        rows = min(sum(samples), max(max_rows, *samples))
        device = policy.device
        # Experts are recorded prompt by prompt, so each prompt is then computed whole.
        self.preamble = 0 if grows or experts is not None else common_beginning([r.prompt for r in requests])
        in_steps = uses_device_steps(policy, cuda_graphs, experts is not None)
        self.capture = capture_on(device, cuda_graphs) if in_steps else None
        alone = not (keeps or grows)  # a call of `generate`, whose rows nobody joins
        static = self.capture is not None and alone and not self.shows_likeliest
        if static:  # so that the next call's is likely to have the same length
            self.preamble -= self.preamble % PREAMBLE_UNIT
        lengths = [len(r.prompt.token_ids) - self.preamble for r in requests]
        stop_sets = sorted({r.prompt.stop for r in requests})
        self.stop_set_of = [stop_sets.index(r.prompt.stop) for r in requests]
        if before is not None and not (
            static
            and before._serves(policy, params, rows, stop_sets)
            and before._begin(lengths, samples, self.preamble)
        ):
            before.release()
            before = None
        self.asked_rows = rows
        if before is None:
            self.decoder: Decoder = decoder or decoder_of(
                policy, params.max_new_tokens, None if experts is None else experts.chosen
            )
            if alone:  # the copies of weights have their room by now
                rows = rows_with_room(policy, rows, params.max_new_tokens, max(lengths), max(samples))
            room = min(params.max_new_tokens, GROWING_TOKENS) if grows else params.max_new_tokens
            self.cache: KVCache = KVCache(rows, room, lengths, samples, self.preamble, rounded=static, spare=in_steps)
            self.rules = StopRules(policy, stop_sets, params.stop_token_ids)
            self._make_tensors(rows, device)
        else:
            rows = before.cache.rows
            for name in _TAKEN_OVER:
                setattr(self, name, getattr(before, name))
            self.finished.zero_()
            self.decoder.refresh(policy)  # type: ignore[attr-defined]
        self.arrangement: Arrangement | None = None
        self.active = self.parked = self.ended = 0
        self.request = np.zeros(rows, dtype=np.int64)
        self.sample = np.zeros(rows, dtype=np.int64)
        self.generated = np.zeros(rows, dtype=np.int64)
        self.limit = np.zeros(rows, dtype=np.int64)  # most tokens to generate
        self.start = np.zeros(rows, dtype=np.int64)  # where the turn begins: what is not drawn before it is read
        self.since = np.zeros(rows, dtype=np.int64)  # of a parked row: which of the turns it was that ended
        self.taken = np.zeros(rows, dtype=np.int64)  # tokens that a stream has given away
        self.left = np.array(samples)  # rows of each request that have not been given up
        self.hidden: Tensor | None = None  # (fresh rows, H): last hidden states not sampled from yet
        self.fresh = 0
        self.results: list[list[Completion | None]] = [[None] * r.samples for r in requests]
        self.known_finished: np.ndarray | None = None  # what the last look saw, so that nobody waits for it again
        # Finished rows stay on the device till the end: to fetch each would be to wait for it.
        self.sets_aside = in_steps and alone
        self.aside: list[tuple[list[tuple[int, int, slice]], Tensor]] = []
        self.cuda_graphs = cuda_graphs
        self.device_steps: DeviceSteps | None = self._make_device_steps() if before is None else before.device_steps
        if self.preamble:
            layout = PrefillLayout(self.cache, None, device)
            self._run([(requests[0].prompt, 0, self.preamble)], layout)
            self.cache.preamble_states = layout.kept

    def _make_tensors(self, rows: int, device: torch.device) -> None:
        """Make what is kept of the rows on the device."""
        length = self.params.max_new_tokens
        self.uniform = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, length, dtype=torch.float32, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)  # of the token decoded next
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stop_set = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def may_serve_again(self) -> bool:
        """Return whether tensors and graphs may be kept for the next call: they take little of a GPU's memory."""
        if not (isinstance(self.decoder, FastDecoder) and self.decoder.refreshable and self.cache.rounded):
            return False
        if self.policy.device.type != "cuda":
            return True
        held = self.cache.nbytes + copied_bytes(self.policy, self.params.max_new_tokens)
        return held <= KEPT_SHARE * torch.cuda.get_device_properties(self.policy.device).total_memory

    def forget(self) -> None:
        """Drop the requests and completions of a call that has ended."""
        self.requests, self.results, self.hidden, self.arrangement = [], [], None, None

    def release(self) -> None:
        """Give the memory of a call that has ended back, before another takes its place."""
        self.device_steps = None
        self.decoder = self.policy
        self.cache.layers.clear()
        for pool in (self.cache.preamble, *self.cache.pools):
            pool.layers.clear()

    def _serves(self, policy: Policy, params: SamplingParams, rows: int, stop_sets: list[tuple[str, ...]]) -> bool:
        """Return whether another call draws as this one did; only its prompts and its seed may be others."""
        same = replace(self.params, seed=params.seed) == params and self.rules.stop_sets == stop_sets
        same = same and self.policy is policy and self.asked_rows == rows and self.device_steps is not None
        return same and isinstance(self.decoder, FastDecoder) and self.decoder.folds_as(policy)

    def _begin(self, lengths: Sequence[int], samples: Sequence[int], preamble: int) -> bool:
        """Take up the prompts of another call; return whether cache and graphs hold them."""
        steps = self.device_steps
        if steps is None or not self.cache.begin(lengths, samples, preamble):
            return False
        return steps.widths_of(self.cache, samples) == steps.width

    def _make_device_steps(self) -> DeviceSteps | None:
        """Make the steps that a CUDA graph repeats, of the tensors there are now."""
        recording = self.experts is not None
        together = [*set(self.request[: self.active].tolist()), *self.waiting]
        if len(set(self.setting_of[together])) > 1 or any(self.requests[i].top_logprobs for i in together):
            return None  # such rows are drawn on the host
        if not uses_device_steps(self.policy, self.cuda_graphs, recording) or not isinstance(self.decoder, FastDecoder):
            return None
        state = RowState(self.uniform, self.tokens, self.logprobs, self.position, self.stop_set, self.stopped)
        samples = [r.samples for r in self.requests]
        params = self.settings[self.setting_of[together[0]]] if together else self.params
        return DeviceSteps(self.decoder, self.cache, samples, state, self.rules, params, self.capture)

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
            if chosen and tokens + prompt_tokens > PREFILL_TOKENS:
                break
            needed = rows + self.requests[self.waiting[0]].samples
            while self.parked and (needed + self.parked > self.cache.rows or not self.cache.has_slot(self.waiting[0])):
                self._give_up_coldest()
            if not self.cache.has_slot(self.waiting[0]):
                break
            self.cache.admit(self.waiting[0])
            tokens += prompt_tokens
            rows += self.requests[self.waiting[0]].samples
            chosen.append(self.waiting.popleft())
        if chosen:
            self._make_room(rows - self.active)
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
            params = self.given.get(i, self.params)
            uniforms = request_uniforms(request, params)
            self.uniform[row : row + count, : uniforms.shape[1]] = torch.from_numpy(uniforms).to(self.uniform.device)
            self.stop_set[row : row + count] = self.stop_set_of[i]
            self.position[row : row + count] = request.prompt.next_position
            self.limit[row : row + count] = request.limits or params.max_new_tokens
            self.generated[row : row + count] = self.start[row : row + count] = 0
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
        A row that reads what was said to it draws nothing: its next token is there already.
        """
        if self.device_steps is not None and self.hidden is None and not self._reads(0).any():
            self._take_device_steps(self.device_steps)
            return
        first = 0 if self.device_steps is None or self.hidden is None else self.active - self.fresh
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
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        reads = self._reads(first)
        if not reads.any():
            self._sample(hidden, slice(first, self.active))
            return
        self.generated[first : self.active] += reads
        drawing = np.flatnonzero(~reads)
        if len(drawing):
            self._sample(hidden[torch.from_numpy(drawing).to(hidden.device)], first + drawing)

    def _reads(self, first: int) -> np.ndarray:
        """Return which rows from the first on, to the last that decodes, have not read all that was said to them."""
        reads: np.ndarray = self.generated[first : self.active] < self.start[first : self.active]
        return reads

    def _sample(self, hidden: Tensor, rows: slice | np.ndarray) -> None:
        """Draw the next token of some rows."""
        with span("head"):
            logits = self.decoder.logits(hidden)
        index = torch.from_numpy(np.arange(len(self.request))[rows]).to(logits.device)
        at = torch.from_numpy(self.generated[rows]).to(logits.device)
        uniform = self.uniform[index, at]
        with span("sample"):
            self._note_likeliest(logits, rows)
            tokens, logprobs = self._draw(logits, uniform, self.setting_of[self.request[rows]])
        self.tokens[index, at] = tokens
        self.logprobs[index, at] = logprobs
        self.generated[rows] += 1
        history = self.tokens[rows] if isinstance(rows, slice) else self.tokens[index]
        generated = torch.from_numpy(self.generated[rows])
        stopped = self.rules.stopped(self.stop_set[index], tokens, history, generated, self.start[rows])
        self.stopped[index] = stopped
        over = torch.from_numpy(self.generated[rows] >= self.limit[rows]).to(stopped.device)
        self.finished[index] = stopped | over
        self.known_finished = None

    def _draw(self, logits_RV: Tensor, uniform_R: Tensor, setting_R: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draw a token for each of some rows by the settings of its request; see `sample_tokens`."""
        unused_K = self.policy.unused_K
        if len(present := np.unique(setting_R)) == 1:
            return sample_tokens(logits_RV, uniform_R, self.settings[present[0]], unused_K=unused_K)
        tokens_R = torch.empty(len(setting_R), dtype=torch.int64, device=logits_RV.device)
        logprobs_R = torch.empty(len(setting_R), dtype=torch.float32, device=logits_RV.device)
        for setting in present:
            index = torch.from_numpy(np.flatnonzero(setting_R == setting)).to(logits_RV.device)
            tokens_R[index], logprobs_R[index] = sample_tokens(
                logits_RV[index], uniform_R[index], self.settings[setting], unused_K=unused_K
            )
        return tokens_R, logprobs_R

    def _note_likeliest(self, logits_RV: Tensor, rows: slice | np.ndarray) -> None:
        """Keep the likeliest next tokens of the rows whose requests ask for them."""
        places = zip(self.request[rows].tolist(), self.sample[rows].tolist(), strict=True)
        for row, (group, sample) in enumerate(places if self.shows_likeliest else ()):
            if count := self.requests[group].top_logprobs:
                settings, unused_K = self.settings[self.setting_of[group]], self.policy.unused_K
                found = likeliest_tokens(logits_RV[row : row + 1], settings, count, unused_K)
                self.likeliest.setdefault((group, sample), []).extend(found)

    def _take_device_steps(self, steps: DeviceSteps) -> None:
        rows = slice(0, self.active)
        with span("decode"):
            generated, finished = steps.run(
                self.request[rows], self.generated[rows], self.limit[rows], self.start[rows]
            )
        self.generated[rows] = generated
        if self.sets_aside:
            self.known_finished = finished
        else:
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
            likeliest = tuple(self.likeliest.pop(place, ()))
            new.append(Drawn(*place, tuple(tokens[row][fresh]), tuple(logprobs[row][fresh]), likeliest=likeliest))
        self.taken[: self.active] = self.generated[: self.active]
        return new

    def retire(self, dropped: Collection[int] = ()) -> None:
        """Take finished rows out, or park them, and close the gaps with the last rows in use.

        Args:
            dropped: requests that nobody waits for: their rows leave no completion.
        """
        known, self.known_finished = self.known_finished, None
        if known is None:
            known = self.finished[: self.active].cpu().numpy()
        done: list[int] = np.flatnonzero(known).tolist()
        if not done:
            return
        if self.sets_aside:
            self._set_aside(done)
        for row in done:
            if not self.sets_aside and self.request[row] not in dropped:
                self.results[self.request[row]][self.sample[row]] = self._completion(row)
            if not self.keeps:
                self._give_up(row)
        remaining = self.active - len(done)
        holes = [row for row in done if row < remaining]
        leaving = set(done)
        movers = [row for row in range(remaining, self.active) if row not in leaving]
        if self.keeps:
            self.since[done] = self.ended
            self.ended += 1
            self.parked += len(done)
            self._move([*movers, *holes], [*holes, *movers])
        else:
            self._move(movers, holes)
        self.finished[: self.active] = False
        self.active = remaining
        self.arrangement = None

    def _give_up(self, row: int) -> None:
        """Count a row as gone from its group, whose prompt goes with the last."""
        group = int(self.request[row])
        self.left[group] -= 1
        if not self.left[group]:
            self.cache.release(group)

    def _move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows over others; where both are the same rows in another order, exchange them."""
        if not sources:
            return
        source = torch.tensor(sources, device=self.position.device)
        target = torch.tensor(targets, device=self.position.device)
        self.cache.move(source, target, int(self.generated[sources].max()))
        for array in (self.uniform, self.tokens, self.logprobs, self.position, self.stop_set):
            array[target] = array[source]
        for numbers in (self.request, self.sample, self.generated, self.limit, self.taken, self.start, self.since):
            numbers[targets] = numbers[sources]

    # --------------------------------------------------------------------------------------- between the turns of rows

    def _give_up_coldest(self) -> None:
        """Give up the parked row whose last turn ended before those of the others."""
        last = self.active + self.parked - 1
        row = self.active + int(self.since[self.active : last + 1].argmin())
        self._give_up(row)
        if row != last:
            self._move([last], [row])
        self.parked -= 1

    def _make_room(self, count: int) -> None:
        """Move parked rows out of the way of so many that are about to begin."""
        moved = min(count, self.parked)
        first = self.active + max(count, self.parked)
        self._move(list(range(self.active, self.active + moved)), list(range(first, first + moved)))

    def widen(self, length: int) -> None:
        """Make room for so many tokens of each row, read and drawn."""
        if length <= self.tokens.shape[1]:
            return
        more = (0, length - self.tokens.shape[1])
        self.uniform, self.tokens, self.logprobs = (
            torch.nn.functional.pad(t, more) for t in (self.uniform, self.tokens, self.logprobs)
        )
        self.cache.grow(length)
        self.arrangement = None
        self.device_steps = self._make_device_steps()

    def widen_for(self, lengths: Sequence[int]) -> None:
        """Make room for rows of so many tokens, and for some more, so that it is seldom done."""
        longest = max(lengths)
        if longest > self.tokens.shape[1]:
            most = self.policy.max_length or longest
            self.widen(max(longest, min(2 * self.tokens.shape[1], most)))

    def add(self, requests: Sequence[Request], params: SamplingParams | None = None) -> None:
        """Take up further requests, whose prompts begin with the preamble as all others do.

        Args:
            params: by which they are drawn, with the stop tokens of all others; None for those of the first.
        """
        if not requests:
            return
        first = len(self.requests)
        self.requests += requests
        self.shows_likeliest |= any(r.top_logprobs for r in requests)
        setting = 0
        if params is not None:
            kind = replace(params, max_new_tokens=1, seed=0)
            if kind not in self.settings:
                self.settings.append(kind)
            setting = self.settings.index(kind)
            self.given |= dict.fromkeys(range(first, len(self.requests)), params)
        self.setting_of = np.append(self.setting_of, np.full(len(requests), setting))
        self.waiting.extend(range(first, len(self.requests)))
        samples = [r.samples for r in requests]
        self.left = np.concatenate([self.left, samples])
        self.results += [[None] * count for count in samples]
        self.cache.add([len(r.prompt.token_ids) - self.preamble for r in requests], samples)
        new = [stop for stop in dict.fromkeys(r.prompt.stop for r in requests) if stop not in self.rules.stop_sets]
        if new:
            stop_sets = [*self.rules.stop_sets, *new]
            self.rules = StopRules(self.policy, stop_sets, self.params.stop_token_ids)
        self.stop_set_of += [self.rules.stop_sets.index(r.prompt.stop) for r in requests]
        self.arrangement = None
        self.device_steps = self._make_device_steps()

    def join(self, requests: Sequence[Request], params: SamplingParams, max_rows: int) -> None:
        """Take up requests while others are drawn, with more rows where there are too few.

        Args:
            params: by which they are drawn; their stop tokens are those of all.
            max_rows: most rows, unless a single request has more.
        """
        needed = self.active + sum(r.samples for r in (*(self.requests[i] for i in self.waiting), *requests))
        most = max(max_rows, *(r.samples for r in requests))
        self._deepen(min(1 << (needed - 1).bit_length(), most))
        if (more := params.max_new_tokens - self.tokens.shape[1]) > 0:
            self.uniform, self.tokens, self.logprobs = (
                torch.nn.functional.pad(t, (0, more)) for t in (self.uniform, self.tokens, self.logprobs)
            )
        self.add(requests, params)

    def _deepen(self, rows: int) -> None:
        """Make room for so many rows."""
        more = rows - self.cache.rows
        if more <= 0:
            return
        self.cache.deepen(rows)
        for name in ("request", "sample", "generated", "limit", "start", "since", "taken"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        for name in ("uniform", "tokens", "logprobs", "position", "finished", "stopped", "stop_set"):
            held = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_zeros(more, *held.shape[1:])]))

    def make_place(self) -> None:
        """Let the cache grow before rows have more to keep than it has room for."""
        needed = int(self.generated[: self.active].max()) + LOOK_EVERY
        if needed > self.cache.length and self.cache.length < self.tokens.shape[1] - 1:
            self.cache.grow(min(max(needed, 2 * self.cache.length) + 1, self.tokens.shape[1]))
            self.arrangement = None
            self.device_steps = self._make_device_steps()

    def give_up(self, requests: range) -> None:
        """Leave the samples of some requests undrawn, whether they wait or are being drawn."""
        for i in [i for i in self.waiting if i in requests]:
            self.waiting.remove(i)
            self.cache.forget(i)
        rows = [row for row in range(self.active) if self.request[row] in requests]
        self.finished[rows] = True
        self.retire(dropped=requests)
        for place in [place for place in self.likeliest if place[0] in requests]:
            del self.likeliest[place]

    def held(self) -> dict[int, Tensor]:
        """Return what each parked row has read and drawn after its prompt, on the host."""
        rows = range(self.active, self.active + self.parked)
        tokens = self.tokens[self.active : self.active + self.parked].cpu()
        return {row: tokens[i, : int(self.generated[row])] for i, row in enumerate(rows)}

    def resume(self, turns: dict[int, tuple[Request, Sequence[int]]]) -> None:
        """Let parked rows go on, each reading some tokens and then drawing; no row may be decoding.

        Args:
            turns: by row, the request of its next turn and what it reads.
        """
        assert not self.active, "turns begin where all rows are parked"
        device = self.tokens.device
        for row, (request, said) in turns.items():
            stop = int(self.generated[row]) + len(said)
            uniforms = torch.from_numpy(request_uniforms(request, self.params)[0])
            most = request.limits[0] if request.limits else self.params.max_new_tokens
            self.tokens[row, self.generated[row] : stop] = torch.tensor(said, dtype=torch.int64, device=device)
            self.uniform[row, stop : stop + most] = uniforms[:most].to(device)
            self.start[row], self.limit[row] = stop, stop + most
            self.results[self.request[row]][self.sample[row]] = None
        count = len(turns)
        holes = [row for row in range(count) if row not in turns]
        movers = sorted(row for row in turns if row >= count)
        self._move([*movers, *holes], [*holes, *movers])
        self.active, self.parked = count, self.parked - count
        self.arrangement = None

    def _completion(self, row: int) -> Completion:
        turn = slice(int(self.start[row]), int(self.generated[row]))
        return self._make_completion(
            int(self.request[row]),
            self.tokens[row, turn].cpu().numpy(),
            self.logprobs[row, turn].cpu().numpy(),
            bool(self.stopped[row]),
        )

    def _make_completion(self, request: int, token_ids: np.ndarray, logprobs: np.ndarray, stopped: bool) -> Completion:
        prompt = self.requests[request].prompt
        return Completion(  # which copies: another request takes the row
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            text=self.rules.text(self.stop_set_of[request], token_ids.tolist(), prompt.special_tokens),
        )

    def _set_aside(self, done: list[int]) -> None:
        """Copy what finished rows have drawn to a place of its own on the device."""
        index = torch.tensor(done, device=self.tokens.device)
        longest = int(self.generated[done].max())
        logprobs = self.logprobs[index, :longest].view(torch.int32)
        drawn = torch.cat([self.tokens[index, :longest], logprobs, self.stopped[index, None]], dim=1)
        places = [
            (int(self.request[row]), int(self.sample[row]), slice(int(self.start[row]), int(self.generated[row])))
            for row in done
        ]
        self.aside.append((places, drawn))

    def fetch(self) -> None:
        """Make completions of all that was set aside, with one copy to the host."""
        if not self.aside:
            return
        numbers = torch.cat([drawn.flatten() for _, drawn in self.aside]).cpu().numpy()
        start = 0
        for places, drawn in self.aside:
            rows = numbers[start : start + drawn.numel()].reshape(drawn.shape)
            start += drawn.numel()
            longest = drawn.shape[1] // 2
            for (request, sample, turn), row in zip(places, rows, strict=True):
                token_ids = row[:longest][turn].copy()
                logprobs = row[longest : 2 * longest][turn].astype(np.int32).view(np.float32)
                self.results[request][sample] = self._make_completion(request, token_ids, logprobs, bool(row[-1]))
        self.aside = []

    def take(self, group: int, sample: int) -> Completion:
        """Return the turn that a row has ended."""
        completion = self.results[group][sample]
        assert completion is not None, "a row was lost"
        self.results[group][sample] = None
        return completion

    def completions(self) -> list[tuple[Completion, ...]]:
        """Return all results, in the order of the requests."""
        self.fetch()
        finished: list[tuple[Completion, ...]] = []
        for samples in self.results:
            assert all(c is not None for c in samples), "a row was lost"
            finished.append(tuple(c for c in samples if c is not None))
        return finished
