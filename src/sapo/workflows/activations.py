"""Activations: the bytes that a forward pass of training keeps for its backward pass, measured on a few tokens.

They are not derived from an architecture. `measure_activations` runs the forward pass, counts the storages that
autograd keeps, and solves for bytes per packed token, per query and key of the attention kernel, per pair of them, and
per token that recurrent layers scan: everything else works token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from sapo.data import Completion, Group, PackedBatch, Prompt
from sapo.model.attention import TreeLayout
from sapo.model.gather import gather_rows
from sapo.model.policy import Policy
from sapo.model.rows import row_paths
from sapo.model.state_tree import num_padded
from sapo.training.batch import pack
from sapo.training.ranks import Shares


@dataclass(frozen=True)
class Counts:
    """The size of a micro-batch, as far as memory depends on it.

    >>> Counts(tokens=7, queries=9, keys=15, pairs=45, masks=45).tokens
    7
    """

    tokens: int
    """Packed tokens: no padding."""
    queries: int
    """Queries of the attention kernel, padding included."""
    keys: int
    """Keys, padding included; a prompt's count once for every segment that attends to them."""
    pairs: int
    """(query, key) rectangles."""
    masks: int
    """Numbers of the masks: responses to one prompt may share one."""
    scanned: int = 0
    """Tokens that a recurrent layer scans, padding to whole chunks included; 0 without such layers."""

    @classmethod
    def of(cls, batch: PackedBatch, path: str = "packed", chunk: int = 0) -> Counts:
        """Count a packed batch.

        Args:
            path: how the policy runs; in rows every sequence is padded to the longest.
            chunk: `Policy.chunk_tokens` of the model.
        """
        layout = TreeLayout(batch.segments)
        if path == "rows":
            lengths = [len(row) for row in row_paths(layout)]
            rows, longest = len(lengths), max(lengths)
            return cls(rows * longest, rows * longest, rows * longest, rows * longest**2, rows * longest**2)
        buckets = layout.buckets
        sizes = [bucket.size for bucket in buckets]
        queries = sum(rows * q for rows, q, _ in sizes)
        keys = sum(rows * k for rows, _, k in sizes)
        scanned = num_padded(batch.segments, chunk) if chunk else 0
        pairs, masks = sum(rows * q * k for rows, q, k in sizes), sum(b.mask_numbers for b in buckets)
        return cls(batch.num_tokens, queries, keys, pairs, masks, scanned)

    @classmethod
    def of_policy(cls, policy: Policy, batch: PackedBatch) -> Counts:
        """Count a packed batch as a policy runs it."""
        return cls.of(batch, policy.path, policy.chunk_tokens)


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a forward pass keeps for the backward pass, per unit of each count.

    >>> cost = ActivationCost(per_token=100.0, per_query=8.0, per_key=16.0, per_pair=0.0, per_mask=4.0, layers=2)
    >>> cost.bytes(Counts(tokens=10, queries=12, keys=20, pairs=60, masks=60))
    1656.0
    """

    per_token: float
    """All layers together, as everything here."""
    per_query: float
    per_key: float
    per_pair: float
    """The scores, where the attention kernel keeps them."""
    per_mask: float
    """One for all layers."""
    layers: int
    per_scanned: float = 0.0
    """Of recurrent layers: what the chunks of a scan keep."""

    def bytes(self, counts: Counts) -> float:
        """Return the bytes of a micro-batch of that size."""
        coefficients = (
            self.per_token,
            self.per_query,
            self.per_key,
            self.per_pair,
            self.per_mask,
            self.per_scanned,
        )
        return sum(c * n for c, n in zip(coefficients, astuple(counts), strict=True))


def measure_activations(policy: Policy, checkpointing: bool = False) -> ActivationCost:
    """Measure what autograd keeps of a forward pass of training, by the size of the micro-batch.

    A few small micro-batches of different shapes are run and the storages kept for the backward pass are counted;
    their sizes are linear in the counts of `ActivationCost`.
    """
    chunk = policy.chunk_tokens
    shapes = [(1, 6, 2, 5), (1, 14, 2, 5), (1, 6, 2, 13), (1, 6, 6, 5), (2, 9, 3, 7), (3, 12, 2, 4)]
    shapes += [(1, 40, 4, 5), (1, 48, 2, 9)]  # whose responses share a mask
    if chunk:  # scans of several chunks, which no shape above has
        shapes += [(1, 2 * chunk + 6, 2, chunk + 5), (1, chunk + 6, 3, 5)]
    counts, kept = [], []
    for prompts, prompt_tokens, samples, new_tokens in shapes:
        batch = probe_batch(prompts, prompt_tokens, samples, new_tokens)
        counts.append(astuple(Counts.of_policy(policy, batch)))
        kept.append(kept_bytes(policy, batch, checkpointing))
    solution, *_ = np.linalg.lstsq(np.array(counts, dtype=np.float64), np.array(kept, dtype=np.float64), rcond=None)
    per_token, per_query, per_key, per_pair, per_mask, per_scanned = (max(0.0, float(x)) for x in solution)
    layers = _num_layers(policy)
    return ActivationCost(per_token, per_query, per_key, per_pair, per_mask, layers, per_scanned)


def kept_bytes(policy: Policy, batch: PackedBatch, checkpointing: bool) -> int:
    """Count the bytes of the storages that a forward pass keeps for its backward pass, without the weights."""

    def forward() -> None:
        hidden_NH = run_forward(policy, batch, TreeLayout(batch.segments, policy.device))
        gather_rows(hidden_NH, batch.predictor_M.to(policy.device))

    return count_kept(policy, forward, checkpointing)


def count_kept(policy: Policy, forward: Callable[[], object], checkpointing: bool) -> int:
    """Count the bytes of the storages that some work with a policy keeps for its backward pass, without the weights."""
    # By identity, since storages on the meta device have no address; a parameter's is kept by the parameter. Each is
    # held until the end: a part of the graph that is dropped on the way would free it, and the next one might get its
    # identity and be counted as one with it.
    own = {p.untyped_storage()._cdata for p in policy.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor.detach()  # as it is, an operation that saves its own result would hold itself for ever

    was_on = bool(getattr(policy.model, "is_gradient_checkpointing", False))
    if checkpointing and not was_on:
        policy.enable_checkpointing()
    policy.checkpoint_activations(checkpointing)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            forward()
    finally:
        policy.model.eval()
        if checkpointing and not was_on:
            policy.model.gradient_checkpointing_disable()
    return sum(storage.nbytes() for storage in kept.values())


def full_length_group(prompt: Prompt, samples: int, length: int) -> Group:
    """Make a group whose completions have their full length and an advantage each; only its size matters."""
    completion = Completion((0,) * length, (0.0,) * length, "length", "")
    return Group(prompt, (completion,) * samples, tuple(1.0 if i % 2 else -1.0 for i in range(samples)))


def pack_groups(
    groups: Sequence[Group], tokens_per_microbatch: int, max_new_tokens: int, picture_tokens: int | None = None
) -> Shares:
    """Pack groups as an update packs them, those without variance too."""
    return pack(
        groups,
        normalizer="sequence_mean",
        tokens_per_microbatch=tokens_per_microbatch,
        max_new_tokens=max_new_tokens,
        include_all=True,
        picture_tokens_per_microbatch=picture_tokens,
    )


def probe_batch(prompts: int, prompt_tokens: int, samples: int, new_tokens: int) -> PackedBatch:
    """Make a small micro-batch of a given shape; prompts differ in their first token, so they share no preamble."""
    groups = [
        full_length_group(Prompt(i, "probe", "", (i, *(0,) * (prompt_tokens - 1))), samples, new_tokens)
        for i in range(prompts)
    ]
    return pack_groups(groups, 10**6, new_tokens).microbatches[0]


def run_forward(policy: Policy, batch: PackedBatch, layout: TreeLayout) -> torch.Tensor:
    """Compute the (N, H) last hidden states of a micro-batch."""
    device = policy.device
    return policy.run(lambda: policy.hidden(batch.token_ids_N.to(device), batch.position_ids_N.to(device), layout))


def _num_layers(policy: Policy) -> int:
    return int(policy.model.config.get_text_config().num_hidden_layers)
