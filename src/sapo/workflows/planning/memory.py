"""Bytes of each rank of a plan, by phase and part.

With S ranks that a replica is sharded over, e bytes of an element in a pass, and T of P parameters trained:

    every rank          slices of weights in float32 (4 P / S), moments (8 T / S); FSDP2 cuts whole rows, so that of 128
                        experts no rank has less than one, and the rank with the most rows counts
    the driver          the whole policy (P e), which the engine draws with and checkpoints are written of; likewise a
                        reference
    generate            of the driver: cache, weights arranged for decoding, tables and logits of the rows
    sync                one whole parameter (e), and the pieces it is joined of
    update, forward     root gathered (e) + activations of the largest micro-batch + last hidden states and their
                        gradient + one chunk of logits + the head's gradient in float32 (4 V H), whole on every rank
                        + slices of the gradients of earlier micro-batches (4 T / S)
    update, backward    the same without the head at work + a block gathered (e), the buffer it arrives in (e), its
                        gradients (e) and the buffer they are summed in (4)
    update, end         root's gradients (e), the buffer they are summed in (4); slices of all gradients (4 T / S)

One process has no slices: weights in e bytes, float32 masters where e is 2, gradients in float32. Its parts are those
of a dry run (workflows/memory.py).

What glibc keeps of freed blocks on a CPU is in the parts of one process, as in a dry run, and not in those of ranks: of
these it was more than all they use (docs/scaling.md), unless MALLOC_MMAP_THRESHOLD_ tells it to give them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapo.config import RunConfig
from sapo.model import gpu_head
from sapo.model.head import BLOCK_ELEMENTS, chunk_tokens
from sapo.rollout.local.engine import PREFILL_TOKENS
from sapo.workflows.memory import (
    ALLOCATOR_SHARE,
    BATCH_BYTES_PER_TOKEN,
    ROW_BYTES_PER_TOKEN,
    SAMPLER_LOGITS,
    SAMPLER_LOGITS_CUT,
    MemoryEstimate,
)
from sapo.workflows.planning.machine import GIB, Machine
from sapo.workflows.planning.shape import ModelShape, Parameter
from sapo.workflows.planning.workload import Workload

Parts = dict[str, int]

OUTSIDE = "CUDA, NCCL and libraries"
"""Name of the part that is assumed and not counted: `Machine.runtime` on a GPU, nothing on a CPU."""


@dataclass(frozen=True)
class RankMemory:
    """What the driver and another rank need, each by phase.

    >>> parts = {"update": {"slices of weights": 3}}
    >>> RankMemory(MemoryEstimate(parts, "cuda"), None).ranks
    {'driver': MemoryEstimate(phases={'update': {'slices of weights': 3}}, device='cuda')}
    """

    driver: MemoryEstimate
    """Rank 0, or the one process."""
    other: MemoryEstimate | None
    """Any other rank; None for one process."""

    @property
    def ranks(self) -> dict[str, MemoryEstimate]:
        """Return both by name."""
        return {"driver": self.driver} | ({} if self.other is None else {"other ranks": self.other})


def draws_elsewhere(config: RunConfig) -> bool:
    """Return whether completions are drawn on GPUs beside those of the ranks, which no plan counts."""
    return config.device != "cpu" and (config.rollout.servers is not None or config.cluster.engines > 0)


def memory_of(config: RunConfig, shape: ModelShape, work: Workload, machine: Machine) -> RankMemory:
    """Return the bytes of each rank of a recipe by phase and part.

    Args:
        config: with its ranks; `device` cpu is a plan of CPU ranks, anything else one of GPUs.
    """
    counted = _Rank(config, shape, work, machine)
    other = counted.estimate(is_driver=False) if config.train.ranks > 1 else None
    return RankMemory(counted.estimate(is_driver=True), other)


class _Rank:
    """The parts of a rank."""

    def __init__(self, config: RunConfig, shape: ModelShape, work: Workload, machine: Machine) -> None:
        self.config, self.shape, self.work, self.machine = config, shape, work, machine
        self.on_cpu = config.device == "cpu"
        self.ranks = config.train.ranks
        self.shards = self.ranks // config.train.replicas
        self.trained = [p for p in shape.parameters if p.trained]
        kl = config.objective.kl
        self.has_reference = kl is not None and (kl.reference is not None or config.model.lora is None)

    def estimate(self, is_driver: bool) -> MemoryEstimate:
        always = self._always(is_driver)
        phases = {"generate": self._generate() if is_driver else {}}
        if self.ranks > 1:
            phases |= {"sync": self._sync(), **self._sharded_update()}
        else:
            phases |= self._update()
        found = {phase: self._present(always | parts) for phase, parts in phases.items()}
        return MemoryEstimate(found, "cpu" if self.on_cpu else "cuda")

    def _present(self, parts: Parts) -> Parts:
        present = {name: int(size) for name, size in parts.items() if size}
        if self.on_cpu and self.ranks == 1:
            present["held back by the allocator"] = int(ALLOCATOR_SHARE * sum(present.values()))
        return present

    def _always(self, is_driver: bool) -> Parts:
        shape, state = self.shape, self.shape.state_bytes_per_element
        parts: Parts = {OUTSIDE: 0 if self.on_cpu else int(self.machine.runtime * GIB)}
        if self.ranks > 1:
            parts["slices of weights"] = 4 * self._slices(shape.parameters)
            parts["slices of the reference's weights"] = parts["slices of weights"] * self.has_reference
            parts["slices of the optimizer's state"] = int(state * self._slices(self.trained))
            if is_driver:
                parts["driver's whole copy of the weights"] = shape.weight_bytes
                parts["driver's whole copy of the reference"] = shape.weight_bytes * self.has_reference
        else:
            parts["weights"] = shape.weight_bytes
            parts["weights of the reference"] = shape.weight_bytes * self.has_reference
            parts["float32 masters"] = sum(4 * p.elements for p in self.trained if p.itemsize < 4)
            parts["optimizer's state"] = int(state * _elements(self.trained))
        if is_driver and self.on_cpu:
            parts |= self._batch()
        return parts

    def _slices(self, parameters: Sequence[Parameter]) -> int:
        return sum(p.slice_elements(self.shards) for p in parameters)

    def _batch(self) -> Parts:
        rollout = self.config.rollout
        drawn = (1 + rollout.refill_rounds) * (1 + -(-self.config.largest_age // self.config.train.minibatches))
        return {"rollout batch": BATCH_BYTES_PER_TOKEN * self.work.response_tokens * drawn}

    def _generate(self) -> Parts:
        rollout, shape, work = self.config.rollout, self.shape, self.work
        if draws_elsewhere(self.config):
            return {}
        if rollout.engine == "vllm":
            return self._vllm()
        if rollout.engine != "local":
            return {}
        cut = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        logits = 4 * (SAMPLER_LOGITS_CUT if cut else SAMPLER_LOGITS) + shape.itemsize % 4
        prefill = min(PREFILL_TOKENS, work.prompts * work.prompt_tokens)
        experiments = self.config.experiments
        return {
            "rounded weights": 0 if experiments.sampler_is_policy else shape.weight_bytes,
            "cache of keys and values": work.cache_places
            * shape.cache.keys_of_token
            * (4 if self.on_cpu else shape.itemsize),
            "recurrent states of the rows": shape.cache.states_of_row
            * (work.rows + min(work.prompts, work.rows // work.samples) + 1),
            "weights arranged for decoding": shape.arranged_bytes,
            "tables of the rows": work.rows * work.new_tokens * ROW_BYTES_PER_TOKEN,
            "logits of a step in the sampler": int(work.rows * shape.vocabulary * logits),
            "one layer of the prefill": int(shape.kept.per_token * prefill / shape.kept.layers),
        }

    def _vllm(self) -> Parts:
        settings = self.config.rollout.vllm
        if self.on_cpu:
            gib = 1.0 if settings is None else settings.kv_cache_gib or 1.0
            return {"engine's weights": self.shape.weight_bytes, "engine's cache": int(gib * GIB)}
        share = 0.5 if settings is None else settings.gpu_memory_utilization
        room = int(share * self.machine.gpu_memory * GIB)
        weights = self.shape.weight_bytes
        return {"engine's weights": weights, "engine's cache and workspace": max(0, room - weights)}

    def _sync(self) -> Parts:
        size = self.shape.largest_parameter * self.shape.itemsize
        return {"transfer: one whole parameter and its pieces": 2 * size}

    def _sharded_update(self) -> dict[str, Parts]:
        shape, e = self.shape, self.shape.itemsize
        trained_root = _elements([p for p in shape.root if p.trained])
        block = shape.largest_block
        earlier = 4 * self._slices(self.trained) if self.work.microbatches > 1 else 0
        slices = {"slices of earlier gradients": earlier}
        root = {"root gathered": e * _elements(shape.root)}
        passing = self._activations() | {"gradient of the head": self._head_gradient(4)}
        in_flight = {
            "a block gathered, and its buffer": 2 * e * _elements(block),
            "a block's gradients, and their sum": (e + 4) * _elements([p for p in block if p.trained]),
            "one layer at work": self._layer(),
        }
        begun = self._activations() | {"gradient of the head": self._head_gradient(e)}
        end = {
            "slices of gradients": 4 * self._slices(self.trained),
            "slices of this micro-batch": (4 if earlier else 0) * self._slices([p for p in shape.root if p.trained]),
            "root's gradients, and their sum": (e + 4) * trained_root,
        }
        return {
            "update, forward": slices | root | passing | self._head_at_work(),
            "update, backward": slices | root | begun | in_flight,
            "update, end": end,
        }

    def _update(self) -> dict[str, Parts]:
        gradients = sum(max(4, p.itemsize) * p.elements for p in self.trained)
        several = self.work.microbatches > 1
        earlier = {"gradients of earlier micro-batches": gradients if several else 0}
        narrow = sum(p.elements * p.itemsize for p in self.trained if p.itemsize < 4)
        head = self._head_gradient(4)
        again = head if self.shape.tied or several else 0
        return {
            "update, forward": earlier | self._activations() | {"gradient of the head": head} | self._head_at_work(),
            "update, backward": earlier
            | self._activations()
            | {"gradient of the head": head, "one layer at work": self._layer()},
            "update, end": {
                "gradients": gradients,
                "16-bit gradients": narrow if several else 0,
                "gradient of the head once more": again,
                "one layer at work": self._layer(),
            },
        }

    def _activations(self) -> Parts:
        shape, checkpointing = self.shape, self.config.train.activation_checkpointing
        cost = shape.checkpointed if checkpointing else shape.kept
        kept = cost.bytes(self.work.largest)
        if not self.on_cpu and shape.path == "packed":
            # The kernel of a GPU takes the tree as it is: it keeps padded tokens, and neither masks nor scores.
            padding = self.work.padded_tokens - self.work.largest.tokens
            width = 2 * (shape.heads + shape.kv_heads) * shape.head_width * shape.itemsize
            kept -= cost.per_pair * self.work.largest.pairs + cost.per_mask * self.work.largest.masks
            kept += 0 if checkpointing else padding * width * len(shape.blocks)
        return {"activations": int(kept / self.config.train.context_parallel)}

    def _layer(self) -> int:
        """Return the bytes of one layer's activations, made again or differentiated."""
        cost = self.shape.kept
        return int(cost.bytes(self.work.largest) / cost.layers / self.config.train.context_parallel)

    def _head_at_work(self) -> Parts:
        shape, targets = self.shape, self.work.targets // self.config.train.context_parallel
        return {
            "last hidden states and their gradient": 2 * targets * shape.hidden * shape.itemsize,
            "one chunk of logits": self._chunk(max(1, targets)),
        }

    def _chunk(self, targets: int) -> int:
        vocabulary, itemsize = self.shape.vocabulary, self.shape.itemsize
        if not self.on_cpu:
            return gpu_head.chunk_bytes(vocabulary, targets, itemsize)
        tokens = min(chunk_tokens(vocabulary, itemsize), targets)
        block = max(vocabulary, min(BLOCK_ELEMENTS, tokens * vocabulary))
        return tokens * vocabulary * itemsize + block * max(4, itemsize) * (1 if itemsize >= 4 else 2)

    def _head_gradient(self, itemsize: int) -> int:
        return itemsize * self.shape.head_elements if self.shape.head_trained else 0


def _elements(parameters: Sequence[Parameter]) -> int:
    return sum(p.elements for p in parameters)
