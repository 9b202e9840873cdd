"""The recipe: every setting of a run, documented once, checked before anything is loaded.

How a recipe is found, read and overridden is recipe.py. Settings of an objective or a task are checked by the
objective or task itself, which refuses those it does not use.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sapo.diagnostics_config import DiagnosticsConfig, WarningsConfig
from sapo.objectives import NORMALIZERS, OBJECTIVES, TIS, make_objective


class ConfigError(ValueError):
    """A recipe that cannot be run as it is; the message names the key, the rule and the way out."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ColdStartConfig(_Section):
    """A tiny model made from scratch by supervised training on worked examples, cached by the hash of this section."""

    architecture: Literal["qwen3", "qwen3_moe", "llama", "mistral"] = "qwen3"
    """Decoder of transformers to build."""
    hidden_size: int = Field(64, ge=8)
    """Width of the residual stream."""
    layers: int = Field(2, ge=1)
    """Decoder blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int = Field(2, ge=1)
    """Key-value heads; divides `heads`."""
    intermediate_size: int = Field(128, ge=8)
    """Width of the MLP, or of one expert."""
    experts: int = Field(8, ge=1)
    """Experts of a mixture (qwen3_moe)."""
    experts_per_token: int = Field(2, ge=1)
    """Experts each token goes through (qwen3_moe)."""
    max_length: int = Field(512, ge=16)
    """Longest sequence of the model."""
    target: float = Field(0.3, ge=0.0, le=1.0)
    """Stop as soon as pass@1 on fresh problems reaches this; 0 trains for `max_updates`."""
    examples: int = Field(2000, ge=1)
    """Worked examples to train on; a small space of problems repeats some."""
    batch_size: int = Field(64, ge=1)
    """Examples per update."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_updates: int = Field(20, ge=0)
    """Linear warm-up."""
    max_updates: int = Field(2000, ge=1)
    """Give up here: a run that has not reached the target by then fails and says so."""
    eval_every: int = Field(5, ge=1)
    """Updates between evaluations; pass@1 jumps steeply, so few."""
    eval_problems: int = Field(128, ge=8)
    """Problems of an evaluation, one sample each: the training side's next ones after the examples."""
    seed: int = 0
    """Of the initial weights and the order of examples. Not the run's seed: runs of all seeds share a cold start."""

    @model_validator(mode="after")
    def _shape(self) -> ColdStartConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size must be an even multiple of heads; got {self.hidden_size} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must not exceed experts; got {self.experts_per_token} of {self.experts}"
            )
        return self


class LoraConfig(_Section):
    """Train an adapter of low rank beside frozen weights, through peft."""

    rank: int = Field(16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The update is alpha / rank x B A."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get one; all-linear is every linear layer but the output embedding."""


class ModelConfig(_Section):
    """The policy to start from: a Hugging Face model, or a cold start."""

    path: str | None = None
    """A local Hugging Face directory, a .gguf file, package:NAME/FILE.gguf, or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    trust_remote_code: bool = False
    """Run code that the model brings along: a directory or a hub repository may have some."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. bfloat16 keeps float32 master weights in the optimiser."""
    coldstart: ColdStartConfig | None = None
    """Make the model instead of loading one."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights; learning rates want to be some 30 times higher."""
    routing_replay: bool | Literal["R2", "R3"] = False
    """Of a mixture of experts: in all updates of a batch, send each token to the experts that it went to at the weights
    that sampled. R2: in the trainer's forward that computes log pi_old, which the run then makes. R3: in the engine.
    true: R3 where log pi_old is the engine's, R2 where the trainer computes it."""

    @field_validator("routing_replay", mode="before")
    @classmethod
    def _known_replay(cls, value: Any) -> Any:
        if value not in (False, True, "R2", "R3"):
            raise ValueError(f"routing_replay must be false, true, R2 or R3; got {value!r}")
        return bool(value) if isinstance(value, int) else value

    @property
    def load_options(self) -> dict[str, Any]:
        """What `load_policy` takes beside path, dtype and device."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.coldstart is None):
            got = "both" if self.path is not None else "neither"
            raise ValueError(
                f"give model.path or model.coldstart, exactly one of them; got {got}; null takes one of a recipe away"
            )
        if self.routing_replay and self.coldstart is not None and self.coldstart.architecture != "qwen3_moe":
            raise ValueError(
                "routing_replay is for mixtures of experts; got a cold start of architecture "
                f"{self.coldstart.architecture}; qwen3_moe is one, and false leaves replay off"
            )
        is_file = self.path is not None and (self.path.startswith("package:") or self.path.endswith(".gguf"))
        if is_file or self.coldstart is not None:
            got = "a cold start" if self.path is None else self.path
            if self.revision is not None:
                raise ValueError(f"revision is for hub repositories; got {self.revision!r} with {got}; leave it out")
            if self.trust_remote_code:
                raise ValueError(
                    f"trust_remote_code is for models of directories and hub repositories; got true with {got}; "
                    "leave it out"
                )
        return self


class KLConfig(_Section):
    """A penalty for leaving a reference policy; the paper has none."""

    coefficient: float = Field(gt=0)
    """How much of the estimate is added to the loss, with the normaliser of the policy term."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """See objectives/kl.py; k3 is GRPO's."""
    reference: str | None = None
    """Model to stay close to; null is the one the run starts from: with LoRA the adapter switched off, else a frozen
    copy."""


class TISConfig(_Section):
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
            raise ValueError(_unknown("normalizer", self.normalizer, NORMALIZERS))
        return self


class ShotConfig(_Section):
    """A worked example shown before the question."""

    prompt: str
    """The example's question, as the task would ask it."""
    answer: str
    """What a good completion of it says."""


class PromptConfig(_Section):
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
    stop: list[str] = []
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


class CurriculumConfig(_Section):
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


SamplerDtype = Literal["bfloat16", "float8_e4m3fn", "float8_e5m2"]


class SamplerSwitchConfig(_Section):
    """Another precision of the sampler from some step on: an intervention, for experiments."""

    step: int = Field(ge=1)
    """The first step, counted from 1, that samples with it."""
    dtype: SamplerDtype | None
    """What `sampler_dtype` is from then on."""


class RolloutConfig(_Section):
    """How completions are drawn."""

    engine: Literal["local"] = "local"
    """The engine: `local` samples with the trainer's own weights."""
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
    stop_token_ids: list[int] = []
    """Stop tokens beside the model's own end of sequence."""
    zero_variance: Literal["keep", "drop", "refill"] = "keep"
    """Groups that teach nothing, all rewards being equal. keep: they cost no update and stay in the denominators. drop:
    they leave the batch and its denominators (DAPO's filter). refill: their places are taken by groups of further
    prompts of the same task (DAPO's dynamic sampling), so that the batch has its full size and exact mixture."""
    max_refills: int | None = Field(None, ge=1)
    """For refill: further rounds of sampling in a step, each of as many prompts as places are free; 4 when null. When
    they are spent, groups that teach nothing take the places that are left."""
    overlong: Literal["zero", "mask", "penalty"] = "zero"
    """Completions that reach max_new_tokens. zero: they are judged as truncated, nothing more. mask: they carry no loss
    and leave the denominators; the group's mean and deviation keep their rewards (DAPO's overlong filtering). penalty:
    the reward that advantages are made of falls over the last `overlong_buffer` tokens, to 1 less at the limit (DAPO's
    soft overlong punishment)."""
    overlong_buffer: int | None = Field(None, ge=1)
    """For penalty: over how many tokens before max_new_tokens it grows from 0 to 1."""
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


class TrainConfig(_Section):
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
    old_logprobs: Literal["auto", "engine", "trainer"] = "auto"
    """Where log pi_old comes from: the engine if the self-check of the first step proves it equal to the trainer's
    (auto), always the engine, or always a forward pass of the trainer at the weights that sampled."""
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


class EvalConfig(_Section):
    """Evaluation on held-out problems during training."""

    every: int = Field(50, ge=0)
    """Steps between evaluations; the first and the last step are always evaluated. 0: only those two."""
    problems: int = Field(256, ge=1)
    """Held-out problems per task."""
    samples: int = Field(4, ge=1)
    """Completions of each problem (n of mean@n)."""
    k: list[int] = [1]
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


class CheckpointConfig(_Section):
    """When the run can be taken up again."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 writes only the last one."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep; beside them the last that early warning has found healthy."""


class WandbConfig(_Section):
    """A run of Weights & Biases (extra `wandb`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null."""
    entity: str | None = None
    """User or team; the one logged in when null."""
    group: str | None = None
    """Runs shown together, several seeds for instance."""
    tags: list[str] = []
    """Labels of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes wandb/ in the run directory, for `wandb sync` later; null takes WANDB_MODE, else online."""


class TrackioConfig(_Section):
    """A run of trackio (extra `trackio`)."""

    project: str = "sapo"
    """The project it belongs to."""
    name: str | None = None
    """What the run is called; the run directory's name when null. An id is added, since trackio knows runs by name."""
    space_id: str | None = None
    """A Space of the hub to log to; null keeps everything on this machine, in $TRACKIO_DIR."""


class LogConfig(_Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write tensorboard/."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well; null does not."""
    trackio: TrackioConfig | None = None
    """Log to trackio as well; null does not."""
    rollouts_every: int = Field(10, ge=0)
    """Steps between files in rollouts/; 0 writes none."""


class ProfileConfig(_Section):
    """Where the time goes: parts of phases timed, some steps traced operator by operator."""

    first_step: int = Field(2, ge=1)
    """The first step traced, 1-based; the run's first one also pays for what is done once."""
    steps: int = Field(1, ge=0)
    """Steps traced; a traced step is slower, and its file grows with the tokens it generates. 0 only times."""


class RunConfig(_Section):
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
    def _tis_has_both(self) -> RunConfig:
        if self.objective.tis is not None and self.train.old_logprobs == "engine":
            raise ValueError(
                "objective.tis weighs a token by pi_old / mu, so log pi_old must be the trainer's; got "
                "train.old_logprobs=engine, which takes mu for pi_old; leave it at auto, or set trainer"
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


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """What an error says after an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    dot = prefix + "." if prefix else ""
    if close:
        return f"; did you mean {dot}{close[0]}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _unknown(what: str, name: str, known: Any) -> str:
    return f"unknown {what} {name!r}{nearest(name, list(known))}"
