"""How a recipe trains, evaluates and keeps checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sapo.config.section import LOWEST_TEMPERATURE, Section


class StopConfig(Section):
    """End a run before its last step by a figure of its evaluations (`eval.every`), with all that the last step has."""

    metric: str = "pass@1"
    """Figure of an evaluation, by its name in metrics.jsonl; of the first task where there are several."""
    reaches: float | None = Field(None, allow_inf_nan=False)
    """End as soon as the figure is this or more."""
    patience: int | None = Field(None, ge=1)
    """End after as many evaluations in a row that are no better than the best before them."""

    @model_validator(mode="after")
    def _some_rule(self) -> StopConfig:
        if self.reaches is None and self.patience is None:
            raise ValueError("stop_when needs reaches or patience; got neither; {metric: pass@1, reaches: 0.9} has one")
        return self


class TrainConfig(Section):
    """How the policy is updated."""

    steps: int = Field(ge=1)
    """Training steps; each samples one rollout batch and makes `minibatches` updates from it."""
    minibatches: int = Field(4, ge=1, le=10**6)
    """Updates per rollout batch: all but the first are off-policy."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Packed tokens of one forward pass; bounds memory, never changes the result."""
    picture_tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens of pictures of one forward pass; bounds the memory of the vision tower, never changes the result. A prompt
    with more gets a forward pass of its own."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear learning-rate warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine fall towards `min_learning_rate`."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule, reached one step after the last."""
    optimizer: str = "adamw"
    """Optimizer. adamw. adamw_8bit: torchao's AdamW with both moments in 8 bits (extra `optim`). module:Class: a class
    of your own, derived from torch.optim.Optimizer; it is given the float32 master weights, lr, and those of betas, eps
    and weight_decay that its __init__ takes. Before a run, every optimizer but adamw must show on two small parameters
    that it runs on the device and resumes from a checkpoint bit for bit."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments (beta1, beta2)."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, added to the root of the second moment for numerical stability."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this value; null does not clip."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    old_logprobs: Literal["auto", "engine", "trainer"] = "auto"
    """Source of log pi_old, the log-probabilities in the denominator of the ratio r. auto: the engine's, if the
    self-check of the first step finds them equal to the trainer's, else the trainer's. engine: always the engine's.
    trainer: always a forward pass of the trainer at the weights that sampled."""
    self_check_tolerance: float = Field(1e-3, gt=0)
    """Largest |log r| on policy for which the engine's log-probabilities are taken as the trainer's."""
    entropy: bool = True
    """Measure the policy's entropy in each update."""
    ranks: int = Field(1, ge=1, le=65536)
    """Processes that train together, with weights, gradients and optimizer state sharded over them (FSDP2). On one
    machine they are started with the run; torchrun starts them anywhere, and then this may be left out."""
    max_restarts: int = Field(3, ge=0)
    """How often the ranks of a run are started again after one has died, from the newest checkpoint; and how often
    engines with rollout.run_in=process are, with the weights they had. torchrun's ranks are its own to restart."""
    rank_timeout: float = Field(60.0, gt=0)
    """Seconds without a sign of life after which a rank counts as lost: stopped, or on a machine that died. It is ended
    where it can be, and answered as one that died. A rank that does not hear of the driver for so long ends by itself.
    Signs of life are given during long computations too."""
    stall_timeout: float = Field(1800.0, gt=0)
    """Seconds within one call to the ranks in which none makes a pass over a micro-batch, after which all of them count
    as lost although they live. Each writes its stacks to its log first. It must be longer than any single pass."""
    replicas: int = Field(1, ge=1)
    """Groups of ranks that hold all weights each (HSDP): sharded within a group, replicated over the groups."""

    stop_when: StopConfig | None = None
    """End the run early; null makes all steps."""
    context_parallel: int = Field(1, ge=1)
    """Ranks that share each micro-batch: each computes a slice of its tokens, and attention for a share of the heads
    (Ulysses). For sequences too long for one device."""

    @model_validator(mode="after")
    def _context_divides_ranks(self) -> TrainConfig:
        if self.ranks % self.context_parallel and self.ranks > 1:
            raise ValueError(
                f"ranks must be a multiple of context_parallel; got {self.ranks} and {self.context_parallel}; leave "
                "context_parallel out to give each rank micro-batches of its own"
            )
        return self

    @model_validator(mode="after")
    def _replicas_divide_ranks(self) -> TrainConfig:
        if self.ranks % self.replicas:
            raise ValueError(
                f"ranks must be a multiple of replicas; got {self.ranks} and {self.replicas}; leave replicas out to "
                "shard over all ranks"
            )
        return self

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
    problems: int = Field(256, ge=1, le=10**6)
    """Held-out problems per task."""
    samples: int = Field(4, ge=1, le=10**6)
    """Completions of each problem (n of mean@n)."""
    k: list[int] = Field([1])
    """pass@k to report; none above `samples`."""
    temperature: float | None = Field(None, ge=0, le=1e3)
    """Sampling temperature; null takes the rollout's. 0 is greedy, and otherwise it is 0.001 or more."""
    greedy: bool = False
    """Also draw one completion of each problem at temperature 0 (greedy decoding)."""
    constant: bool = False
    """Also score the best constant answer: the accuracy of giving one fixed answer to every problem."""
    seed: int = Field(12345, ge=0, lt=2**63)
    """Random seed of the evaluation's sampling. It is the same at every evaluation, so that curves are paired."""

    @model_validator(mode="after")
    def _temperature_to_divide_by(self) -> EvalConfig:
        if self.temperature is not None and 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 or at least {LOWEST_TEMPERATURE}; got {self.temperature}; 0 is greedy"
            )
        return self

    @model_validator(mode="after")
    def _k_within_samples(self) -> EvalConfig:
        if not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"every k must lie in 1..samples ({self.samples}); got {self.k}")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 writes only the last one."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep. The last one that the early warnings found healthy is kept as well."""
