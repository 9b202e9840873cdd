"""How completions are sampled, and what becomes of their groups."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.section import Section


class VllmConfig(Section):
    """Settings of the engine `vllm`. The number of sequences decoded together is `rollout.max_rows`."""

    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes for weights and cache while it draws. It sleeps while the trainer works.
    A CPU takes `kv_cache_gib` in its place."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of the key-value cache in GiB. null: 1 on a CPU, and on a GPU what `gpu_memory_utilization` leaves."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest sequence, prompt and completion together, in tokens. null: that of the model, or the longest that fits
    the cache."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs and compilation: a quicker start and slower decoding. null: on a CPU only."""


class RolloutConfig(Section):
    """How completions are drawn."""

    engine: str = "local"
    """What draws completions: `local`, which samples with the trainer's own weights; `vllm`, which is vLLM in the same
    process (extra `vllm`, or its CPU build); or `module:Class`, an engine of your own (rollout/engine.py has the
    protocol)."""
    vllm: VllmConfig | None = None
    """Settings of the engine `vllm`; null takes their defaults."""
    parity_every: int | None = Field(None, ge=0)
    """Batches between two checks that an engine which copies the weights has the policy's: its log-probabilities are
    held against the trainer's, and a run whose engine differs stops. The first batches are always checked. null: 10 for
    such an engine (`vllm`), and none for `local`, which has no copy. 0: none."""
    parity_tolerance: float | None = Field(None, gt=0)
    """Largest difference that the check allows. In float32 it is the largest |log r| of a token, and null is 0.001. In
    16 bits it is the mean |r - 1|, since single tokens differ by rounding, and null is 0.1."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts of one rollout batch."""
    samples_per_prompt: int = Field(8, ge=2)
    """Completions of each prompt (G). They form the group that advantages are relative to."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest completion, in tokens. A longer one is truncated: its reward is 0 unless the task judges it."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of sampling. The policy in the loss has the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: keep the most likely tokens whose probabilities sum to this. Where top_p, top_k or min_p cut a
    tail, the trainer recomputes log pi_old, because the sampler's is of another distribution."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this fraction of the most likely one; 0 keeps all."""
    max_rows: int = Field(256, ge=1)
    """Largest number of sequences decoded together. It bounds memory and changes no completion."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """On a GPU, replay each decode step as a CUDA graph. auto: where the device is a GPU and the model has a fast
    forward. true: always, or refuse the run. false: never."""
    stop_token_ids: list[int] = Field([])
    """Stop tokens in addition to the model's own end of sequence."""
    zero_variance: Literal["keep", "drop", "refill"] = "keep"
    """Handling of zero-variance groups, whose rewards are all equal. keep: they cost no update and stay in the
    denominators. drop: they leave the batch and its denominators (DAPO's filter). refill: groups of further prompts of
    the same task replace them (DAPO's dynamic sampling), so that the batch keeps its size and exact mixture."""
    max_refills: int | None = Field(None, ge=1)
    """For refill: largest number of further sampling rounds in a step; 4 when null. Each round samples as many prompts
    as places are free. After the last round, zero-variance groups take the places that are left."""
    overlong: Literal["zero", "mask", "penalty"] = "zero"
    """Handling of completions that reach max_new_tokens. zero: they are scored as truncated. mask: they carry no loss
    and leave the denominators, while the group's mean and deviation keep their rewards (DAPO's overlong filtering).
    penalty: the reward falls linearly over the last `overlong_buffer` tokens, by 1 at the limit (DAPO's soft overlong
    punishment)."""
    overlong_buffer: int | None = Field(None, ge=1)
    """For penalty: number of tokens before max_new_tokens over which it grows from 0 to 1."""
    staleness: int = Field(0, ge=0)
    """Number of updates between the sampling of a batch and its first update, as in an asynchronous system. Batches are
    sampled ahead; the first batches of a run are younger. log pi_old is of the weights that sampled."""

    @property
    def refill_rounds(self) -> int:
        """Return the largest number of further sampling rounds of a step."""
        if self.zero_variance != "refill":
            return 0
        return 4 if self.max_refills is None else self.max_refills

    @field_validator("cuda_graphs", mode="before")
    @classmethod
    def _known_graphs(cls, value: Any) -> Any:
        if value not in ("auto", True, False):
            raise ValueError(f"cuda_graphs must be auto, true or false; got {value!r}; auto suits every device")
        return bool(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _vllm_of_the_engine(self) -> RolloutConfig:
        if self.vllm is not None and self.engine == "local":
            raise ValueError("rollout.vllm is for rollout.engine=vllm; got engine local; leave it out")
        return self

    @model_validator(mode="after")
    def _options_of_their_choice(self) -> RolloutConfig:
        if self.max_refills is not None and self.zero_variance != "refill":
            raise ValueError(
                f"max_refills is for zero_variance=refill; got {self.max_refills} with {self.zero_variance}; "
                "leave it out"
            )
        buffer, limit = self.overlong_buffer, self.max_new_tokens
        if buffer is not None and self.overlong != "penalty":
            raise ValueError(
                f"overlong_buffer is for overlong=penalty; got {buffer} with {self.overlong}; leave it out"
            )
        if self.overlong == "penalty" and (buffer is None or buffer >= limit):
            raise ValueError(
                f"overlong=penalty needs an overlong_buffer of 1..{limit - 1} tokens, less than max_new_tokens; got "
                f"{buffer}; DAPO takes a fifth of the limit, here {max(1, limit // 5)}"
            )
        return self
