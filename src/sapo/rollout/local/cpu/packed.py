"""Products on weights packed for this processor, and a decode step's blocks in one call of packed.c.

A few dozen rows times a weight matrix is what decoding consists of. Here a weight lies in panels of 32 outputs, in the
order in which the product reads it; the next panel is fetched while one is multiplied; and what follows a product
(bias, rounding, silu(gate) up, the sum into the residual stream) is done while its outputs are in the nearest cache.
Between products nothing goes back to Python. `decoder.FastDecoder` takes this where the model and the processor `suit`,
and oneDNN and its own operations elsewhere; both compute the same but for rounding. Here a row's numbers do not depend
on the rows around it, to the bit.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sapo.rollout.local.cpu.native import LANES, Kernels

PANEL = 32
"""Outputs of a panel; the same in packed.c."""

STORED, ADDED, GATED, WIDENED = range(4)
"""Codes of what is done with outputs; the same in packed.c."""

DRAWN = 1024
"""Tokens of a partial sum of a draw; the same in packed.c."""

# Weights are packed anew for every rollout, many into one piece of memory.
CHUNK_BYTES = 2**25


@dataclass(frozen=True)
class Places:
    """Addresses and lengths of the keys and values that a decode step reads; local/places.py fills them in.

    Two rows of one prompt of 9 tokens, each with room for 64 tokens of its own:

    >>> two = np.zeros(2, dtype=np.int64)
    >>> addresses = np.zeros((1, 2), dtype=np.int64)
    >>> Places(two, two, two, two + 9, two, addresses[:, None], addresses, 16, 0, addresses, 64, 73).rows
    2
    """

    order_R: np.ndarray
    """Rows by their prompts."""
    pool_R: np.ndarray
    slot_R: np.ndarray
    """Slot of each row's prompt in its pool."""
    prompt_R: np.ndarray
    """Tokens of each row's prompt, the preamble left out."""
    place_R: np.ndarray
    """Place of each row's own tokens."""
    bases_LP3: np.ndarray
    """For each layer and pool, keys, values and the tokens it has room for."""
    preamble_L2: np.ndarray
    """Keys and values of the preamble, for each layer."""
    preamble_stride: int
    preamble: int
    """Tokens the preamble has room for, and has."""
    own_L2: np.ndarray
    """Keys and values of the rows' own tokens, for each layer."""
    length: int
    """Tokens a row has room for."""
    longest: int
    """The most keys that a row will ever look at."""

    @property
    def rows(self) -> int:
        """Return the number of rows that decode together."""
        return len(self.order_R)


@runtime_checkable
class OneTokenEach(Protocol):
    """A layout of one new token for each row, whose own tokens can be kept as packed.c has them."""

    length_R: np.ndarray
    """Tokens each row has drawn and stored before."""

    def places(self, layers: int, kv_heads: int, size: int, dtype: torch.dtype) -> Places:
        """Return where such a model's keys and values are."""
        ...


def suits(decoder: Any, native: Kernels | None, dtype: torch.dtype) -> bool:
    """Return whether packed.c computes a decoder that `refusal` finds nothing against, on this processor."""
    config = decoder.config
    return (
        native is not None
        and dtype in native.packed_precisions
        and decoder.layers[0].self_attn.head_dim % LANES == 0
        and config.hidden_size % 2 == 0
        and all(_inner(layer.mlp) % LANES == 0 for layer in decoder.layers)
    )


def _inner(mlp: Any) -> int:
    """Return the inputs of the projection back to the hidden size, of each expert if there are such."""
    experts = getattr(mlp, "experts", None)
    return int(mlp.down_proj.in_features if experts is None else experts.down_proj.shape[-1])


def panel_bytes(weights: Sequence[Tensor]) -> int:
    """Return the bytes of weights (M, K) with the same input, packed one behind the other."""
    outputs = sum(len(w) for w in weights)
    return -(-outputs // PANEL) * PANEL * weights[0].shape[1] * weights[0].element_size()


def fresh_memory(num_bytes: int) -> Tensor:
    """Allocate (num_bytes,) uint8 zeros in pages of 2 MiB where there are any: fewer faults and look-ups.

    The memory is private. Shared memory, Python's default, lies in a file of the system: a page for which there is no
    room ends the process by SIGBUS, and a fork writes into its parent's.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def draw(native: Kernels, logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw (R,) tokens of softmax(logits / temperature), with their log-probabilities.

    Args:
        logits_RV: float32.
        uniform_R: in (0, 1); the draw inverts the cumulative distribution, as local/sampling.py does.
        temperature: above 0.
    """
    rows, vocabulary = logits_RV.shape
    logits_RV, uniform_R = logits_RV.contiguous(), uniform_R.double().contiguous()
    tokens_R, logprobs_R = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    sums = torch.empty(rows, -(-vocabulary // DRAWN), dtype=torch.float64)
    factor = np.array([temperature], dtype=np.float32)
    results = (t.data_ptr() for t in (uniform_R, sums, tokens_R, logprobs_R))
    where = (logits_RV.data_ptr(), rows, vocabulary, factor.ctypes.data)
    native.packed("draw", *where, *results, torch.get_num_threads())
    return tokens_R, logprobs_R


class Panels:
    """Packs weights, and holds them.

    Args:
        native: of a processor whose `packed_precisions` have this dtype.
        dtype: of the weights.
    """

    def __init__(self, native: Kernels, dtype: torch.dtype) -> None:
        self.native = native
        self.dtype = dtype
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> PackedLinear:
        """Compute x W' + b of weights (M, K) with the same input: their outputs, one behind the other."""
        rows = np.concatenate([_addresses(w) for w in weights])
        held = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        return PackedLinear(self, self._packed(weights, rows), held, len(rows), weights[0].shape[1], STORED)

    def gated(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> PackedLinear:
        """Compute silu(gate) up of gate's weight and up's, (M, K) each."""
        rows = np.stack([_addresses(w).reshape(-1, LANES) for w in weights], axis=1).ravel()
        held = [b.detach().view(-1, LANES) for b in biases if b is not None]
        bias = torch.stack(held, dim=1).flatten() if held else None
        return PackedLinear(self, self._packed(weights, rows), bias, len(rows), weights[0].shape[1], GATED)

    def _packed(self, weights: Sequence[Tensor], rows: np.ndarray) -> Tensor:
        packed = self._take(panel_bytes(weights))
        words = weights[0].shape[1] * weights[0].element_size() // 4
        self.native.packed("pack", rows.ctypes.data, len(rows), words, packed.data_ptr())
        return packed

    def _take(self, num_bytes: int) -> Tensor:
        if self._used + num_bytes > len(self._chunk):
            size = max(CHUNK_BYTES, num_bytes)
            self._chunk, self._used = fresh_memory(size), 0
        self._used += num_bytes
        return self._chunk[self._used - num_bytes : self._used]


class PackedLinear:
    """A weight in panels; `packing.Linear` computes the same.

    Args:
        weight: the panels.
        bias: (outputs,) or None.
        outputs, inputs: of the weight.
        mode: STORED, or GATED for panels of 16 gates and 16 ups.
    """

    def __init__(
        self, panels: Panels, weight: Tensor, bias: Tensor | None, outputs: int, inputs: int, mode: int
    ) -> None:
        self.native, self.dtype = panels.native, panels.dtype
        self.weight = weight
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.nn.functional.pad(bias.detach().float(), (0, -outputs % PANEL))
        self.outputs, self.inputs, self.mode = outputs, inputs, mode
        self._widened = torch.empty(0, outputs)

    @property
    def addresses(self) -> tuple[int, int]:
        """Return the addresses of weight and bias, which may be 0."""
        return self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()

    def __call__(self, input_NI: Tensor) -> Tensor:
        width = self.outputs // 2 if self.mode == GATED else self.outputs
        return self._multiply(input_NI, input_NI.new_empty(len(input_NI), width), self.mode)

    def widened(self, input_NI: Tensor) -> Tensor:
        """Return the outputs in float32, rounded to the weight's dtype before; valid until the next call."""
        if len(self._widened) < len(input_NI):  # memory of that size would be given back and zeroed again at each step
            self._widened = torch.empty(len(input_NI), self.outputs)
        return self._multiply(input_NI, self._widened[: len(input_NI)], WIDENED)

    def _multiply(self, input_NI: Tensor, output: Tensor, mode: int) -> Tensor:
        input_NI = input_NI.contiguous()
        narrow = self.dtype == torch.bfloat16
        words = self.inputs // 2 if narrow else self.inputs
        where = (input_NI.data_ptr(), *self.addresses, output.data_ptr())
        sizes = (len(input_NI), words, self.outputs, self.inputs, output.shape[1])
        self.native.packed("multiply", narrow, torch.get_num_threads(), *where, mode, *sizes)
        return output


class PackedExperts:
    """The router and the experts of a layer in panels.

    Args:
        panels: what packs them.
        router_EH: its weight.
        gate_up_EXH, down_EHI: of all experts, X = 2 I.
    """

    def __init__(self, panels: Panels, router_EH: Tensor, gate_up_EXH: Tensor, down_EHI: Tensor) -> None:
        self.router = panels.linear([router_EH], [None])
        self.gated = [panels.gated(gate_up_XH.chunk(2), (None, None)) for gate_up_XH in gate_up_EXH]
        self.down = [panels.linear([down_HI], [None]) for down_HI in down_EHI]
        each = zip(self.gated, self.down, strict=True)
        self.table = np.array([[gated.addresses[0], down.addresses[0]] for gated, down in each])
        """Addresses of each expert's two weights."""


# The structures of packed.c, field by field; all fields are 64 bits wide.
_LAYER = (
    *("norm", "qkv", "qkv_bias", "turn", "out", "out_bias", "mlp_norm", "router", "experts", "gate_up"),
    *("gate_up_bias", "down", "down_bias", "inner", "window", "bases", "preamble_keys", "preamble_values", "keys"),
    "values",
)
_LAYER_TYPE = np.dtype([(name, np.int64) for name in _LAYER])


class PackedBlocks:
    """All blocks of a decoder that `suits`, for decode steps.

    Args:
        layers: of `decoder.FastDecoder`, packed.
        hidden_size: of the residual stream.
        native: the compiled kernels.
        dtype: of the model.
    """

    def __init__(self, layers: Sequence[Any], hidden_size: int, native: Kernels, dtype: torch.dtype) -> None:
        first = layers[0]
        self.native, self.dtype = native, dtype
        self.kv_heads, self.size = first.kv_heads, first.size
        self._layers = layers  # holds what the table has the addresses of
        self._table = np.array([_fields(layer) for layer in layers], dtype=_LAYER_TYPE)
        self._numbers = np.array([first.scaling, first.input_norm.epsilon, first.turn.epsilon], dtype=np.float32)
        mixtures = [layer.mlp for layer in layers if hasattr(layer.mlp, "packed")]
        self._on_chosen = [mixture.on_chosen for mixture in mixtures]
        sizes = (dtype == torch.bfloat16, len(layers), hidden_size, first.heads, first.kv_heads, first.size)
        mixed = (0, 0, 0)
        if mixtures:
            mixed = (len(mixtures[0].packed.table), mixtures[0].top, mixtures[0].renormalise)
        self.top = mixed[1]
        self._model = np.array([*sizes, *mixed, self._table.ctypes.data, self._numbers.ctypes.data], dtype=np.int64)
        self._places: Places | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def add(self, hidden_RH: Tensor, angles: tuple[Tensor, Tensor], layout: OneTokenEach) -> None:
        """Add to the residual stream what all blocks give, in place; store keys and values, pass chosen experts on.

        Args:
            hidden_RH: embeddings of one new token for each row.
            angles: cos and sin of `decoder.FastDecoder`, (R, D).
        """
        places = layout.places(len(self._table), self.kv_heads, self.size, self.dtype)
        cos_RD, sin_RD = (t.contiguous() for t in angles)
        own_R = np.ascontiguousarray(layout.length_R, dtype=np.int64)
        of_row = (places.order_R, places.pool_R, places.slot_R, places.prompt_R, places.place_R)
        hooks = [hook for hook in self._on_chosen if hook is not None]
        chosen_lRX = torch.empty(len(hooks), places.rows, self.top, dtype=torch.int64)
        batch = np.array(
            [
                *(places.rows, torch.get_num_threads()),
                *(t.data_ptr() for t in (hidden_RH, cos_RD, sin_RD)),
                *(a.ctypes.data for a in (own_R, *of_row)),
                *(places.preamble, places.preamble_stride, places.length, places.longest),
                *(chosen_lRX.data_ptr() if hooks else 0, 0),
            ],
            dtype=np.int64,
        )
        where = (self._model.ctypes.data, batch.ctypes.data)
        if places is not self._places:
            self._enter(places)
        room = self.native.packed("room", *where)
        assert room is not None
        if len(self._scratch) < room:
            self._scratch = torch.empty(room, dtype=torch.uint8)
        batch[-1] = self._scratch.data_ptr()
        self.native.packed("step", *where)
        for hook, chosen_RX in zip(hooks, chosen_lRX, strict=True):
            hook(chosen_RX)

    def _enter(self, places: Places) -> None:
        """Write down where the keys of these rows are."""
        self._places = places  # holds the arrays
        self._table["bases"] = [bases.ctypes.data for bases in places.bases_LP3]
        self._table["preamble_keys"], self._table["preamble_values"] = places.preamble_L2.T
        self._table["keys"], self._table["values"] = places.own_L2.T


def _fields(layer: Any) -> tuple[int, ...]:
    turn = 0 if layer.turn.weight is None else layer.turn.weight.data_ptr()
    norms = [norm.weight.data_ptr() for norm in (layer.input_norm, layer.mlp_norm)]
    attention = (norms[0], *layer.qkv.addresses, turn, *layer.out.addresses)
    experts: PackedExperts | None = getattr(layer.mlp, "packed", None)
    if experts is None:
        mlp = (0, 0, *layer.mlp.gated.addresses, *layer.mlp.down.addresses, layer.mlp.down.inputs)
    else:
        router, table = experts.router.addresses[0], experts.table.ctypes.data
        mlp = (router, table, 0, 0, 0, 0, experts.down[0].inputs)
    return (*attention, norms[1], *mlp, layer.window or 0, 0, 0, 0, 0, 0)


def _addresses(weight_MK: Tensor) -> np.ndarray:
    """Return the address of each row."""
    rows, width = weight_MK.shape
    assert weight_MK.stride() == (width, 1), "packed.c reads weights as they lie"
    return weight_MK.data_ptr() + np.arange(rows, dtype=np.int64) * width * weight_MK.element_size()
