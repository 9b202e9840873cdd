"""The whole recipe, `RunConfig`, and the checks that concern more than one of its sections.

Each section is in a file beside this one; recipes.py finds, reads and overrides recipes. Keys that moved to the section
`experiments` are refused by their new names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.cluster import ClusterConfig
from sapo.config.diagnostics import DiagnosticsConfig, WarningsConfig
from sapo.config.experiments import ExperimentsConfig
from sapo.config.logging import LogConfig, ProfileConfig
from sapo.config.model import ModelConfig
from sapo.config.objective import ObjectiveConfig
from sapo.config.rollout import RolloutConfig
from sapo.config.section import Section
from sapo.config.tasks import CurriculumConfig, PromptConfig, TaskConfig
from sapo.config.training import CheckpointConfig, EvalConfig, TrainConfig


class RunConfig(Section):
    """A whole recipe."""

    run_dir: str | None = None
    """Directory the run is written to; runs/<recipe name> by default."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Random seed of the order of prompts and of sampling."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Number of CPU threads; null takes what the machine has. The run records it, because results are equal bit for bit
    only with the same number."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N."""
    model: ModelConfig
    """The model that is trained."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The objective and its regularisation."""
    prompt: PromptConfig = PromptConfig()
    """Format of the prompts of all tasks."""
    tasks: list[TaskConfig] = Field(min_length=1)
    """Sources of prompts, with the verifiers that score completions."""
    curriculum: CurriculumConfig | None = None
    """Curriculum of all tasks; null samples every row equally often."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of completions."""
    train: TrainConfig
    """Updates of the policy."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the processes of the run are."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out problems during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and kept."""
    log: LogConfig = LogConfig()
    """Loggers beside metrics.jsonl."""
    profile: ProfileConfig | None = None
    """`true` times the parts of each phase and writes a Chrome trace of a step to profile/; null and `false` do not."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    """Which diagnostics are measured, and how often."""
    warnings: WarningsConfig = WarningsConfig()
    """Early warnings, and the response to a collapse."""
    experiments: ExperimentsConfig = ExperimentsConfig()
    """Interventions for studies of the method."""
    provenance: dict[str, Any] | None = None
    """Written by the run (versions, commit, machine), never read by it."""

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_on_or_off(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _keys_that_moved(cls, raw: Any) -> Any:
        """Refuse keys that moved to `experiments`, naming the new key; drop those that have their defaults."""
        return without_moved_keys(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="before")
    @classmethod
    def _cluster_says_where(cls, raw: Any) -> Any:
        """Take `cluster.trainers` for `train.ranks`, and `cluster.engines` for engines in processes of their own."""
        return with_engines_in_processes(with_trainers_as_ranks(raw)) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _log_pi_old_fits(self) -> RunConfig:
        source = self.train.old_logprobs
        if self.objective.tis is not None and source == "engine":
            raise ValueError(
                "objective.tis weighs a token by pi_old / mu, so log pi_old must be the trainer's; got "
                "train.old_logprobs=engine, which takes mu for pi_old; leave it at auto, or set trainer"
            )
        may_be_old = self.rollout.staleness or self.rollout.schedule == "free"
        if self.experiments.old_logprobs == "current" and not may_be_old:
            raise ValueError(
                "experiments.old_logprobs=current is for batches older than their first update; got "
                "rollout.staleness=0, where the current weights are those that sampled; use train.old_logprobs=trainer"
            )
        return self

    def resolved_settings(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return all settings as they are written down, with the precision even where no recipe has named it.

        `model_dump` leaves that out, so that what reads it may still choose the machine's.
        """
        settings = self.model_dump(mode="json", exclude=set(exclude))
        settings["model"].setdefault("dtype", self.model.dtype)
        return settings

    @model_validator(mode="after")
    def _log_pi_old_of_an_overlapped_batch(self) -> RunConfig:
        """Refuse what needs the trainer's log pi of a batch drawn beside the updates: its weights are gone by then."""
        needing = {
            "train.old_logprobs=trainer": self.old_logprobs == "trainer",
            "objective.tis": self.objective.tis is not None,
            "a cut distribution (rollout.top_p, top_k or min_p)": self.rollout.cuts_tails,
            "a sampler of rounded weights (experiments.sampler_dtype)": not self.experiments.sampler_is_policy,
            "model.routing_replay=R2": self.model.routing_replay == "R2",
        }
        found = [what for what, needed in needing.items() if needed]
        if self.rollout.overlaps and found and self.old_logprobs in ("auto", "trainer"):
            raise ValueError(
                f"{self.rollout.overlap_keys} draws a batch while the weights move on, and {found[0]} needs the "
                "trainer's log pi_old at the weights that sampled it; use rollout.run_in=driver"
                f"{' with schedule=fixed' * (self.rollout.schedule == 'free')}, or experiments.old_logprobs=current"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_to_stop_by(self) -> RunConfig:
        if self.train.stop_when is not None and self.eval.every == 0:
            raise ValueError(
                "train.stop_when looks at the evaluations during training, so it needs eval.every above 0; got "
                "eval.every=0, which evaluates before and after it; eval.every=10 evaluates every tenth step"
            )
        return self

    @model_validator(mode="after")
    def _free_schedule_without_curriculum(self) -> RunConfig:
        if self.rollout.schedule == "free" and any(t.curriculum or self.curriculum for t in self.tasks):
            raise ValueError(
                "a curriculum chooses a batch's prompts by the pass rates of those before it; got "
                "rollout.schedule=free, where they are not known when prompts are chosen; leave out one of them"
            )
        return self

    @property
    def max_staleness(self) -> int:
        """Return the bound of the free schedule in updates."""
        return self.rollout.max_staleness or self.train.minibatches

    @property
    def largest_age(self) -> int:
        """Return how many updates old a batch can be at its first update."""
        return self.max_staleness if self.rollout.schedule == "free" else self.rollout.staleness

    @model_validator(mode="after")
    def _rewards_to_shape(self) -> RunConfig:
        if self.experiments.rewards == "random" and self.rollout.overlong == "penalty":
            raise ValueError(
                "rollout.overlong=penalty is taken off the verifier's reward; got experiments.rewards=random beside "
                "it; leave one out"
            )
        return self

    @property
    def old_logprobs(self) -> Literal["auto", "engine", "trainer", "current"]:
        """Return the source of log pi_old that is asked for: auto, engine, trainer or current."""
        return self.experiments.old_logprobs or self.train.old_logprobs

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

    @property
    def objective_name(self) -> str:
        """Return the objective's name; of a user's own, module:Class, the name that its run recorded."""
        return str((self.provenance or {}).get("objective", self.objective.name))

    def batch_sentence(self) -> str:
        """Describe the batch sizes, a common source of confusion, in one sentence."""
        r, t = self.rollout, self.train
        sequences = r.prompts_per_step * r.samples_per_prompt
        updates, prompts = t.steps * t.minibatches, r.prompts_per_step // t.minibatches
        ending = {
            "keep": "",
            "drop": " Zero-variance groups leave the batch, so updates may be smaller.",
            "refill": " Zero-variance groups are replaced by groups of further prompts, in up to"
            f" {r.refill_rounds} more round{'s' * (r.refill_rounds > 1)} of sampling.",
        }[r.zero_variance]
        return (
            f"Each step draws {r.samples_per_prompt} completions of {_count(r.prompts_per_step, 'prompt')}"
            f" ({sequences} sequences) and makes {_count(t.minibatches, 'update')} of"
            f" {_count(prompts, 'prompt')} ({sequences // t.minibatches} sequences) each;"
            f" {_count(t.steps, 'step')} {'makes' if t.steps == 1 else 'make'} {_count(updates, 'update')}.{ending}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


MOVED = {
    **{
        ("rollout", key): key
        for key in ("sampler_dtype", "sampler_scaling", "sampler_vectors", "sampler_switch", "rewards")
    },
    ("train", "old_logprobs"): "old_logprobs",
}
"""Section and key where a setting stood before -> its key in `experiments`."""


def without_moved_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without keys that moved to `experiments` and are at their defaults, as older runs have them.

    Raises:
        ValueError: one has another value; the message names the new key.
    """
    cleaned = dict(raw)
    for (section, key), new in MOVED.items():
        held = cleaned.get(section)
        if not isinstance(held, dict) or key not in held or (key == "old_logprobs" and held[key] != "current"):
            continue
        if held[key] != ExperimentsConfig.model_fields[new].default:
            raise ValueError(
                f"{section}.{key} has moved to the section experiments; got {held[key]!r}; write experiments.{new}"
            )
        cleaned[section] = {k: v for k, v in held.items() if k != key}
    return cleaned


def with_trainers_as_ranks(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose number of ranks is `train.ranks`, wherever it was given.

    Raises:
        ValueError: `cluster.trainers` and `train.ranks` differ.
    """
    cluster, train = raw.get("cluster"), raw.get("train")
    if not isinstance(cluster, dict) or not isinstance(train, dict) or cluster.get("kind") != "ray":
        return raw
    trainers, ranks = cluster.get("trainers"), train.get("ranks", 1)
    if type(trainers) is not int or trainers < 1:
        return raw  # absent, or refused where it is declared
    if ranks not in (1, trainers):
        raise ValueError(
            f"cluster.trainers is another name of train.ranks; got {trainers} and {ranks}; leave one of them out"
        )
    return raw | {"cluster": cluster | {"trainers": None}, "train": train | {"ranks": trainers}}


def with_engines_in_processes(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe whose engines draw in processes of their own if they are those of a cluster.

    Raises:
        ValueError: it asks for a thread of the driver as well.
    """
    cluster, rollout = raw.get("cluster"), raw.get("rollout", {})
    if not isinstance(cluster, dict) or not isinstance(rollout, dict) or cluster.get("kind") != "ray":
        return raw
    if not cluster.get("engines"):
        return raw
    if (where := rollout.get("run_in", "driver")) not in ("driver", "process"):
        raise ValueError(
            f"cluster.engines draw in processes of the cluster; got {cluster['engines']} with rollout.run_in={where}; "
            "leave one of them out"
        )
    return raw | {"rollout": rollout | {"run_in": "process"}}
