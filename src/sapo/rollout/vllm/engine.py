"""The engine `vllm`: completions by vLLM in this process, in tokens and with the log-probabilities they were drawn by.

Each sample is a request of its own, whose noise is seeded by (seed, prompt, sample) alone. A sample therefore draws the
same noise whatever else is in the batch; vLLM rounds by the composition of its batches, so that a token whose
probability falls on the edge of a draw may still differ. Weights are a copy in vLLM's own form. `run/parity.py` proves
from time to time that it is the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import ClassVar, Self

from sapo.config import RolloutConfig, RunConfig, VllmConfig
from sapo.data import Completion
from sapo.errors import ConfigError, Interrupted
from sapo.model.policy import Policy
from sapo.rollout.engine import Capabilities, Drawn, Request, Weights, check_lengths, longest_request
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams
from sapo.rollout.vllm.core import VllmCore, check_head_size
from sapo.rollout.vllm.drawing import Drawing
from sapo.rollout.vllm.models import check_model


class VllmEngine:
    """Samples completions with vLLM.

    Args:
        policy: the model; vLLM is started from its config, without weights.
        max_rows: sequences decoded together.
        settings: `rollout.vllm` of the recipe.

    Raises:
        ConfigError, ModelError: vLLM cannot run this model here; the message says why.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(copies_weights=True, top_logprobs=True)
    interleaves: ClassVar[bool] = False

    def __init__(self, policy: Policy, max_rows: int = 256, settings: VllmConfig | None = None) -> None:
        settings = settings or VllmConfig()
        check_model(policy, folds=settings.lora_sync == "merged")
        self.policy = policy
        self.version = 0
        self._core = VllmCore(policy, max_rows, settings)
        self._ready = False

    @property
    def max_length(self) -> int:
        """Return the longest sequence that its cache holds; see `max_length_of`."""
        return self._core.max_length

    @classmethod
    def from_settings(cls, policy: Policy, settings: RolloutConfig) -> Self:
        """See `RecipeEngine.from_settings`."""
        return cls(policy, settings.max_rows, settings.vllm)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Refuse what a recipe asks for and this engine cannot do, before anything is loaded or made.

        Raises:
            ConfigError: the rule, and the way out.
        """
        if config.train.ranks > 1:
            raise ConfigError(
                f"rollout.engine=vllm runs in the process that trains, which must be one; got train.ranks="
                f"{config.train.ranks}; set train.ranks=1, rollout.servers=1 or rollout.engine=local"
            )
        if config.device not in ("auto", "cpu", "cuda", "cuda:0"):
            raise ConfigError(
                f"rollout.engine=vllm draws on the first device it sees; got device={config.device}; set device=cuda "
                f"and the environment's CUDA_VISIBLE_DEVICES={config.device.partition(':')[2]}"
            )
        made = config.model.coldstart
        if made is not None and not config.device.startswith("cuda"):
            check_head_size(made.hidden_size // made.heads)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`."""
        assert self._ready, "an engine draws after `set_weights`, and not while it sleeps"
        assert experts is None, "this engine records no experts"
        if not requests:
            return []
        check_lengths(requests, params, self.policy.max_length)
        self._check_room(requests, params)
        drawing = Drawing(self.policy, self._core, requests, params)
        try:
            while drawing.unfinished:
                if should_stop():
                    raise Interrupted
                drawing.step()
        finally:
            drawing.abort()
        return drawing.completions()

    def stream(self, requests: Sequence[Request], params: SamplingParams) -> Generator[list[Drawn], None, None]:
        """See `StreamingEngine.stream`. One stream at a time: what is in flight is of one call."""
        assert self._ready, "an engine draws after `set_weights`, and not while it sleeps"
        check_lengths(requests, params, self.policy.max_length)
        self._check_room(requests, params)
        drawing = Drawing(self.policy, self._core, requests, params, streamed=True)
        try:
            while drawing.unfinished:
                drawing.step()
                yield drawing.take_new()
        finally:
            drawing.abort()

    def set_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.set_weights`. An adapter goes as itself, or is folded in (`rollout.vllm.lora_sync`)."""
        self._core.load(self.policy, weights)
        self.version, self._ready = version, True

    def sleep(self) -> None:
        """See `Engine.sleep`. A CPU keeps the memory."""
        self._core.sleep()
        self._ready = False

    def wake(self) -> None:
        """See `Engine.wake`."""
        self._core.wake()

    def close(self) -> None:
        """See `Engine.close`."""
        self._core.close()
        self._ready = False

    def _check_room(self, requests: Sequence[Request], params: SamplingParams) -> None:
        longest = sum(longest_request(requests, params))
        if longest > self.max_length:
            raise ConfigError(
                f"vLLM's cache must hold the longest sequence, prompt and completion; got {longest} tokens and a cache "
                f"for {self.max_length}; raise rollout.vllm.kv_cache_gib, or rollout.vllm.max_model_len if given"
            )
