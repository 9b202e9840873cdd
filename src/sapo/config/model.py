"""Settings of the policy to start from: an existing model or one made by a cold start, its adapter, its routing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.section import Section


class ColdStartConfig(Section):
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
    """Worked examples in each update."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_updates: int = Field(20, ge=0)
    """Updates of linear learning-rate warm-up."""
    max_updates: int = Field(2000, ge=1)
    """Largest number of updates. A cold start that has not reached `target` by then fails, and says how far it came."""
    eval_every: int = Field(5, ge=1)
    """Updates between evaluations. A small number, because pass@1 rises steeply once it starts to rise."""
    eval_problems: int = Field(128, ge=8)
    """Problems of an evaluation, one sample each: those of the training side that follow the examples."""
    seed: int = 0
    """Random seed of the initial weights and of the order of examples. It is not the run's seed: runs of all seeds
    share one cold start."""

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

    rank: int = Field(16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(32.0, gt=0)
    """The update is alpha / rank x B A."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an adapter; all-linear is every linear layer but the output embedding."""


class ModelConfig(Section):
    """The policy to start from: a Hugging Face model, or a cold start."""

    path: str | None = None
    """A local Hugging Face directory, a .gguf file, package:NAME/FILE.gguf, or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    trust_remote_code: bool = False
    """Run code that the model brings along: a directory or a hub repository may have some."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. bfloat16 keeps float32 master weights in the optimizer."""
    coldstart: ColdStartConfig | None = None
    """Make the model instead of loading one."""
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

    @property
    def load_options(self) -> dict[str, Any]:
        """Return what `load_policy` takes beside path, dtype and device."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.coldstart is None):
            got = "both" if self.path is not None else "neither"
            raise ValueError(
                f"give model.path or model.coldstart, exactly one of them; got {got}; set the other to null"
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
