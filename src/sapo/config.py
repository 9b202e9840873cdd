"""The recipe: every setting of a run, documented once, checked before anything is loaded.

Sections of the model, the rollout and the diagnostics are in files of their own (model_config.py, rollout_config.py,
diagnostics_config.py); all are imported from here. How a recipe is found, read and overridden is recipe.py. Settings of
an objective or a task are checked by the objective or task itself, which refuses those it does not use.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sapo.config_section import Section
from sapo.diagnostics_config import DiagnosticsConfig, WarningsConfig
from sapo.errors import ConfigError
from sapo.model_config import ColdStartConfig, LoraConfig, ModelConfig
from sapo.objectives import NORMALIZERS, OBJECTIVES, TIS, KLPenalty, make_objective
from sapo.rollout_config import RolloutConfig, SamplerDtype, SamplerSwitchConfig
from sapo.utils.names import nearest

__all__ = [
    "CheckpointConfig",
    "ColdStartConfig",
    "ConfigError",
    "CurriculumConfig",
    "DiagnosticsConfig",
    "EvalConfig",
    "KLConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProfileConfig",
    "PromptConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerDtype",
    "SamplerSwitchConfig",
    "ShotConfig",
    "TISConfig",
    "TaskConfig",
    "TrackioConfig",
    "TrainConfig",
    "WandbConfig",
    "WarningsConfig",
]


class KLConfig(Section):
    """A penalty for leaving a reference policy; the paper has none."""

    coefficient: float = Field(gt=0)
    """How much of the estimate is added to the loss, with the normaliser of the policy term."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """See objectives/kl.py; k3 is GRPO's."""
    reference: str | None = None
    """Model to stay close to; null is the one the run starts from: with LoRA the adapter switched off, else a frozen
    copy."""

    @property
    def penalty(self) -> KLPenalty:
        """What the trainer takes."""
        return KLPenalty(coefficient=self.coefficient, estimator=self.estimator)


class TISConfig(Section):
    """A weight on each token for a sampler that is not the policy: w = pi_old / mu, apart from the gate's ratio. It
    needs log pi_old from the trainer, and train.old_logprobs=auto takes it from there."""

    mode: Literal["token", "sequence", "icepop", "sequence_mask"] = "token"
    """token: min(w, cap). sequence: min(prod w, cap) for every token of a response. icepop: w within floor..cap, else
    0. sequence_mask: prod w, or 0 where it exceeds cap. See objectives/mismatch.py."""
    cap: float | None = None
    """Largest weight; null is 2 for token and sequence, 5 for icepop, 3 for sequence_mask."""
    floor: float | None = None
    """Smallest weight of icepop; 0.5 when null."""

    @property
    def weights(self) -> TIS:
        """What the trainer takes."""
        return TIS(mode=self.mode, cap=self.cap, floor=self.floor)

    @model_validator(mode="after")
    def _in_range(self) -> TISConfig:
        _ = self.weights
        return self


class ObjectiveConfig(BaseModel):
    """What is maximised. Hyperparameters beside these are the objective's own, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str = "sapo"
    """One of sapo.objectives.OBJECTIVES."""
    normalizer: str = "sequence_mean"
    """sequence_mean (the paper), token_mean (DAPO), constant_length (Dr.GRPO), sequence_sum (MiniRL); left out, that of
    the objective's source."""
    advantage: Literal["group_std", "group_mean", "leave_one_out"] = "group_std"
    """(R - mean) / std over the group, R - mean, or R - mean of the others; left out, that of the source as well."""

    kl: KLConfig | None = None
    """Penalty for leaving a reference policy; null for none."""
    tis: TISConfig | None = None
    """Correction for a sampler that is not the policy (truncated importance sampling); null for none."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's own settings, as `make_objective` takes them."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _as_its_source_has_it(cls, raw: Any) -> Any:
        """`name: dapo` alone is DAPO, its normalizer too; what is written down stands."""
        source = OBJECTIVES.get(str(raw.get("name", "sapo"))) if isinstance(raw, dict) else None
        return raw if source is None else {"normalizer": source.normalizer, "advantage": source.advantage, **raw}

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        make_objective(self.name, **self.hyperparameters)
        if self.normalizer not in NORMALIZERS:
            raise ValueError(f"unknown normalizer {self.normalizer!r}{nearest(self.normalizer, NORMALIZERS)}")
        return self


class ShotConfig(Section):
    """A worked example shown before the question."""

    prompt: str
    """The example's question, as the task would ask it."""
    answer: str
    """What a good completion of it says."""


class PromptConfig(Section):
    """How a task's question becomes what the model sees, and where a completion ends."""

    style: Literal["auto", "plain", "chat"] = "auto"
    """chat goes through the tokenizer's chat template, plain does not; auto takes chat for rows of messages, and for
    tasks written for chat models (the benchmarks) where the tokenizer has a template."""
    system: str | None = None
    """System message of a chat, unless the row brings one; the first paragraph of a plain prompt."""
    thinking: bool | None = None
    """Switch of the chat template (enable_thinking); null leaves it to the template."""
    template: str = "{prompt}"
    """The question's own wording, as in "Q: {prompt}\\nA:"."""
    answer_template: str = " {answer}\n"
    """How the answer of an example follows it in a plain prompt; in a chat it is the assistant's turn."""
    shots: int | list[ShotConfig] = 0
    """Examples before the question: written here, or a number of them, which the task then chooses from its training
    side."""
    stop: list[str] = Field([])
    """Strings that end a completion; every token that completes one stops, is kept and carries loss."""

    @model_validator(mode="after")
    def _holds_its_places(self) -> PromptConfig:
        for name, place in (("template", "{prompt}"), ("answer_template", "{answer}")):
            if place not in getattr(self, name):
                raise ValueError(f"{name} must hold {place}; got {getattr(self, name)!r}")
        if isinstance(self.shots, int) and self.shots < 0:
            raise ValueError(f"shots must be 0 or more, or a list of examples; got {self.shots}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty; got ''")
        return self


class CurriculumConfig(Section):
    """Rows that are too easy or too hard are asked less often. For tasks with a finite number of rows."""

    low: float = Field(0.1, ge=0, le=1)
    """Rows with a pass rate below this are asked less."""
    high: float = Field(0.9, ge=0, le=1)
    """Rows with a pass rate above this are asked less."""
    outside: float = Field(0.25, gt=0, le=1)
    """Chance that such a row is asked when its turn comes; it is never 0, so that a row can come back."""
    memory: float = Field(0.5, ge=0, lt=1)
    """Weight of the earlier pass rate of a row when it is asked again; 0 keeps the last visit alone."""

    @model_validator(mode="after")
    def _band(self) -> CurriculumConfig:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high; got {self.low} and {self.high}; 0.1 and 0.9 are the defaults")
        return self


class TaskConfig(BaseModel):
    """Where prompts come from and how answers are scored. Further settings are the task's own, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    name: str
    """One of sapo.tasks.TASKS."""
    label: str | None = None
    """What logs call it; the task's own name when null. Two tasks of one kind may need it."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Share of the prompts of each step, relative to the other tasks."""
    prompt: PromptConfig | None = None
    """How this task's questions are put; the recipe's `prompt` when null."""
    curriculum: CurriculumConfig | None = None
    """Which of this task's rows are asked less; the recipe's `curriculum` when null."""

    @property
    def options(self) -> dict[str, Any]:
        """The task's own settings."""
        options = dict(self.model_extra or {})
        return options if self.label is None else {**options, "name": self.label}


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


class WandbConfig(Section):
    """A run of Weights & Biases (extra `wandb`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null."""
    entity: str | None = None
    """User or team; the one logged in when null."""
    group: str | None = None
    """Runs shown together, several seeds for instance."""
    tags: list[str] = Field([])
    """Labels of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes wandb/ in the run directory, for `wandb sync` later; null takes WANDB_MODE, else online."""


class TrackioConfig(Section):
    """A run of trackio (extra `trackio`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null. An id is added, since trackio knows runs by name."""
    space_id: str | None = None
    """A Space of the hub to log to; null keeps everything on this machine, in $TRACKIO_DIR."""


class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well; null does not."""
    trackio: TrackioConfig | None = None
    """Log to trackio as well; null does not."""
    rollouts_every: int = Field(10, ge=0)
    """Steps between files in rollouts/; 0 writes none."""


class ProfileConfig(Section):
    """Where the time goes: parts of phases timed, some steps traced operator by operator."""

    first_step: int = Field(2, ge=1)
    """The first step traced, 1-based; the run's first one also pays for what is done once."""
    steps: int = Field(1, ge=0)
    """Steps traced; a traced step is slower, and its file grows with the tokens it generates. 0 only times."""


class RunConfig(Section):
    """A whole recipe."""

    run_dir: str | None = None
    """Where the run is written; runs/<recipe name> by default."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the order of prompts and of sampling."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; recorded in the run, since another count is another rounding. null takes what the machine has."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    prompt: PromptConfig = PromptConfig()
    tasks: list[TaskConfig] = Field(min_length=1)
    curriculum: CurriculumConfig | None = None
    """Of all tasks; null asks every row equally often."""
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig | None = None
    """`true` times the parts of each phase and writes a Chrome trace of a step to profile/; null and `false` do not."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    warnings: WarningsConfig = WarningsConfig()
    provenance: dict[str, Any] | None = None
    """Written by the run (versions, commit, machine), never read by it."""

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_on_or_off(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _log_pi_old_fits(self) -> RunConfig:
        source = self.train.old_logprobs
        if self.objective.tis is not None and source == "engine":
            raise ValueError(
                "objective.tis weighs a token by pi_old / mu, so log pi_old must be the trainer's; got "
                "train.old_logprobs=engine, which takes mu for pi_old; leave it at auto, or set trainer"
            )
        if source == "current" and not self.rollout.staleness:
            raise ValueError(
                "train.old_logprobs=current is for batches older than their first update; got rollout.staleness=0, "
                "where the current weights are those that sampled; use train.old_logprobs=trainer"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> RunConfig:
        prompts, minibatches = self.rollout.prompts_per_step, self.train.minibatches
        if prompts % minibatches:
            raise ValueError(
                f"rollout.prompts_per_step must be a multiple of train.minibatches; got {prompts} and {minibatches}; "
                f"use {-(-prompts // minibatches) * minibatches} prompts"
            )
        return self

    @model_validator(mode="after")
    def _recorder_of_the_replay(self) -> RunConfig:
        if self.model.routing_replay == "R2":
            if self.train.old_logprobs == "engine":
                raise ValueError(
                    "model.routing_replay=R2 records in the trainer's forward that computes log pi_old; got "
                    "train.old_logprobs=engine, which makes none; use train.old_logprobs=trainer or routing_replay=R3"
                )
            if self.train.old_logprobs == "auto":
                self.train = self.train.model_copy(update={"old_logprobs": "trainer"})
        return self

    def batch_sentence(self) -> str:
        """The words for batch sizes, a known source of confusion, in one sentence."""
        r, t = self.rollout, self.train
        sequences = r.prompts_per_step * r.samples_per_prompt
        ending = {
            "keep": "",
            "drop": " Groups that teach nothing leave the batch, so updates may be smaller.",
            "refill": " Groups that teach nothing give their places to further prompts, in up to"
            f" {r.refill_rounds} more round{'s' * (r.refill_rounds > 1)} of sampling.",
        }[r.zero_variance]
        return (
            f"Each step draws {r.samples_per_prompt} completions of {r.prompts_per_step} prompts"
            f" ({sequences} sequences) and makes {t.minibatches} update{'s' * (t.minibatches > 1)} of"
            f" {r.prompts_per_step // t.minibatches} prompts ({sequences // t.minibatches} sequences) each;"
            f" {t.steps} steps make {t.steps * t.minibatches} updates.{ending}"
        )
