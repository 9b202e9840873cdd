"""How completions are sampled, and what becomes of their groups."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.section import LOWEST_TEMPERATURE, Section


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
    lora_sync: Literal["merged", "adapter"] = "merged"
    """How an adapter (`model.lora`) reaches vLLM. merged: folded into the weights, all of which are sent after each
    batch; vLLM then decodes as fast as without an adapter. adapter: the model's weights are sent once and the adapter
    alone after each batch; vLLM multiplies by it at every token. Not for `rollout.servers`."""


class TurnsConfig(Section):
    """Limits of the episodes of environments: tasks in which the model takes several turns. Of no effect for others.

    `rollout.max_new_tokens` is the most that the model draws in a whole episode."""

    max: int = Field(8, ge=1, le=10**4)
    """Most turns of the model in an episode."""
    tokens_per_turn: int | None = Field(None, ge=1)
    """Most tokens that the model draws in one turn; null: those that are left of the episode's."""
    length: int | None = Field(None, ge=2)
    """Longest episode in tokens: its prompt, what the model drew and what the environment said; null: the positions of
    the model."""
    seconds_per_reply: float = Field(30.0, gt=0)
    """Seconds in which an environment must answer a turn. The time in which the model draws does not count."""
    play_in: Literal["process", "driver"] = "process"
    """Where environments of your own (`module:Class`, tools and adapters of your own code) play. process: each episode
    in a process of its own, so that one that blocks, crashes or fills its memory costs that episode alone. driver: in
    the process that draws, beside the others. Environments of sapo, and those given as Python objects, always play
    there."""
    env: list[str] = Field([])
    """Names of environment variables, as [OPENAI_API_KEY], that the processes of play_in=process are given beside the
    ordinary ones (docs/environments.md). They have no others, so that secrets of the run stay with it."""
    credit: Literal["turn", "episode"] = "turn"
    """What the advantage of a turn is made of where an environment gives a reward for each (`Score.turn_rewards`).
    turn: of what was earned from it on, against the baseline of whole episodes; for objectives that take an advantage
    for each token. episode: of the whole episode, as everywhere else."""
    max_environment_errors: float = Field(0.05, ge=0, le=1)
    """Largest share of a step's episodes in which the environment may fail. A run with more of them stops. Failed
    episodes are not trained on."""

    @field_validator("env")
    @classmethod
    def _names_of_variables(cls, names: list[str]) -> list[str]:
        for name in names:
            if not name or "=" in name or "\0" in name:
                raise ValueError(
                    f"turns.env must hold names of environment variables; got {name!r}; [OPENAI_API_KEY] is one, and "
                    "its value is taken from the environment"
                )
        return names


class RolloutConfig(Section):
    """How completions are drawn."""

    engine: str = "local"
    """What draws completions: `local`, which samples with the trainer's own weights; `vllm`, which is vLLM in the same
    process (extra `vllm`, or its CPU build); or `module:Class`, an engine of your own (rollout/engine.py has the
    protocol)."""
    vllm: VllmConfig | None = None
    """Settings of the engine `vllm`; null takes their defaults."""
    servers: int | list[str] | None = None
    """For the engine `vllm`: draw with vLLM servers in place of vLLM in this process. A number: so many are started on
    this machine, on a GPU each where there are GPUs, and end with the run. A list: addresses of servers that run
    already, as [http://127.0.0.1:8000]; docs/engines.md says how they are started. null: none."""
    server_timeout: float = Field(600.0, gt=0)
    """Most seconds that a server may take for one completion. One that takes longer is taken for dead, and others draw
    its completions."""
    run_in: Literal["driver", "thread", "process"] = "driver"
    """Where the engine of a training run draws. driver: in the process that trains, which waits for it. thread: in a
    thread beside the updates, from a copy of the weights. process: in a child process, likewise from a copy; one that
    dies is started again (`train.max_restarts`). With `staleness` of 1 or more, thread and process draw a batch while
    earlier updates are made. The run is the same, bit for bit, in all three."""
    schedule: Literal["fixed", "free"] = "fixed"
    """Which weights draw which batch. fixed: `staleness` says, and the run depends on its recipe and seed alone. free:
    completions are drawn all the time beside the updates (`run_in` thread or process), from the newest weights there
    are when the engine begins them; a step takes up the first groups that are done. Two runs are not equal then."""
    max_staleness: int | None = Field(None, ge=1)
    """For schedule=free: a group is trained on while its oldest token is at most so many updates older than the step's
    first update; one that is older is drawn again. null: the updates of one step (`train.minibatches`)."""
    timeout: float = Field(1800.0, gt=0)
    """For run_in=process: seconds that the engine may take to draw completions for one round of prompts. One that takes
    longer is ended, and started again as one that died."""
    parity_every: int | None = Field(None, ge=0)
    """Batches between two checks that an engine which copies the weights has the policy's: its log-probabilities are
    held against the trainer's, and a run whose engine differs stops. The first batches are always checked. null: 10 for
    such an engine (`vllm`), and none for `local`, which has no copy. 0: none."""
    parity_tolerance: float | None = Field(None, gt=0)
    """Largest difference that the check allows. In float32 it is the largest |log r| of a token, and null is 0.001. In
    16 bits it is the mean |r - 1|, since single tokens differ by rounding, and null is 0.1."""
    prompts_per_step: int = Field(32, ge=1, le=10**6)
    """Prompts of one rollout batch."""
    samples_per_prompt: int = Field(8, ge=2, le=10**6)
    """Completions of each prompt (G). They form the group that advantages are relative to."""
    max_new_tokens: int = Field(64, ge=1, le=10**7)
    """Longest completion, in tokens. A longer one is truncated: its reward is 0 unless the task judges it."""
    temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=1e3)
    """Temperature of sampling. The policy in the loss has the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: keep the most likely tokens whose probabilities sum to this. Where top_p, top_k or min_p cut a
    tail, the trainer recomputes log pi_old, because the sampler's is of another distribution."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this fraction of the most likely one; 0 keeps all."""
    max_rows: int = Field(256, ge=1, le=10**6)
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
    turns: TurnsConfig = TurnsConfig()
    """Limits of episodes of several turns."""
    staleness: int = Field(0, ge=0)
    """Number of updates between the sampling of a batch and its first update, as in an asynchronous system. Batches are
    sampled ahead; the first batches of a run are younger. log pi_old is of the weights that sampled. With `run_in`
    thread or process the system is asynchronous, and the run the same."""

    @property
    def overlaps(self) -> bool:
        """Return whether batches are drawn while updates are made."""
        return self.schedule == "free" or (self.run_in != "driver" and self.staleness > 0)

    @property
    def overlap_keys(self) -> str:
        """Name the settings by which batches are drawn while updates are made."""
        if self.schedule == "free":
            return "rollout.schedule=free"
        return f"rollout.run_in={self.run_in} with rollout.staleness={self.staleness}"

    @property
    def cuts_tails(self) -> bool:
        """Return whether sampling leaves out unlikely tokens."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

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
    def _servers_of_the_engine(self) -> RolloutConfig:
        if self.servers is None:
            return self
        if self.engine != "vllm":
            raise ValueError(f"rollout.servers is for rollout.engine=vllm; got engine {self.engine}; leave it out")
        if self.servers == [] or (isinstance(self.servers, int) and self.servers < 1):
            raise ValueError(
                f"rollout.servers must be a number from 1, or a list of addresses; got {self.servers}; null has vLLM "
                "in this process"
            )
        if self.run_in == "process":
            raise ValueError(
                f"servers are processes of their own; got rollout.servers={self.servers} with rollout.run_in=process; "
                "use run_in=thread to draw beside the updates"
            )
        if self.vllm is not None and self.vllm.lora_sync == "adapter":
            raise ValueError(
                "servers take an adapter folded into the weights; got rollout.vllm.lora_sync=adapter with "
                f"rollout.servers={self.servers}; leave lora_sync out, or servers"
            )
        return self

    @model_validator(mode="after")
    def _vllm_in_the_main_thread(self) -> RolloutConfig:
        if self.run_in == "thread" and self.engine == "vllm" and self.servers is None:
            raise ValueError(
                "rollout.engine=vllm draws in the main thread of a process; got run_in=thread; use run_in=process"
            )
        return self

    @model_validator(mode="after")
    def _free_schedule(self) -> RolloutConfig:
        """Refuse what the free schedule cannot have, and what only it can."""
        if self.schedule == "fixed":
            if self.max_staleness is not None:
                raise ValueError(
                    f"max_staleness is for schedule=free; got {self.max_staleness} with fixed, which takes staleness; "
                    "leave it out"
                )
            return self
        if self.run_in == "driver":
            raise ValueError(
                "schedule=free draws beside the updates; got run_in=driver, which waits for every batch; use "
                "run_in=thread or process"
            )
        if self.staleness:
            raise ValueError(
                f"staleness is the age of batches of schedule=fixed; got {self.staleness} with free; use max_staleness"
            )
        if self.zero_variance == "refill":
            raise ValueError(
                "zero_variance=refill draws in rounds for one batch, and schedule=free has no batch until a step takes "
                "it up; use keep or drop, or schedule=fixed"
            )
        return self

    @model_validator(mode="after")
    def _turns_within_episodes(self) -> RolloutConfig:
        per_turn = self.turns.tokens_per_turn
        if per_turn is not None and per_turn > self.max_new_tokens:
            raise ValueError(
                f"turns.tokens_per_turn must not exceed rollout.max_new_tokens, the tokens of a whole episode; got "
                f"{per_turn} and {self.max_new_tokens}; lower it, or leave it out"
            )
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
