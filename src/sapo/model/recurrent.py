"""Layers that carry a state from token to token, in packed forwards.

The mixers of transformers (Gated DeltaNet, Kimi's delta attention, Mamba and Mamba-2, the short convolution of LFM2)
are written over free functions of their modeling modules: `causal_conv1d_fn` and one scan. `use_states` puts others in
their place. Within a layer that was called with a packed layout these ask the layout for what comes before each token:
in training a tree of segments (state_tree.py), in decoding the rows of the engine (rollout/local/row_states.py).
Anywhere else they are the module's own, so that no layer is copied and a plain model computes as it did.

On a GPU with 16-bit weights the delta rules run on flash-linear-attention where it is installed (extra `fla`), several
sequences one after the other without padding; otherwise, and for all other scans, on transformers' torch functions.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from sapo.model.state_tree import Place, Scan, Sequences


class States(Protocol):
    """Tell the recurrent layers of a packed forward what comes before their tokens."""

    def convolve(self, place: Place, input_NC: Tensor, weight_CK: Tensor) -> Tensor:
        """Return the (N, C) causal convolution of each channel."""
        ...

    def scan(self, place: Place, inputs: Sequence[Tensor], scan: Scan, packs: bool = False) -> Tensor:
        """Return what a scan gives of every token, (N, ...)."""
        ...


@dataclass
class _Pass:
    """One layer's forward over packed tokens: its states, and how often it has asked for them."""

    states: States
    layer: int
    convolutions: int = 0
    scans: int = 0

    def convolve(self, input_NC: Tensor, weight_CK: Tensor) -> Tensor:
        self.convolutions += 1
        return self.states.convolve((self.layer, self.convolutions - 1), input_NC, weight_CK)

    def scan(self, inputs: Sequence[Tensor], scan: Scan, packs: bool = False) -> Tensor:
        self.scans += 1
        return self.states.scan((self.layer, self.scans - 1), inputs, scan, packs)


_OWN = "_sapo_own_functions"
"""Attribute of a modeling module with the functions that were exchanged, by name."""

_PASS: ContextVar[_Pass | None] = ContextVar("the layer that runs on packed tokens", default=None)


def use_states(decoder: nn.Module) -> None:
    """Let the recurrent layers of a decoder take their states from the packed layout that a forward is given.

    A layer keeps its class, parameters and names. The functions of its modeling module are exchanged once for the
    whole process.
    """
    for layer in decoder.modules():
        mixer = _mixer(layer)
        if mixer is None:
            continue
        # The layer and not its mixer: LFM2's is not handed the layout, and a layer is what checkpointing runs again.
        if getattr(vars(layer).get("forward"), "__func__", None) is not _forward:
            layer.forward = MethodType(_forward, layer)
        _exchange_functions(sys.modules[type(mixer).__module__])


def is_recurrent(decoder: nn.Module) -> bool:
    """Return whether a decoder has layers that carry a state from token to token."""
    return any(_mixer(layer) is not None for layer in decoder.modules())


def chunk_tokens(decoder: nn.Module) -> int:
    """Return the tokens that the scans of a decoder compute at once, and pad to; 0 where it has none."""
    sizes = [_chunk_size(m) for layer in decoder.modules() if (m := _mixer(layer)) is not None]
    return max(sizes, default=0)


def _chunk_size(mixer: nn.Module) -> int:
    module = sys.modules[type(mixer).__module__]
    if hasattr(mixer, "chunk_size"):
        return int(mixer.chunk_size)  # type: ignore[arg-type]
    # Asked of the module's own function: the one in its place hands the size on.
    own: dict[str, Any] = getattr(module, _OWN, vars(module))
    rules = [own[name] for name in _DELTA_RULES if name in own]
    return int(inspect.signature(rules[0]).parameters["chunk_size"].default) if rules else 1


def _mixer(layer: nn.Module) -> Any:
    """Return the child of a layer that carries a state; None without one."""
    for child in layer.children():
        convolves = any(isinstance(part, nn.Conv1d) for part in child.children())
        if hasattr(child, "layer_idx") and convolves:
            module = sys.modules.get(type(child).__module__)
            return child if hasattr(module, "causal_conv1d_fn") else None
    return None


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a layer's class, with the states of the layout it is given."""
    layout = kwargs.get("packed_layout")
    if layout is None:
        return type(self).forward(self, *args, **kwargs)
    if not hasattr(layout, "states"):
        raise ValueError(
            f"{type(self).__name__} carries a state from token to token, which a {type(layout).__name__} has not"
        )
    token = _PASS.set(_Pass(layout.states, int(_mixer(self).layer_idx)))
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        _PASS.reset(token)


def _exchange_functions(module: Any) -> None:
    if hasattr(module, _OWN):
        return
    makers: dict[str, Callable[[Any, Callable[..., Any]], Callable[..., Any]]] = {
        "causal_conv1d_fn": _convolution,
        **dict.fromkeys(_DELTA_RULES, _delta_rule),
        "mamba2_chunk_scan": _mamba2_scan,
        "mamba_selective_scan": _mamba_scan,
        **dict.fromkeys(_FUSED, _unfused),
    }
    own = {name: getattr(module, name) for name in makers if hasattr(module, name)}
    setattr(module, _OWN, own)
    for name, function in own.items():
        setattr(module, name, makers[name](module, function))


def _convolution(_: Any, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Tensor:
        current = _PASS.get()
        if current is None:
            return own(hidden_states, weight, bias, activation=activation, **options)
        output_NC = current.convolve(hidden_states[0].T, weight)
        if bias is not None:
            output_NC = output_NC + bias
        if activation is not None:
            output_NC = ACT2FN[activation](output_NC)
        return output_NC.to(hidden_states.dtype).T[None]

    return causal_conv1d_fn


_DELTA_RULES = {
    "torch_chunk_gated_delta_rule": "torch_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "recurrent_kimi_delta_attention",
}
"""The chunked function of a delta rule, and the one that takes a token at a time."""


def _delta_rule(module: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    one_by_one = getattr(module, _DELTA_RULES[own.__name__])

    def chunk_delta_rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        current = _PASS.get()
        if current is None:
            return own(query, key, value, g, beta, *args, **options)
        normalised = {"use_qk_l2norm_in_kernel": options.get("use_qk_l2norm_in_kernel", False)}
        by_kernel = _runs_by_kernel(own, query)
        functions = (own, one_by_one) if by_kernel else (inspect.unwrap(own), inspect.unwrap(one_by_one))

        def scan(rows: Sequences) -> tuple[Tensor, Tensor]:
            offsets = {} if rows.offsets is None else {"cu_seqlens": rows.offsets}
            output, last = functions[rows.is_single](
                *rows.inputs[:3],
                g=rows.inputs[3],
                beta=rows.inputs[4],
                initial_state=rows.initial,
                output_final_state=True,
                **normalised,
                **offsets,
            )
            return output, last

        return current.scan([t[0] for t in (query, key, value, g, beta)], scan, packs=by_kernel)[None], None

    return chunk_delta_rule


def _runs_by_kernel(function: Callable[..., Any], query: Tensor) -> bool:
    """Return whether a delta rule is flash-linear-attention's, found by transformers, and takes these inputs."""
    if query.device.type != "cuda" or query.element_size() > 2:  # it refuses float32
        return False
    return bool(inspect.getclosurevars(function).nonlocals.get("is_new_implementation", False))


def _mamba2_scan(_: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(own)

    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *args: Any,
        **options: Any,
    ) -> Any:
        current = _PASS.get()
        if current is None:
            return own(hidden_states, dt, A, B, C, chunk_size, *args, **options)
        # Bias, softplus and limits before the padding: a floor under dt would let padding decay the state.
        if (bias := options.get("dt_bias")) is not None:
            dt = dt + bias.to(dt.dtype)
        if options.get("dt_softplus", False):
            dt = F.softplus(dt)
        dt = torch.clamp(dt, *options.get("dt_limit", (0.0, float("inf"))))

        def scan(rows: Sequences) -> tuple[Tensor, Tensor]:
            x, dt, B, C = rows.inputs
            output, last = function(
                *(x, dt, A, B, C),
                chunk_size=1 if rows.is_single else chunk_size,
                D=options.get("D"),
                initial_states=rows.initial,
                return_final_states=True,
            )
            return output, last

        return current.scan([t[0] for t in (hidden_states, dt, B, C)], scan)[None]

    return mamba2_chunk_scan


def _mamba_scan(_: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(own)

    def mamba_selective_scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **options: Any
    ) -> Any:
        current = _PASS.get()
        if current is None:
            return own(hidden_states, dt, A, B, C, *args, **options)
        if (bias := options.get("delta_bias")) is not None:
            dt = dt + bias.to(dt.dtype)[..., None]
        if options.get("delta_softplus", False):
            dt = F.softplus(dt)

        def scan(rows: Sequences) -> tuple[Tensor, Tensor]:
            x, dt, B, C = (t.transpose(1, 2) for t in rows.inputs)
            output, last = function(x, dt, A, B, C, D=options.get("D"), return_last_state=True)
            if rows.initial is not None:  # which the function does not take: its part of the outputs is added
                decay = torch.exp(A[None, :, None, :] * dt.float().cumsum(-1)[..., None])
                kept = decay * rows.initial[:, :, None, :]
                output = output + (kept * C.transpose(1, 2)[:, None]).sum(-1).to(output.dtype)
                last = last + kept[:, :, -1]
            return output.transpose(1, 2), last

        output_NC = current.scan([t[0].T for t in (hidden_states, dt, B, C)], scan)
        if (gate := options.get("z")) is not None:
            output_NC = output_NC * F.silu(gate[0].T)
        return output_NC.T[None]

    return mamba_selective_scan


_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Kernels of a whole mixer, which are tried first: None makes their caller go step by step."""


def _unfused(_: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    def fused(*args: Any, **options: Any) -> Any:
        return own(*args, **options) if _PASS.get() is None else None

    return fused


def _says_what_helps(record: logging.LogRecord) -> bool:
    """Drop transformers' advice to install kernels: it is of the one plain forward that a policy is held against."""
    return "is falling back to its reference PyTorch implementation" not in record.getMessage()


logging.getLogger("transformers.integrations.hub_kernels").addFilter(_says_what_helps)
