"""An estimate of how much memory a run takes, from parts that are each counted as this trainer and this engine keep
them.

The phases of a step follow each other, and the run's peak is that of the largest. With P parameters of e bytes each, T
of them trained:

    always              baseline + P e + 8 T (the moments of AdamW; another optimizer's state by its own count)
                        + 4 T (float32 masters, of a 16-bit model only)
                        + pixels of the step's pictures (up to 256 MiB); their features, where the tower is frozen (up
                        to 512 MiB)
    generate            cache: (each prompt once + rows x (max_new_tokens - 1))
                        x 2 x layers x kv heads x head size x e (4 on a CPU)
                        + weights joined or packed for decoding
                        + 24 bytes a token of the rows' own tables + one step's logits in the sampler
                        + one layer of the prefill + a copy of the matrices, where the sampler's are rounded
    update, forward     activations of the largest micro-batch + last hidden states and their gradient
                        + one chunk of logits + the head's own gradient (4 V H)
                        + gradients of earlier micro-batches (4 T), where a mini-batch has more than one
                        + activations of the vision tower, where it is trained
    update, both        one gradient more (4 T), where true gradients are compared
    update, backward    gradients (4 T) + the head's once more (4 V H), where it is tied or already has one + one layer
    checkpoint          nothing of its own: tensors are written from where they are
    rollout batch       arrays of 40 bytes a token, from generation to the last update; with
                        refills as if every round drew a whole batch: dropped groups stay until the step is logged;
                        one more for each batch sampled ahead; with routing replay one byte (two above 256 experts)
                        for each expert of a token

Activations are measured (activations.py). The baseline (interpreter, libraries, tokenizer, tasks) is measured in the
process that asks.

On a CPU a quarter is added to all beyond the baseline: glibc keeps freed blocks of up to 32 MiB and cannot always use
them again. The share was measured, and `bench/memory.py` holds the whole against peaks of real runs (docs/memory.md).

Completions are taken at their full length and prompts as those of the first step: shorter completions need less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sapo.config import RunConfig
from sapo.data import Group, Prompt
from sapo.model import gpu_head
from sapo.model.attention import TreeLayout
from sapo.model.head import BLOCK_ELEMENTS, chunk_tokens
from sapo.model.policy import Policy
from sapo.model.prefix_tree import prompt_tree
from sapo.model.routing import Routers
from sapo.model.state_tree import KeptStates
from sapo.rollout.local.cache import KVCache, cache_dtype
from sapo.rollout.local.decoder import copied_bytes
from sapo.rollout.local.engine import PREFILL_TOKENS
from sapo.rollout.local.proof import CACHED, PACKED
from sapo.rollout.local.rows import CACHE_NAMES, own_attention
from sapo.training.batch import cut_groups, split_minibatches
from sapo.training.optimizer import OPTIMIZERS
from sapo.training.optimizer_check import state_bytes
from sapo.utils.machine import resident_bytes
from sapo.workflows.activations import (
    ActivationCost,
    Counts,
    full_length_group,
    measure_activations,
    pack_groups,
    probe_batch,
    run_forward,
)
from sapo.workflows.picture_memory import measure_pictures

BATCH_BYTES_PER_TOKEN = 40
"""A token id and up to three log-probabilities (4 bytes each), and three numbers of 8 bytes that an update measures."""

ROW_BYTES_PER_TOKEN = 24
"""The engine's tables: a uniform (8), a token (8), a log-probability (4) and what they are padded to."""

# Tensors of the size of a step's logits that are alive together in sample_tokens, in units of float32 logits: the
# logits, which become weights in place; a cut tail may sort a copy with 64-bit indices first.
SAMPLER_LOGITS = 1.0
SAMPLER_LOGITS_CUT = 6.5

ALLOCATOR_SHARE = 0.25
"""Memory that glibc keeps of freed blocks after an update, as a share of what lies beyond the baseline: .19 to .34 in
five runs of two models (docs/memory.md)."""


CACHE_COPIES = 2
"""Copies of transformers' own cache where rows leave a batch: those that stay are copied out of it."""

PACKED_TO_COMPARE = 4
"""Micro-batches with the most tokens of a step, of which the one that keeps the most is the largest."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by phase and part. The parts of a phase are there at the same time, so they add up.

    >>> update = {"weights": 4, "moments of AdamW": 8}
    >>> estimate = MemoryEstimate({"generate": {"weights": 4, "cache": 3}, "update, forward": update}, "cpu")
    >>> estimate.peak, estimate.largest_phase
    (12, 'update, forward')
    """

    phases: dict[str, dict[str, int]]
    device: str
    """Device whose memory is counted; on CUDA the baseline and the rollout batch, which are in main memory, are left
    out."""

    @property
    def peak(self) -> int:
        """Return the bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def largest_phase(self) -> str:
        """Return the phase that needs the most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "peak": self.peak,
            "largest_phase": self.largest_phase,
            "device": self.device,
            "phases": {p: {**parts, "total": sum(parts.values())} for p, parts in self.phases.items()},
        }


def estimate_memory(
    config: RunConfig, policy: Policy, prompts: Sequence[Prompt], baseline: int, reference: Policy | None = None
) -> MemoryEstimate:
    """Estimate the memory of a run by phase.

    Args:
        policy: the loaded model; a few tokens are run through it.
        prompts: of one step, with their token ids.
        baseline: from `baseline_bytes`.
        reference: a frozen policy beside the trained one.
    """
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    state = "moments of AdamW" if config.train.optimizer in OPTIMIZERS else "state of the optimizer"
    always = {
        "interpreter and libraries": baseline,
        "weights": _bytes_of(list(policy.model.parameters())),
        "weights of the reference": 0 if reference is None else _bytes_of(list(reference.model.parameters())),
        "float32 masters": sum(4 * p.numel() for p in trained if p.element_size() < 4),
        state: state_bytes(config.train.optimizer, trained),
    }
    tokens = len(prompts) * config.rollout.samples_per_prompt * config.rollout.max_new_tokens
    ahead = -(-config.largest_age // config.train.minibatches)
    drawn = (1 + config.rollout.refill_rounds) * (1 + ahead)
    batch = {"rollout batch": BATCH_BYTES_PER_TOKEN * tokens * drawn}
    if config.model.routing_replay:
        routed = tokens + sum(len(p.token_ids) for p in prompts)
        batch["recorded experts"] = Routers(policy).bytes_per_token * routed * drawn
    if policy.device.type != "cpu":
        del always["interpreter and libraries"]
        batch = {}
    update = _Update(config, policy, prompts)
    if policy.device.type == "cpu":
        always["pixels of pictures"] = update.pictures.pixels
    always["features of pictures"] = update.pictures.features
    phases = {
        "generate": always | batch | _generate_parts(config, policy, prompts, update.layer),
        "update, forward": always | batch | update.forward_parts() | update.compared(),
        "update, backward": always | batch | update.backward_parts() | update.compared(),
        "checkpoint": always | batch,
    }
    return MemoryEstimate({p: _with_allocator(parts, policy) for p, parts in phases.items()}, str(policy.device))


def _with_allocator(parts: dict[str, int], policy: Policy) -> dict[str, int]:
    present = {name: size for name, size in parts.items() if size}
    if policy.device.type != "cpu":
        return present
    beyond = sum(present.values()) - present.get("interpreter and libraries", 0)
    return {**present, "held back by the allocator": int(ALLOCATOR_SHARE * beyond)}


def baseline_bytes(*policies: Policy) -> int:
    """Measure what this process holds beside the weights of its policies: interpreter, libraries, tokenizer, tasks.

    Asked after everything is loaded. Imports that come only with the first update are made here.
    """
    weights = [p for policy in policies for p in policy.model.parameters() if p.device.type == "cpu"]
    for parameter in weights:
        parameter.detach().sum()  # weights are mapped from their file: pages not read yet would not be counted
    dummy = torch.nn.Parameter(torch.zeros(1))
    dummy.grad = torch.zeros(1)
    torch.optim.AdamW([dummy], fused=True).step()
    return resident_bytes() - _bytes_of(weights)


class _Update:
    """The largest mini-batch of a step in which every completion has its full length, and its largest micro-batch."""

    def __init__(self, config: RunConfig, policy: Policy, prompts: Sequence[Prompt]) -> None:
        rollout, train = config.rollout, config.train
        groups = [full_length_group(p, rollout.samples_per_prompt, rollout.max_new_tokens) for p in prompts]
        kept = measure_activations(policy)
        self.layer = kept
        self.cost = measure_activations(policy, checkpointing=True) if train.activation_checkpointing else kept
        cut: list[tuple[list[Group], int]] = []
        for part in split_minibatches(groups, train.minibatches):
            microbatches = cut_groups(part, train.tokens_per_microbatch, train.picture_tokens_per_microbatch)
            cut += [(microbatch, len(microbatches)) for microbatch in microbatches]
        # A step may have more tokens than memory for them, so that only those with the most are packed.
        most = sorted(cut, key=lambda m: -_num_tokens(m[0]))[:PACKED_TO_COMPARE]
        batches = [(pack_groups(m, 2**62, rollout.max_new_tokens).microbatches[0], n) for m, n in most]
        self.pictures = measure_pictures(policy, prompts, train.activation_checkpointing)
        self.batch, self.num_microbatches = max(
            batches, key=lambda b: self.cost.bytes(Counts.of_policy(policy, b[0])) + self.pictures.activations(b[0])
        )
        self.diagnostics = config.diagnostics
        self.policy = policy
        self.trained = [p for p in policy.model.parameters() if p.requires_grad]
        self.checkpointing = train.activation_checkpointing

    def compared(self) -> dict[str, int]:
        """Count the gradient that those of counterfactual objectives are compared with, one after the other."""
        asked = self.diagnostics.true_gradient_every > 0 and self.diagnostics.counterfactuals
        return {"gradient to compare with": self._gradients()} if asked else {}

    def forward_parts(self) -> dict[str, int]:
        """Count what exists at the end of a micro-batch's forward pass: all activations, and the head at work."""
        vocabulary, hidden = self.policy.head_weight.shape
        targets = self.batch.num_targets
        parts = {
            "activations": int(self.cost.bytes(Counts.of_policy(self.policy, self.batch))),
            "activations of the vision tower": self.pictures.activations(self.batch),
            "last hidden states and their gradient": 2 * targets * hidden * self.policy.dtype.itemsize,
            "one chunk of logits": _chunk_bytes(self.policy, targets),
        }
        if self.policy.head_weight.requires_grad:
            parts["gradient of the head"] = vocabulary * hidden * 4
        if self.num_microbatches > 1:
            parts["gradients of earlier micro-batches"] = self._gradients()
        return parts

    def backward_parts(self) -> dict[str, int]:
        """Count what exists at the end of a backward pass: the gradients of all parameters, and no activations."""
        parts = {"gradients": self._gradients()}
        if any(p.element_size() < 4 for p in self.trained) and self.num_microbatches > 1:
            parts["16-bit gradients"] = _bytes_of(self.trained)
        weight = self.policy.head_weight
        tied = self.policy.model.get_input_embeddings().weight is weight
        if weight.requires_grad and (tied or self.num_microbatches > 1):
            # Both uses of a tied embedding bring a gradient of its size before they are summed; that of a second
            # micro-batch stands beside the first one's.
            parts["gradient of the head once more"] = weight.numel() * 4
        parts["one layer"] = int(self.layer.bytes(Counts.of_policy(self.policy, self.batch)) / self.layer.layers)
        return parts

    def _gradients(self) -> int:
        return sum(max(4, p.element_size()) * p.numel() for p in self.trained)


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(len(g.prompt.token_ids) + sum(map(len, g.completions)) for g in groups)


def _generate_parts(
    config: RunConfig, policy: Policy, prompts: Sequence[Prompt], cost: ActivationCost
) -> dict[str, int]:
    """Count the parts of generation, with a full batch of rows in its last step, or in its prefill."""
    rollout, experiments = config.rollout, config.experiments
    samples = rollout.samples_per_prompt
    rows = min(len(prompts) * samples, max(rollout.max_rows, samples))
    tree = prompt_tree(prompts)
    lengths = [tree.segments[leaf].length for leaf in tree.leaves]
    cache = KVCache(rows, rollout.max_new_tokens, lengths, [samples] * len(prompts), tree.preamble)
    in_rows = policy.path == "rows" or policy.engine_paths.get(PACKED) is not None
    kept = CacheCost(0, 0) if in_rows else measure_cache(policy)
    cached = cache.num_places * kept.keys_of_token * cache_dtype(policy.dtype, policy.device).itemsize
    if in_rows:
        longest = max(len(p.token_ids) for p in prompts) + rollout.max_new_tokens
        cached = CACHE_COPIES * rows * _bytes_of_row(policy, longest)
    vocabulary = policy.head_weight.shape[0]
    cut = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
    # Logits of 16 bits are there beside their float32 copy.
    logits = rows * vocabulary * (4 * (SAMPLER_LOGITS_CUT if cut else SAMPLER_LOGITS) + policy.dtype.itemsize % 4)
    prefill = min(PREFILL_TOKENS, len(tree.token_ids))
    matrices = [p for p in policy.model.parameters() if p.dim() > 1 or experiments.sampler_vectors]
    return {
        "rounded weights": 0 if experiments.sampler_is_policy else _bytes_of(matrices),
        "cache of keys and values": cached,
        "recurrent states of the rows": kept.states_of_row * (rows + min(len(prompts), rows // samples) + 1),
        "weights arranged for decoding": copied_bytes(policy, rollout.max_new_tokens),
        "tables of the rows": rows * rollout.max_new_tokens * ROW_BYTES_PER_TOKEN,
        "logits of a step in the sampler": int(logits),
        "one layer of the prefill": int(cost.per_token * prefill / cost.layers),
    }


def _chunk_bytes(policy: Policy, targets: int) -> int:
    vocabulary = policy.head_weight.shape[0]
    itemsize = policy.dtype.itemsize
    if gpu_head.takes_whole_chunks(policy.device):
        return gpu_head.chunk_bytes(vocabulary, targets, itemsize)
    tokens = min(chunk_tokens(vocabulary, itemsize), targets)
    block = max(vocabulary, min(BLOCK_ELEMENTS, tokens * vocabulary))
    # The block of rows that is made into probabilities, and its wider copy where the model computes in 16 bits.
    return tokens * vocabulary * itemsize + block * max(4, itemsize) * (1 if itemsize >= 4 else 2)


@dataclass(frozen=True)
class CacheCost:
    """Count what the engine keeps of a sequence, over all layers.

    >>> CacheCost(keys_of_token=2 * 2 * 64, states_of_row=0).keys_of_token  # two layers, 64 numbers of a key in each
    256
    """

    keys_of_token: int
    """Elements of the keys and values of one token."""
    states_of_row: int
    """Bytes of the windows and states of recurrent layers, whatever the length."""


def measure_cache(policy: Policy) -> CacheCost:
    """Measure what the engine keeps of a sequence, by a forward pass over a few tokens."""
    sizes: list[int] = []

    def measure(_: int, key: torch.Tensor, value: torch.Tensor) -> None:
        sizes.append((key.numel() + value.numel()) // key.shape[0])

    batch, states = probe_batch(1, 2, 2, 2), KeptStates()
    with torch.no_grad():
        run_forward(policy, batch, TreeLayout(batch.segments, policy.device, on_keys=measure, keep=states))
    return CacheCost(sum(sizes), states.num_bytes // len(batch.segments))


def _bytes_of_row(policy: Policy, length: int) -> int:
    """Measure the bytes of what the model's own cache keeps of a sequence; 0 where it is decoded without."""
    if policy.engine_paths.get(CACHED) is not None:
        return 0
    sizes = []
    decoder: Any = policy.decoder
    for tokens in (4, 8):
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=policy.device)
        with torch.no_grad(), own_attention(policy):
            output = decoder(input_ids=ids, use_cache=True)
        kept = [getattr(output, name, None) for name in CACHE_NAMES]
        sizes.append(_bytes_of(list(_tensors_of(kept, set()))))
    per_token = (sizes[1] - sizes[0]) / 4
    return int(sizes[0] + per_token * (length - 4))


def _tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object holds, in its attributes and containers, once each."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in (*inside, *vars(value).values()) if hasattr(value, "__dict__") else inside:
        yield from _tensors_of(part, seen)


def _bytes_of(parameters: Sequence[torch.Tensor]) -> int:
    return sum(p.nbytes for p in parameters)
