"""Settings of the policy to start from: an existing model or one made by a cold start, its adapter, its routing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from sapo.config.section import Section


class ColdStartConfig(Section):
    """A tiny model made from scratch by supervised training on worked examples, cached by the hash of this section."""

    tasks: Literal["first", "all"] = "first"
    """Which of the recipe's tasks are taught. all: every one, with examples in the proportion of the weights, and
    `target` is for the pass@1 of each."""
    architecture: Literal[
        "qwen3", "qwen3_moe", "llama", "mistral", "qwen3_5", "qwen3_5_moe", "gpt_oss", "qwen3_vl", "qwen3_vl_moe"
    ] = "qwen3"
    """Decoder of transformers to build. qwen3_5 and qwen3_5_moe are hybrids: three layers of Gated DeltaNet to one of
    attention, and the last one attends. gpt_oss is a mixture whose heads have sinks, and every second layer a window of
    32 tokens. qwen3_vl and qwen3_vl_moe have a vision tower as wide as the decoder, of two blocks on patches of 8
    pixels, which the cold start trains as well."""
    hidden_size: int = Field(64, ge=8, le=65536)
    """Width of the residual stream."""
    layers: int = Field(2, ge=1, le=1000)
    """Decoder blocks."""
    heads: int = Field(4, ge=1, le=1024)
    """Attention heads."""
    kv_heads: int = Field(2, ge=1, le=1024)
    """Key-value heads; divides `heads`."""
    intermediate_size: int = Field(128, ge=8, le=10**6)
    """Width of the MLP, or of one expert."""
    experts: int = Field(8, ge=1, le=4096)
    """Experts of a mixture (qwen3_moe, qwen3_5_moe, gpt_oss, qwen3_vl_moe)."""
    experts_per_token: int = Field(2, ge=1, le=4096)
    """Experts each token goes through (qwen3_moe, qwen3_5_moe, gpt_oss, qwen3_vl_moe)."""
    max_length: int = Field(512, ge=16, le=10**6)
    """Longest sequence of the model."""
    target: float = Field(0.3, ge=0.0, le=1.0)
    """Stop as soon as pass@1 on fresh problems reaches this; 0 trains for `max_updates`."""
    examples: int = Field(2000, ge=1, le=10**7)
    """Worked examples to train on; a small space of problems repeats some."""
    batch_size: int = Field(64, ge=1, le=10**6)
    """Worked examples in each update."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_updates: int = Field(20, ge=0)
    """Updates of linear learning-rate warm-up."""
    max_updates: int = Field(2000, ge=1)
    """Largest number of updates. A cold start that has not reached `target` by then fails, and says how far it came."""
    eval_every: int = Field(5, ge=1)
    """Updates between evaluations. A small number, because pass@1 rises steeply once it starts to rise."""
    eval_problems: int = Field(128, ge=8, le=10**6)
    """Problems of an evaluation, one sample each: those of the training side that follow the examples."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Random seed of the initial weights and of the order of examples. It is not the run's seed: runs of all seeds
    share one cold start."""

    @property
    def is_mixture(self) -> bool:
        """Return whether it is a mixture of experts."""
        return self.architecture.endswith("_moe") or self.architecture == "gpt_oss"

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


class LoraConfig(Section):
    """Train an adapter of low rank beside frozen weights, through peft. A float32 model samples with the adapter folded
    into a copy of its weights, which rounds differently."""

    rank: int = Field(16, ge=1, le=65536)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The update is alpha / rank x B A."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an adapter; all-linear is every linear layer but the output embedding."""
    mixture: Literal["all", "experts", "router", "none"] = "all"
    """Which parts of a mixture all-linear includes beside the layers that every token goes through: its experts, its
    routers, both or neither. Shared experts are always included. Of no effect in a dense model."""

    @model_validator(mode="after")
    def _mixture_of_all_linear(self) -> LoraConfig:
        if self.mixture != "all" and self.targets != "all-linear":
            raise ValueError(
                f"mixture={self.mixture} says what targets=all-linear includes; got {self.targets}; leave one out"
            )
        return self


class VisionConfig(Section):
    """What is trained of the vision part of a vision-language model, and how large its pictures are."""

    load: bool = True
    """Load the vision part at all. false: the text decoder alone, which vLLM takes too; checkpoints then have no
    vision part. Of families that transformers has a text decoder for (Qwen3.5)."""
    train: Literal["none", "merger", "tower"] = "none"
    """Part of the vision tower that is trained beside the decoder. none: nothing; the features of each picture are then
    computed once. merger: what maps its features to the decoder's width. tower: all of it. With model.lora, the part
    that gets adapters."""
    max_tokens_per_picture: int = Field(1024, ge=1)
    """Most tokens of a picture; a larger picture is scaled down."""
    learning_rate_scale: float = Field(1.0, gt=0)
    """Factor of train.learning_rate for what is trained of the vision tower."""

    @model_validator(mode="after")
    def _something_to_train(self) -> VisionConfig:
        if not self.load and self.train != "none":
            raise ValueError(
                f"train={self.train} is of the vision part; got load=false, which leaves it out; set load=true or "
                "train=none"
            )
        return self

    @model_validator(mode="after")
    def _scale_of_something(self) -> VisionConfig:
        if self.learning_rate_scale != 1 and self.train == "none":
            raise ValueError(
                f"learning_rate_scale={self.learning_rate_scale:g} is of what is trained of the vision tower; got "
                "train=none; leave it out, or set train to merger or tower"
            )
        return self


class ModelConfig(Section):
    """The policy to start from: a Hugging Face model, or a cold start."""

    path: str | None = None
    """A local Hugging Face directory, a .gguf file, package:NAME/FILE.gguf, or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    trust_remote_code: bool = False
    """Run code that the model brings along: a directory or a hub repository may have some."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. bfloat16 keeps float32 master weights in the optimizer. Where none is
    named, a run on a GPU takes bfloat16, but for adapters and cold starts."""
    coldstart: ColdStartConfig | None = None
    """Make the model instead of loading one."""
    vision: VisionConfig = VisionConfig()
    """The vision part of a vision-language model; of no account for others."""
    lora: LoraConfig | None = None
    """Train an adapter instead of all weights. Its learning rate should be some 30 times higher."""
    routing_replay: bool | Literal["R2", "R3"] = False
    """Routing replay for mixtures of experts: in all updates of a batch, each token goes to the experts it went to at
    the weights that sampled. R2: recorded by the trainer's forward pass that computes log pi_old. R3: recorded by the
    engine while it samples. true: R3 where log pi_old is the engine's, else R2. false: none."""

    @field_validator("routing_replay", mode="before")
    @classmethod
    def _known_replay(cls, value: Any) -> Any:
        if value not in (False, True, "R2", "R3"):
            raise ValueError(f"routing_replay must be false, true, R2 or R3; got {value!r}")
        return bool(value) if isinstance(value, int) else value

    @model_serializer(mode="wrap")
    def _without_unnamed_precision(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a precision that nobody has named: written down, it would count as named when it is read again."""
        settings: dict[str, Any] = write(self)
        if "dtype" not in self.model_fields_set:
            settings.pop("dtype", None)
        return settings

    @property
    def load_options(self) -> dict[str, Any]:
        """Return what `load_policy` takes beside path, dtype and device."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "max_tokens_per_picture": self.vision.max_tokens_per_picture,
            "text_only": not self.vision.load,
        }

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.coldstart is None):
            got = "both" if self.path is not None else "neither"
            raise ValueError(
                f"give model.path or model.coldstart, exactly one of them; got {got}; set the other to null"
            )
        if self.routing_replay and self.coldstart is not None and not self.coldstart.is_mixture:
            raise ValueError(
                "routing_replay is for mixtures of experts; got a cold start of architecture "
                f"{self.coldstart.architecture}; qwen3_moe, qwen3_5_moe, gpt_oss and qwen3_vl_moe are, and false "
                "leaves replay off"
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
