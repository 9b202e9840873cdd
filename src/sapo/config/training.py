"""How a recipe trains, evaluates and keeps checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sapo.config.section import Section


class TrainConfig(Section):
    """How the policy is updated."""

    steps: int = Field(ge=1)
    """Rollout batches."""
    minibatches: int = Field(4, ge=1)
    """Updates per rollout batch: all but the first are off-policy."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Packed tokens of one forward pass; bounds memory, never changes the result."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine fall towards `min_learning_rate`."""
    min_learning_rate: float = Field(0.0, ge=0)
    """What a decaying schedule falls to, reached one step after the last."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    adam_eps: float = Field(1e-8, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; null leaves it."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    old_logprobs: Literal["auto", "engine", "trainer", "current"] = "auto"
    """Where log pi_old comes from: the engine if the self-check of the first step proves it equal to the trainer's
    (auto), always the engine, or always a forward pass of the trainer at the weights that sampled. current, for
    experiments with rollout.staleness: a forward pass of the trainer at the weights of the batch's first update, so
    that the drift since the sampling is in no ratio (with objective.tis it is in w)."""
    self_check_tolerance: float = Field(1e-3, gt=0)
    """Largest |log r| on policy for which the engine's log-probabilities are taken as the trainer's."""
    entropy: bool = True
    """Measure the policy's entropy in each update."""

    @model_validator(mode="after")
    def _minimum_below_peak(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must not exceed learning_rate; got {self.min_learning_rate}, {self.learning_rate}"
            )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate is for the schedules linear and cosine; got {self.min_learning_rate} with constant"
            )
        return self

    @model_validator(mode="after")
    def _betas_in_range(self) -> TrainConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1); got {self.betas}; (0.9, 0.95) is common")
        return self


class EvalConfig(Section):
    """Evaluation on held-out problems during training."""

    every: int = Field(50, ge=0)
    """Steps between evaluations; the first and the last step are always evaluated. 0: only those two."""
    problems: int = Field(256, ge=1)
    """Held-out problems per task."""
    samples: int = Field(4, ge=1)
    """Completions of each problem (n of mean@n)."""
    k: list[int] = Field([1])
    """pass@k to report; none above `samples`."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature; null takes the rollout's."""
    greedy: bool = False
    """Draw one more completion of each problem at temperature 0."""
    constant: bool = False
    """Judge the best constant answer beside the model: what one answer to every problem would get."""
    seed: int = 12345
    """Of the evaluation's draws: the same at every evaluation, so that curves are paired."""

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvalConfig:
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"every k must lie in 1..samples ({self.samples}); got {self.k}")
        return self


class CheckpointConfig(Section):
    """When the run can be taken up again."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 writes only the last one."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep; beside them the last that early warning has found healthy."""
