"""Settings of studies: a sampler that is not the policy, random rewards. Other runs leave them alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sapo.config.section import Section

SamplerDtype = Literal["bfloat16", "float8_e4m3fn", "float8_e5m2"]


class SamplerSwitchConfig(Section):
    """A change of the sampler's precision in mid-run."""

    step: int = Field(ge=1)
    """First step, counted from 1, that samples at the new precision."""
    dtype: SamplerDtype | None
    """Value of `sampler_dtype` from that step on."""


class ExperimentsConfig(Section):
    """Interventions for studies of the method; the defaults change nothing."""

    sampler_dtype: SamplerDtype | None = None
    """Sample from the policy's weights rounded to this dtype, as an engine of that precision would. Only matrices are
    rounded, and the computation stays in model.dtype. The trainer and evaluation keep the policy's own weights. null
    samples from these too."""
    sampler_scaling: Literal["none", "tensor", "channel"] = "tensor"
    """Scaling of 8-bit weights before rounding: by the largest value of each matrix (tensor), by that of each of its
    rows (channel), or not at all (none, a plain cast)."""
    sampler_vectors: bool = False
    """Round norms and biases as well. No engine does; it makes a small model's mismatch large."""
    sampler_switch: SamplerSwitchConfig | None = None
    """Change `sampler_dtype` in mid-run; null does not."""
    rewards: Literal["verifier", "random"] = "verifier"
    """Rewards that advantages are made of. random: a fair coin for each completion, whatever the verifier says. Logs,
    curriculum and evaluation keep the verifier's rewards, so that they show what such training does to the policy."""
    old_logprobs: Literal["current"] | None = None
    """current: compute log pi_old by a forward pass of the trainer at the weights of the batch's first update, in place
    of what train.old_logprobs says. For stale batches (rollout.staleness): r then leaves out the drift since sampling,
    which objective.tis has in its weight w. null leaves train.old_logprobs in force."""

    def sampler_dtype_at(self, step: int) -> str | None:
        """Return `sampler_dtype` of step 0, 1, ..."""
        switch = self.sampler_switch
        return self.sampler_dtype if switch is None or step + 1 < switch.step else switch.dtype

    @property
    def sampler_is_policy(self) -> bool:
        """Return whether all samples are drawn with the policy's own weights."""
        return self.sampler_dtype is None and (self.sampler_switch is None or self.sampler_switch.dtype is None)
