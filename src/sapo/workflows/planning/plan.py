"""A plan: the memory of each rank, the seconds of each phase, and what does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psutil

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.model.context import check_heads
from sapo.run.machine import dtype_on_gpu
from sapo.run.trainers import check_sliceable
from sapo.training.optimizer import find_optimizer
from sapo.workflows.memory import MemoryEstimate
from sapo.workflows.planning.machine import GIB, Machine
from sapo.workflows.planning.memory import RankMemory, draws_elsewhere, memory_of
from sapo.workflows.planning.seconds import Phase, seconds_of
from sapo.workflows.planning.shape import ModelShape, shape_of
from sapo.workflows.planning.workload import Workload, workload_of

PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """What a recipe needs. See `make_plan`."""

    config: RunConfig
    machine: Machine
    shape: ModelShape
    work: Workload
    memory: RankMemory
    seconds: dict[str, Phase]
    """By phase; empty for a plan of CPU ranks, whose rates are not assumed."""
    completion_tokens: int
    """Mean length of the completions that the seconds are for."""

    @property
    def on_cpu(self) -> bool:
        """Return whether the ranks are processes of this machine's CPU, which share its memory."""
        return self.config.device == "cpu"

    @property
    def capacity(self) -> float:
        """Return the bytes that a GPU may hold, or all ranks of this machine together."""
        if self.on_cpu:
            return psutil.virtual_memory().total * (1 - self.machine.headroom)
        return self.machine.usable_bytes

    @property
    def needed(self) -> int:
        """Return the bytes of the rank that needs the most, or of all ranks of this machine together."""
        peaks = [estimate.peak for estimate in self.memory.ranks.values()]
        if not self.on_cpu:
            return max(peaks)
        return peaks[0] + sum(peaks[1:]) * (self.config.train.ranks - 1)

    @property
    def fits(self) -> bool:
        """Return whether everything fits."""
        return self.needed <= self.capacity

    @property
    def fullest(self) -> tuple[str, MemoryEstimate]:
        """Return the rank that needs the most, by name."""
        name = max(self.memory.ranks, key=lambda n: self.memory.ranks[n].peak)
        return name, self.memory.ranks[name]

    @property
    def idle_ranks(self) -> int:
        """Return how many ranks get no group of an update, since whole groups are dealt."""
        train = self.config.train
        sharing = train.ranks // train.context_parallel if train.ranks > 1 else 1
        return max(0, sharing - self.work.prompts // train.minibatches) * train.context_parallel

    def first_too_large(self) -> str | None:
        """Return what does not fit first, in the order in which a step needs memory; None where all fits."""
        if self.fits:
            return None
        name, estimate = self.fullest
        if self.on_cpu:
            return f"{self.config.train.ranks} processes on this machine need {_gib(self.needed, self.capacity)}"
        for phase, parts in estimate.phases.items():
            total = 0
            for part, size in parts.items():
                total += size
                if total > self.capacity:
                    largest = max(parts, key=lambda p: parts[p])
                    return (
                        f"{name}, {phase}: with {part} ({size / GIB:,.1f} GiB) it comes to "
                        f"{_gib(total, self.capacity)}; the most is taken by {largest} "
                        f"({parts[largest] / GIB:,.1f} GiB)"
                    )
        raise AssertionError("the fullest rank exceeds the capacity in some phase")

    def assumptions(self) -> list[str]:
        """Return what the figures rest on, one sentence each."""
        machine, work = self.machine, self.work
        said = [
            f"prompts of {work.prompt_tokens:,} tokens; memory with every completion at its full length of "
            f"{work.new_tokens:,}; no zero-variance groups"
        ]
        if self.on_cpu:
            said.append("interpreter and libraries, about half a GiB a process, are not counted")
            if self.config.train.ranks > 1:
                said.append(
                    "MALLOC_MMAP_THRESHOLD_=65536 in the environment, so that freed blocks are given back at once: "
                    "glibc was seen to keep more than all that is counted here (docs/scaling.md)"
                )
            return said
        said += [
            f"seconds with completions of {self.completion_tokens:,} tokens",
            f"GPUs of {machine.gpu_memory:g} GiB, of which {machine.headroom:.0%} stay free and {machine.runtime:g} "
            "GiB are CUDA's, NCCL's and the libraries'",
            f"{machine.tflops:g} TFLOP/s in large products, of which a dense model reaches {machine.mfu:.0%} and a "
            f"mixture {machine.moe_mfu:.0%}; memory at {machine.memory_bandwidth:,g} GB/s",
            f"nodes of {machine.node} GPUs; a GPU sends {machine.interconnect:g} GB/s within a node and "
            f"{machine.network:g} GB/s to others; a process writes {machine.disk:g} GB/s to disk and hashes "
            f"{machine.hashing:g} GB/s",
            "nothing of this was measured on these GPUs; memory was held against measurements on CPU ranks "
            "(docs/scaling.md)",
        ]
        if draws_elsewhere(self.config):
            said.append(
                "servers, and engines of a cluster, have other GPUs, not counted here; rollouts as by one of them"
            )
        elif self.config.rollout.engine not in ("local", "vllm"):
            said.append(f"the memory of the engine {self.config.rollout.engine} is not counted")
        return said

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        shape = self.shape
        return {
            "model": {
                "name": shape.name,
                "parameters": shape.elements,
                "active": int(shape.active + shape.head_elements),
            },
            "ranks": self.config.train.ranks,
            "batch": asdict(self.work),
            "idle_ranks": self.idle_ranks,
            "memory": {name: estimate.to_json() for name, estimate in self.memory.ranks.items()},
            "needed": self.needed,
            "capacity": int(self.capacity),
            "fits": self.fits,
            "first_too_large": self.first_too_large(),
            "seconds": {
                name: {"compute": p.compute, "transfer": p.transfer, "seconds": p.seconds}
                for name, p in self.seconds.items()
            },
            "machine": self.machine.to_json(),
            "assumptions": self.assumptions(),
        }


def make_plan(
    config: RunConfig,
    machine: Machine | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    completion_tokens: int | None = None,
) -> Plan:
    """Compute what a recipe needs. No weights are made, no task is loaded, and nothing is downloaded.

    Args:
        config: from `load_recipe`, with `train.ranks` ranks; device cpu plans CPU ranks, any other one GPUs, which
            compute in bfloat16 where a run would.
        machine: rates and sizes of the GPUs.
        prompt_tokens: of each prompt.
        completion_tokens: mean length that the seconds are for; None for `rollout.max_new_tokens`. Memory is always
            that of completions at their full length.

    Raises:
        ConfigError, ModelError: the model's dimensions are not known, or the ranks do not fit it.
    """
    if config.device != "cpu":
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"dtype": dtype_on_gpu(config.model)})}
        )
    machine, train = machine or Machine(), config.train
    find_optimizer(train.optimizer)
    check_sliceable(config)
    shape = _cached_shape(config)
    problem = check_heads(shape.heads, shape.kv_heads, train.context_parallel, shape.chunk_tokens > 0)
    if train.context_parallel > 1 and problem is not None:
        raise ConfigError(f"train.context_parallel={train.context_parallel} does not fit the model: {problem}")
    if train.context_parallel > 1 and shape.path == "rows":
        raise ConfigError(
            f"train.context_parallel={train.context_parallel} needs a model that runs on packed tokens; that of "
            f"{shape.name} runs in rows; set train.context_parallel=1"
        )
    if train.ranks % train.context_parallel:
        raise ConfigError(
            f"train.context_parallel must divide the number of ranks; got {train.context_parallel} and {train.ranks}; "
            "leave it out, or plan for more ranks"
        )
    work = workload_of(config, prompt_tokens, shape.path, shape.chunk_tokens)
    memory, seconds = memory_of(config, shape, work, machine), {}
    mean = work.new_tokens if completion_tokens is None else completion_tokens
    if not 1 <= mean <= work.new_tokens:
        raise ConfigError(
            f"--completion-tokens must lie in 1..{work.new_tokens}, rollout.max_new_tokens; got {completion_tokens}; "
            "leave it out for completions at their full length"
        )
    if config.device != "cpu":
        usual = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": mean})})
        drawn = workload_of(usual, prompt_tokens, shape.path, shape.chunk_tokens)
        seconds = seconds_of(usual, shape, drawn, machine)
    return Plan(config, machine, shape, work, memory, seconds, mean)


_SHAPES: dict[tuple[str, ...], ModelShape] = {}


def _cached_shape(config: RunConfig) -> ModelShape:
    """Return the shape of a model, made once for plans that differ in other settings."""
    place = "cpu" if config.device == "cpu" else "cuda"
    key = (config.model.model_dump_json(), config.train.optimizer, place, str(config.rollout.max_new_tokens))
    if key not in _SHAPES:
        _SHAPES[key] = shape_of(config)
    return _SHAPES[key]


def _gib(size: float, capacity: float) -> str:
    return f"{size / GIB:,.1f} GiB of {capacity / GIB:,.1f}"
