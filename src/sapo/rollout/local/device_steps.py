"""Decode steps that never ask the host, several of them between two looks: what a CUDA graph can repeat.

On a GPU a small model's decode step is hundreds of kernels that take longer to launch than to run. A CUDA graph
launches them as one, and repeats exactly what was captured: the same kernels, shapes and addresses. So a step here

    reads and writes tensors that stay where they are: what each row has drawn, its position, whether it goes on;
    works on shapes that come from a few sizes alone (`StepShape`), never from numbers of the device;
    goes on computing for rows that have ended, and for rows that only fill up its shape: nobody reads the result, and
    what they would store goes to a spare row of the cache, since they may be rows that wait for their next turn.

The host looks every few tokens, takes finished rows out and lets prompts in (engine.py). The draws are those of any
other way of decoding, since a token's random number depends on nothing but the token (utils/rng.py). The same step runs
uncaptured on a CPU, where the tests hold it against the other way, and repeat a trace of it in place of a graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sapo.errors import ModelError
from sapo.model.policy import Policy
from sapo.rollout.local.cache import KVCache
from sapo.rollout.local.decoder import FastDecoder, refusal
from sapo.rollout.local.layouts import Part, StaticLayout
from sapo.rollout.local.sampling import sample_tokens
from sapo.rollout.params import SamplingParams
from sapo.rollout.stopping import StopRules
from sapo.utils.text import first_line

GraphChoice = bool | Literal["auto", "eager"]
"""auto: on a CUDA device, for models that can, unless SAPO_CUDA_GRAPHS=0. true: or refuse. eager: the same steps
uncaptured, on any device."""

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Makes of a step, without taking it, one that repeats what it does to the same tensors."""

LOOK_EVERY = 8
"""Steps between two looks. A row that ends idles for half as many on average; a look is a wait for the device."""

SHORTEST_SUFFIX = 32
"""Tokens of the smallest size of suffixes; further ones double."""


def uses_device_steps(policy: Policy, choice: GraphChoice, recording: bool) -> bool:
    """Return whether a policy is decoded by device steps.

    Args:
        recording: the experts of every token are to be recorded, which is done step by step.

    Raises:
        ModelError: they were asked for and cannot be.
    """
    on_gpu = policy.device.type == "cuda"
    if choice is False or (choice == "auto" and not (on_gpu and os.environ.get("SAPO_CUDA_GRAPHS", "1") != "0")):
        return False
    reason = "the experts of every token are recorded (model.routing_replay=R3)" if recording else refusal(policy)
    if choice is True and not on_gpu:
        reason = f"it is on the device {policy.device}, which has no CUDA graphs"
    if choice is True and reason is not None:
        raise ModelError(f"rollout.cuda_graphs=true cannot be had for this model: {reason}; leave it auto")
    return reason is None


def capture_on(device: torch.device, choice: GraphChoice) -> Capture | None:
    """Return how steps are captured; None where they are not."""
    return CudaCapture(device) if device.type == "cuda" and choice != "eager" else None


MOST_GRAPHS = 16
"""Shapes that are captured while there is a larger one that serves: a capture takes as long as dozens of steps."""

SPARE = 1.15
"""What a larger shape that has been captured may cost of the one that fits, before that is captured too."""

ROW_TOKENS = 64
"""Keys that are read in the time that the rest of a step takes a row."""


class CudaCapture:
    """Captures steps as CUDA graphs that share one pool of memory: none of them leaves anything in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """See `Capture`.

        Raises:
            ModelError: the device refuses, with the setting that does without.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process may talk to the device meanwhile.
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            raise ModelError(
                f"the decode step could not be captured as a CUDA graph ({first_line(error)}); "
                "rollout.cuda_graphs=false decodes without, and SAPO_CUDA_GRAPHS=0 does where there is no recipe"
            ) from error
        return graph.replay


@dataclass(frozen=True)
class RowState:
    """Keep the state of the rows that are decoded, on the device, at addresses that stay.

    Of two rows and three new tokens: uniforms, tokens and log-probabilities (2, 3), the others (2,).
    """

    uniform_RT: Tensor
    tokens_RT: Tensor
    logprobs_RT: Tensor
    position_R: Tensor
    """(R,) position of the token decoded next."""
    stop_set_R: Tensor
    stopped_R: Tensor
    """True where the row ended with a stop."""


@dataclass(frozen=True)
class StepShape:
    """All that the shapes of a step come from.

    >>> StepShape(rows=40, slots=(6, 0), own=64).holds(StepShape(rows=33, slots=(5, 0), own=64))
    True
    """

    rows: int
    slots: tuple[int, ...]
    """Prompts of each pool of the cache; 0 of a pool that no row belongs to."""
    own: int
    """Tokens of a row's suffix that are looked at."""

    def holds(self, other: StepShape) -> bool:
        """Return whether a step of this shape serves the rows of another."""
        slots = all(mine >= theirs for mine, theirs in zip(self.slots, other.slots, strict=True))
        return slots and self.rows >= other.rows and self.own >= other.own

    def cost(self, prompt_tokens: Sequence[int]) -> int:
        """Return about how many keys a layer reads; a row's other work counts as so many more.

        Args:
            prompt_tokens: of a slot of each pool.
        """
        shared = sum(count * tokens for count, tokens in zip(self.slots, prompt_tokens, strict=True))
        return self.rows * (self.own + ROW_TOKENS) + shared


def size_for(count: int, most: int) -> int:
    """Return the least size that holds so many, at most a quarter more: 1 ... 8, 10, 12, 14, 16, 20, ..., `most`.

    >>> [size_for(n, 100) for n in (1, 7, 9, 33, 97)]
    [1, 7, 10, 40, 100]
    """
    unit = 1 << max(0, (count - 1).bit_length() - 3)
    return min(most, -(-count // unit) * unit)


class DeviceSteps:
    """Draws several tokens for each row between two looks of the host.

    Args:
        decoder: of the policy, at its present weights.
        cache: whose suffixes are written; it has a spare row.
        samples: rows of each group.
        state: of all rows the cache has.
        capture: how a step is captured when its shape is met for the second time; None takes every step itself.
    """

    def __init__(
        self,
        decoder: FastDecoder,
        cache: KVCache,
        samples: Sequence[int],
        state: RowState,
        rules: StopRules,
        params: SamplingParams,
        capture: Capture | None,
    ) -> None:
        self.decoder, self.cache, self.state, self.rules, self.params = decoder, cache, state, rules, params
        self.capture = capture
        device, rows = state.position_R.device, cache.rows
        self.drawn_R, self.limit_R, self.prompt_R, self.inverse_R = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.live_R, self.held_R = (torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(2))
        self.width = self.widths_of(cache, samples)
        self.gather = [
            torch.zeros(pool.slots * width, dtype=torch.int64, device=device)
            for pool, width in zip(cache.pools, self.width, strict=True)
        ]
        self.met: set[StepShape] = set()
        self.captured: dict[StepShape, Step] = {}

    @staticmethod
    def widths_of(cache: KVCache, samples: Sequence[int]) -> list[int]:
        """Return the rows of a group of each pool: the largest's, so that only how many groups there are is a shape."""
        return [max((samples[g] for g, p in cache.pool_of.items() if p is pool), default=0) for pool in cache.pools]

    def run(
        self, group_R: np.ndarray, drawn_R: np.ndarray, limit_R: np.ndarray, start_R: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take some steps.

        Args:
            group_R: the group of each row in use, none of which has finished.
            drawn_R: tokens each has drawn, at least 1.
            limit_R: most tokens of each.
            start_R: where each row's present turn begins among its tokens; 0 when None.

        Returns:
            (R,) tokens each has drawn now, and whether it has finished.
        """
        rows = len(group_R)
        steps = min(LOOK_EVERY, int((limit_R - drawn_R).max()))
        shape = self._captured_for(self._shape(group_R, int(drawn_R.max()) + steps - 1))
        self._bring(shape, group_R, drawn_R, limit_R)
        for _ in range(steps):
            self._take(shape)
        drawn, live, held = torch.stack([self.drawn_R, self.live_R, self.held_R])[:, :rows].cpu().numpy()
        finished = (live == 0) & (held == 0)
        for row in np.flatnonzero(held):
            # Only now is there somebody who can decode: the row waited with the token that may complete a string.
            start = 0 if start_R is None else int(start_R[row])
            completed = self.rules.completed(
                int(self.state.stop_set_R[row]), self.state.tokens_RT[row], int(drawn[row]), start
            )
            self.state.stopped_R[row] = completed
            finished[row] = completed or drawn[row] >= limit_R[row]
        return drawn, finished

    def _shape(self, group_R: np.ndarray, longest: int) -> StepShape:
        """Return the shape that holds the rows and their suffixes of up to `longest` tokens."""
        present = set(group_R.tolist())
        # Slots of groups whose rows are all parked may lie between those in use.
        used = [max((s + 1 for s, g in enumerate(p.groups) if g in present), default=0) for p in self.cache.pools]
        own = max(SHORTEST_SUFFIX, 1 << (longest - 1).bit_length())
        return StepShape(
            rows=size_for(len(group_R), self.cache.rows),
            slots=tuple(size_for(n, pool.slots) if n else 0 for n, pool in zip(used, self.cache.pools, strict=True)),
            own=min(own, self.cache.length),
        )

    def _captured_for(self, tight: StepShape) -> StepShape:
        """Return a shape that has been captured and serves for one that fits, where it costs little more."""
        if self.capture is None or tight in self.met:
            return tight
        lengths = [pool.length for pool in self.cache.pools]
        larger = min((s for s in self.met if s.holds(tight)), key=lambda s: s.cost(lengths), default=None)
        if larger is None:
            return tight
        near = larger.cost(lengths) <= SPARE * tight.cost(lengths)
        return larger if near or len(self.met) >= MOST_GRAPHS else tight

    def _bring(self, shape: StepShape, group_R: np.ndarray, drawn_R: np.ndarray, limit_R: np.ndarray) -> None:
        """Write what the rows are to the device; rows that fill up the shape are not alive."""
        prompt_R, inverse_R = self.cache.prompt_length[group_R], self._gather(shape, group_R)
        numbers = np.zeros((5, shape.rows), dtype=np.int64)
        numbers[0] = 1  # the newest token is the one before, in rows that fill up too
        numbers[:, : len(group_R)] = np.stack([drawn_R, limit_R, prompt_R, inverse_R, np.ones_like(drawn_R)])
        sources = torch.from_numpy(numbers).to(self.drawn_R.device)
        targets = (self.drawn_R, self.limit_R, self.prompt_R, self.inverse_R, self.live_R)
        for target_R, source_R in zip(targets, sources, strict=True):
            target_R[: shape.rows] = source_R
        # No row in use has stopped, but who had its place before may have.
        for flag_R in (self.held_R, self.state.stopped_R):
            flag_R.zero_()

    def _gather(self, shape: StepShape, group_R: np.ndarray) -> np.ndarray:
        """Write which rows belong to which prompts; return where each row stands among the gathered ones."""
        place_R = np.empty(len(group_R), dtype=np.int64)
        offset = 0
        for pool, slots, width, gather in zip(self.cache.pools, shape.slots, self.width, self.gather, strict=True):
            rows = np.zeros((slots, width), dtype=np.int64)  # padded with row 0, whose result there nobody takes
            for slot, group in enumerate(pool.groups[:slots]):
                own = np.flatnonzero(group_R == group)
                rows[slot, : len(own)] = own
                place_R[own] = offset + slot * width + np.arange(len(own))
            gather[: rows.size] = torch.from_numpy(rows.ravel()).to(gather.device)
            offset += rows.size
        return place_R

    def _take(self, shape: StepShape) -> None:
        """Run one step: itself the first time, which also prepares what libraries prepare once, then its capture."""
        step = self.captured.get(shape)
        if step is None:
            step = partial(self.step, shape)
            if shape in self.met and self.capture is not None:
                step = self.captured[shape] = self.capture(step)
            self.met.add(shape)
        step()

    def step(self, shape: StepShape) -> None:
        """Decode the newest token of each row and draw the next one for those that live."""
        rows, state = shape.rows, self.state
        drawn_R, live_R, stop_set_R = self.drawn_R[:rows], self.live_R[:rows], state.stop_set_R[:rows]
        tokens_RT, logprobs_RT = state.tokens_RT[:rows], state.logprobs_RT[:rows]
        newest_R = tokens_RT.gather(1, drawn_R[:, None] - 1)[:, 0]
        hidden_RH = self.decoder.hidden(newest_R, state.position_R[:rows], self._layout(shape), static=True)
        # A row that has drawn its last token has no place for a further one, and does not write.
        at_R1 = drawn_R.clamp(max=tokens_RT.shape[1] - 1)[:, None]
        uniform_R = state.uniform_RT[:rows].gather(1, at_R1)[:, 0]
        logits_RV, unused_K = self.decoder.logits(hidden_RH), self.rules.policy.unused_K
        drawn_now = sample_tokens(logits_RV, uniform_R, self.params, look=False, unused_K=unused_K)
        for target_RT, new_R in zip((tokens_RT, logprobs_RT), drawn_now, strict=True):
            kept_R = target_RT.gather(1, at_R1)[:, 0]
            target_RT.scatter_(1, at_R1, torch.where(live_R, new_R, kept_R)[:, None])
        drawn_R += live_R
        state.position_R[:rows] += live_R
        ends_R = self.rules.ends_SV[stop_set_R, drawn_now[0]] & live_R
        state.stopped_R[:rows] |= ends_R
        goes_on_R = ~ends_R & (drawn_R < self.limit_R[:rows])
        if self.rules.may_stop:
            held_R = self.rules.may_SV[stop_set_R, drawn_now[0]] & live_R & ~ends_R
            self.held_R[:rows] |= held_R
            goes_on_R &= ~held_R
        live_R &= goes_on_R

    def _layout(self, shape: StepShape) -> StaticLayout:
        parts = [
            Part(pool, gather[: slots * width], slots, pool.length)
            for pool, slots, width, gather in zip(self.cache.pools, shape.slots, self.width, self.gather, strict=True)
            if slots
        ]
        rows = shape.rows
        place_R = (self.drawn_R[:rows] - 1).clamp(max=shape.own - 1)  # of rows that are done, any place will do
        numbers = (self.inverse_R[:rows], self.prompt_R[:rows], place_R, self.live_R[:rows])
        return StaticLayout(self.cache, parts, *numbers, shape.own)
