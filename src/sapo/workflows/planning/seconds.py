"""Seconds of each phase of a step, from the rates of a machine: an estimate of scale, not a measurement.

With N tokens that go through the model on the fullest rank, M of them response tokens, A elements of the blocks that a
token is multiplied with, and V H those of the output embedding:

    log-probs       2 A N + 2 V H M + attention, in FLOP, for each pass
    update          three times as much; the blocks four times with activation checkpointing, the head four times with
                    an objective that needs whole sequences
    attention       4 x heads x head size x layers x (query, key) pairs
    gathers         P e for each forward and backward pass of a micro-batch, and 4 P of gradients summed
    rollout         each step of decoding reads the weights and the keys and values once; experts that no row goes to
                    are not read
    sync            P e gathered, and copied to the engine
    checkpoint      weights by the driver, the optimizer's state by all ranks, then the SHA-256 of all files by the
                    driver

Gathers run beside the computation, so the longer of the two counts. The engine draws on the driver's device alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapo.config import RunConfig
from sapo.workflows.planning.machine import Machine
from sapo.workflows.planning.shape import ModelShape
from sapo.workflows.planning.workload import Workload


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase of one step.

    >>> Phase(compute=2.0, transfer=3.0).seconds
    3.0
    """

    compute: float
    transfer: float = 0.0
    """Of what runs beside it: gathers over the ranks, or memory that is read."""

    @property
    def seconds(self) -> float:
        """Return the longer of the two."""
        return max(self.compute, self.transfer)

    @property
    def bound(self) -> str:
        """Return what the phase waits for."""
        return "transfer" if self.transfer > self.compute else "compute"


def seconds_of(config: RunConfig, shape: ModelShape, work: Workload, machine: Machine) -> dict[str, Phase]:
    """Return the seconds of a step's phases on GPUs, by name; those that the recipe has not are left out."""
    clock = _Clock(config, shape, work, machine)
    phases = {"rollout": clock.rollout()}
    if config.train.ranks > 1 or config.rollout.engine != "local":
        phases["sync"] = clock.sync()
    if passes := logprob_passes(config):
        phases["log-probs"] = clock.logprobs(passes)
    phases["update"] = clock.update()
    phases["checkpoint"] = clock.checkpoint()
    return phases


def logprob_passes(config: RunConfig) -> int:
    """Return how many forward passes over a batch come before its updates: for log pi_old, and for a reference.

    Under train.old_logprobs=auto the first step of a run decides. Here the engine's are taken to serve in float32 only,
    where it is the local one and draws from the whole distribution.
    """
    rollout, wanted = config.rollout, config.old_logprobs
    cut = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
    of_engine = (
        config.model.dtype == "float32" and rollout.engine == "local" and not cut and config.objective.tis is None
    )
    by_trainer = wanted in ("trainer", "current") or (wanted == "auto" and not of_engine)
    return int(by_trainer) + int(config.objective.kl is not None)


class _Clock:
    """The seconds of each phase."""

    def __init__(self, config: RunConfig, shape: ModelShape, work: Workload, machine: Machine) -> None:
        self.config, self.shape, self.work, self.machine = config, shape, work, machine
        train = config.train
        self.shards = train.ranks // train.replicas
        self.rate = machine.rate(machine.mfu if shape.expert_share == 1.0 else machine.moe_mfu)
        groups = train.minibatches * work.rank_groups
        self.tokens = groups * (work.prompt_tokens + work.samples * (work.new_tokens - 1)) / train.context_parallel
        self.targets = groups * work.samples * work.new_tokens / train.context_parallel
        self.pairs = work.pairs * groups / work.prompts / train.context_parallel

    def _blocks(self) -> float:
        """Return the FLOP of the blocks in one forward pass over the fullest rank's tokens."""
        shape = self.shape
        attention = 4 * shape.heads * shape.head_width * len(shape.blocks) * self.pairs
        return 2 * shape.active * self.tokens + attention

    def _head(self) -> float:
        return 2 * self.shape.head_elements * self.targets

    def _gather(self, bytes_per_element: float) -> float:
        """Return the seconds in which all weights are gathered, or all gradients summed, once."""
        size = self.shape.elements * bytes_per_element * (1 - 1 / self.shards)
        return size / self.machine.link(self.shards)

    def rollout(self) -> Phase:
        shape, work, machine = self.shape, self.work, self.machine
        steps = -(-work.sequences // work.rows) * work.new_tokens
        read = shape.itemsize * (shape.elements - shape.expert_elements * (1 - shape.expert_share) ** work.rows)
        kept = work.rows * (work.prompt_tokens + work.new_tokens / 2) * shape.cache.keys_of_token * shape.itemsize
        kept += 2 * work.rows * shape.cache.states_of_row  # read and written
        flop = 2 * (shape.active + shape.head_elements) * work.rows
        prefill = 2 * shape.active * work.prompts * work.prompt_tokens / self.rate
        return Phase(
            steps * flop / self.rate + prefill, steps * (read + kept) / (machine.memory_bandwidth * 1e9) + prefill
        )

    def sync(self) -> Phase:
        copies = 1 if self.config.rollout.engine == "local" else 2
        copied = copies * self.shape.weight_bytes / (self.machine.memory_bandwidth * 1e9)
        return Phase(0.0, copied + self._gather(self.shape.itemsize))

    def logprobs(self, passes: int) -> Phase:
        microbatches = self.config.train.minibatches * self.work.microbatches
        gathers = microbatches * self._gather(self.shape.itemsize)
        return Phase(passes * (self._blocks() + self._head()) / self.rate, passes * gathers)

    def update(self) -> Phase:
        train, shape = self.config.train, self.shape
        blocks = 4 if train.activation_checkpointing else 3
        head = 4 if self.config.objective.make().coupled else 3
        trained = sum(p.elements for p in shape.parameters if p.trained)
        compute = (blocks * self._blocks() + head * self._head()) / self.rate
        one = 2 * self._gather(shape.itemsize) + self._gather(4 * trained / shape.elements)
        if train.replicas > 1:
            one += 2 * 4 * trained / self.shards / (self.machine.network * 1e9)
        # The optimizer reads and writes weights, gradients and moments.
        step = 32 * trained / self.shards / (self.machine.memory_bandwidth * 1e9)
        return Phase(compute + train.minibatches * step, train.minibatches * (self.work.microbatches * one + step))

    def checkpoint(self) -> Phase:
        shape, machine = self.shape, self.machine
        trained = [p for p in shape.parameters if p.trained]
        rounded = shape.itemsize < 4
        state = sum(p.elements for p in trained) * (shape.state_bytes_per_element + 4 * rounded)
        saved = shape.weight_bytes if self.config.model.lora is None else sum(p.elements * p.itemsize for p in trained)
        written = saved / (machine.disk * 1e9) + state / self.shards / (machine.disk * 1e9)
        return Phase((saved + state) / (machine.hashing * 1e9) + written)
