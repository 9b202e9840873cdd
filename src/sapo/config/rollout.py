"""Settings of sampling: how many completions, how they are drawn, by a sampler of which precision and age.

They are a part of the recipe (config.py) in a file of their own.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.section import Section

SamplerDtype = Literal["bfloat16", "float8_e4m3fn", "float8_e5m2"]


class SamplerSwitchConfig(Section):
    """Another precision of the sampler from some step on: an intervention, for experiments."""

    step: int = Field(ge=1)
    """The first step, counted from 1, that samples with it."""
    dtype: SamplerDtype | None
    """What `sampler_dtype` is from then on."""


class RolloutConfig(Section):
    """How completions are drawn."""

    engine: str = "local"
    """What draws completions: `local`, which samples with the trainer's own weights, or `module:Class`, an engine of
    your own (rollout/engine.py has the protocol)."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts of one rollout batch."""
    samples_per_prompt: int = Field(8, ge=2)
    """Completions of each prompt (G): the group an advantage is relative to."""
    max_new_tokens: int = Field(64, ge=1)
    """A completion that has not stopped by then is truncated: reward 0 (unless the task judges it), counted apart."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling and of the policy in the loss alike."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. When any tail is cut, log pi_old is recomputed: the sampler's is of another distribution."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the most likely one."""
    max_rows: int = Field(256, ge=1)
    """Sequences decoded together; bounds memory only."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """On a GPU, repeat each decode step as a CUDA graph and look at the rows every few tokens. auto: where the device
    is a GPU and the model takes the fast forward (model/fast.py). true: or refuse. false: step by step."""
    stop_token_ids: list[int] = Field([])
    """Stop tokens beside the model's own end of sequence."""
    zero_variance: Literal["keep", "drop", "refill"] = "keep"
    """What becomes of zero-variance groups, whose rewards are all equal. keep: they cost no update and stay in the
    denominators. drop: they leave the batch and its denominators (DAPO's filter). refill: their places are taken by
    groups of further prompts of the same task (DAPO's dynamic sampling), so that the batch has its full size and exact
    mixture."""
    max_refills: int | None = Field(None, ge=1)
    """For refill: further rounds of sampling in a step, each of as many prompts as places are free; 4 when null. When
    they are spent, zero-variance groups take the places that are left."""
    overlong: Literal["zero", "mask", "penalty"] = "zero"
    """Completions that reach max_new_tokens. zero: they are judged as truncated, nothing more. mask: they carry no loss
    and leave the denominators; the group's mean and deviation keep their rewards (DAPO's overlong filtering). penalty:
    the reward that advantages are made of falls over the last `overlong_buffer` tokens, to 1 less at the limit (DAPO's
    soft overlong punishment)."""
    overlong_buffer: int | None = Field(None, ge=1)
    """For penalty: over how many tokens before max_new_tokens it grows from 0 to 1."""
    rewards: Literal["verifier", "random"] = "verifier"
    """What advantages are made of. random, for experiments: a coin for each completion, whatever the verifier says of
    it. Logs, curriculum and evaluation keep the verifier's, so that they tell what such training does to the policy."""
    sampler_dtype: SamplerDtype | None = None
    """Sample from the policy's weights rounded to this dtype, as an engine of that precision would: matrices only, and
    the computation stays in model.dtype (model/rounding.py). The trainer and evaluation keep the policy's own weights.
    null samples from these too."""
    sampler_scaling: Literal["none", "tensor", "channel"] = "tensor"
    """What 8-bit weights are scaled by before rounding: by the largest of each matrix, by that of each of its rows, or
    not at all (a plain cast)."""
    sampler_vectors: bool = False
    """Round norms and biases as well: no engine does, and it is what makes a small model's mismatch large."""
    sampler_switch: SamplerSwitchConfig | None = None
    """Change `sampler_dtype` in mid-run; null does not."""
    staleness: int = Field(0, ge=0)
    """Updates between the sampling of a batch and its first update, as in an asynchronous system: batches are sampled
    ahead and wait their turn. The run's first batches are younger. log pi_old is of the weights that sampled."""

    def sampler_dtype_at(self, step: int) -> str | None:
        """`sampler_dtype` of step 0, 1, ..."""
        switch = self.sampler_switch
        return self.sampler_dtype if switch is None or step + 1 < switch.step else switch.dtype

    @property
    def sampler_is_policy(self) -> bool:
        """Whether all samples are drawn with the policy's own weights."""
        return self.sampler_dtype is None and (self.sampler_switch is None or self.sampler_switch.dtype is None)

    @property
    def refill_rounds(self) -> int:
        """Further rounds of sampling a step may take."""
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
    def _options_of_their_choice(self) -> RolloutConfig:
        if self.max_refills is not None and self.zero_variance != "refill":
            raise ValueError(
                f"max_refills is for zero_variance=refill; got {self.max_refills} with {self.zero_variance}; "
                "leave it out"
            )
        if self.rewards == "random" and self.overlong == "penalty":
            raise ValueError(
                "overlong=penalty is taken off the verifier's reward; got rewards=random beside it; leave one out"
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
