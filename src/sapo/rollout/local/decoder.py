"""The forward of common decoders, without gradient, as few and as large operations as there can be.

Built from a policy's modules at the weights they have now: query, key and value weights joined, gate and up weights
joined, packed for the processor (cpu/packed.py) or for oneDNN, sums into the residual in place. In float32 a LoRA
adapter's product is folded into the weights. `refusal` says why a policy is not exactly one of the blocks below; it
then runs through transformers (`Policy.hidden`), as does one with adapters of another kind, hooks or replaced forwards,
which would be passed by here.

    x += o(attention(rope(norm(q)), rope(norm(k)), v));  x += down(silu(gate) * up)  or a mixture of such experts

for Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and the decoders of Qwen3-VL and Qwen3-VL-MoE of transformers; prompts with
pictures go through the policy, and the tokens drawn for them through this. What differs from transformers is rounding
alone: sums in another order, the compiled kernels' own e^x (cpu/native.py), and in bfloat16 fewer roundings of the
rotary embedding. `tests/rollout/test_decoder.py` holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapo.model.adapters import folded_weight, folds, is_adapted
from sapo.model.attention import Layout
from sapo.model.blocks import computes_as_its_class
from sapo.model.policy import Policy
from sapo.rollout.local import mixture, packing
from sapo.rollout.local.cpu.native import Kernels, kernels
from sapo.rollout.local.cpu.packed import (
    OneTokenEach,
    PackedBlocks,
    PackedLinear,
    Panels,
    panel_bytes,
)
from sapo.rollout.local.mixture import Experts, gated
from sapo.rollout.local.packing import Linear, Packing, arrange_weights, choose_packing, join_layers

OnExperts = Callable[[int, Tensor], None]
"""Called with a layer and the experts its router chose, (N, experts per token)."""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "Qwen3VLText", "Qwen3VLMoeText")


# Rotary embeddings whose frequencies do not depend on the length of the sequence.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class Decoder(Protocol):
    """Declare what the rollout engine needs of a model."""

    def hidden(self, token_ids_N: Tensor, position_ids_N: Tensor, layout: Layout) -> Tensor:
        """Compute (N, H) last hidden states of packed tokens; see `Policy.hidden`."""
        ...

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Compute (N, V) logits in float32 of last hidden states, valid until the next call and free to overwrite."""
        ...


def decoder_of(policy: Policy, calls: int, on_experts: OnExperts | None = None) -> Decoder:
    """Return the fastest forward of a policy at its weights, for about so many calls; the policy itself at worst.

    Args:
        on_experts: called with (router, experts) for each layer that has a router, in order from 0, and its (N, k)
            choices; not by the policy itself, whose modules can be listened to.
    """
    return FastDecoder(policy, calls, on_experts) if refusal(policy) is None else policy


def refusal(policy: Policy) -> str | None:
    """Return why a policy cannot take the fast path; None when it can."""
    model, decoder = policy.model, policy.decoder
    rotary: Any = getattr(decoder, "rotary_emb", None)
    family = type(decoder).__name__.removesuffix("Model")
    module = type(decoder).__module__
    if family not in FAMILIES or not module.startswith("transformers.models."):
        return f"{type(decoder).__name__} is none of {', '.join(FAMILIES)}"
    if policy.adapter is not None and policy.dtype != torch.float32:
        return f"it has an adapter, which is folded into weights of float32 and not of {policy.dtype}"
    if policy.logit_softcap is not None:
        return "its logits are capped"
    config: Any = decoder.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if rotary.rope_type not in FIXED_ROPE:
        return f"its rotary embedding is {rotary.rope_type}"
    if policy.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weights are {policy.dtype}"
    known = {f"{family}{part}" for part in _PARTS}
    adapted: list[str] = []
    seen = model.named_modules()
    if policy.vision is not None:  # the vision tower is run as it is
        seen = iter([*decoder.named_modules(), ("the output embedding", model.get_output_embeddings())])
    for name, part in seen:
        kind = type(part)
        if name.startswith(tuple(adapted)) and kind is not nn.Linear:
            continue
        ours = kind.__module__ == module and (kind.__name__ in known or kind is type(model))
        if is_adapted(part) and folds(part):
            adapted.append(f"{name}.")
            ours = True
        if not (ours or kind in (nn.Linear, nn.Embedding, nn.ModuleList) or isinstance(part, type(_SILU))):
            return f"{name} is a {kind.__name__}"
        if not computes_as_its_class(part) or part._forward_hooks or part._forward_pre_hooks:
            return f"{name or 'the model'} has a hook or a forward of its own"
    if any(p.dtype != policy.dtype or p.device != policy.device for p in model.parameters()):
        return "its weights differ in precision or device"
    return None


def copied_bytes(policy: Policy, calls: int, device: torch.device | None = None) -> int:
    """Return the bytes of weights that `decoder_of` holds a second time, joined or packed, while it is in use.

    Args:
        device: where a policy on the meta device would be; None for where it is.
    """
    if refusal(policy) is not None:
        return 0
    pack = choose_packing(policy, calls, device)
    decoder: Any = policy.decoder
    parts: list[tuple[Tensor, ...]] = [(policy.head_weight,)]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts.append((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        parts.append((attention.o_proj.weight,))
        if not hasattr(mlp, "experts"):
            parts += [(mlp.gate_proj.weight, mlp.up_proj.weight), (mlp.down_proj.weight,)]
        elif isinstance(pack, Panels):
            parts += [(w,) for w in (mlp.gate.weight, *mlp.experts.gate_up_proj, *mlp.experts.down_proj)]
    if isinstance(pack, Panels):
        return sum(panel_bytes(weights) for weights in parts)
    folded = _folded(decoder)
    copied = [
        w
        for weights in parts
        for w in weights
        if len(weights) > 1 or (pack and w.numel() >= packing.PACKED_ELEMENTS) or id(w) in folded
    ]
    return sum(w.nbytes for w in copied)


def _folded(decoder: Any) -> set[int]:
    """Return the identities of the weights whose adapters are folded into copies."""
    return {id(m.weight) for m in decoder.modules() if is_adapted(m) and not m.disable_adapters}


_PARTS = (
    *("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding"),
    *("SparseMoeBlock", "Experts", "TopKRouter"),
)


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


_SILU = _silu()


class FastDecoder:
    """A decoder of one of FAMILIES at the weights it had when this was made.

    Args:
        policy: one that `refusal` finds nothing against.
        calls: how often it will be called, about; packing pays from PACKED_CALLS on.
        on_experts: see `decoder_of`.
    """

    def __init__(self, policy: Policy, calls: int, on_experts: OnExperts | None = None) -> None:
        decoder: Any = policy.decoder
        native = kernels(policy.device, policy.dtype)
        pack = choose_packing(policy, calls)
        self.embedding = decoder.embed_tokens.weight.detach()
        self.scale = policy.logit_scale
        routers = [layer for layer in decoder.layers if hasattr(layer.mlp, "experts")]
        on_chosen = {
            layer: None if on_experts is None else partial(on_experts, number) for number, layer in enumerate(routers)
        }
        self.layers = [_Layer(layer, pack, native, on_chosen.get(layer)) for layer in decoder.layers]
        self.norm = _Norm(decoder.norm, native)
        self.head = arrange_weights([policy.head_weight], [policy.head_bias], pack)
        self.rotary = decoder.rotary_emb
        self.blocks: PackedBlocks | None = None
        """Makes decode steps in place of the layers."""
        self._folded = _folded(decoder)
        if isinstance(pack, Panels):
            self.blocks = PackedBlocks(self.layers, self.embedding.shape[1], pack.native, policy.dtype)

    @property
    def refreshable(self) -> bool:
        """Return whether its copies of weights are plain tensors, which `refresh` can write to."""
        return self.blocks is None and not any(getattr(x, "packed", False) for x in _parts([self.layers, self.head]))

    def folds_as(self, policy: Policy) -> bool:
        """Return whether adapters are folded as when this was made: others' weights are the policy's own tensors."""
        return self._folded == _folded(policy.decoder)

    def refresh(self, policy: Policy) -> None:
        """Bring its copies of weights to what the policy's are now, at the addresses they have, a layer at a time.

        A CUDA graph repeats what it read when it was captured; weights that are no copies are read where they are.
        """
        assert self.folds_as(policy), "adapters were switched since: what was no copy would have to become one"
        decoder: Any = policy.decoder
        native = kernels(policy.device, policy.dtype)
        for mine, layer in zip(self.layers, decoder.layers, strict=True):
            _copy_weights(mine, _Layer(layer, False, native, None))
        _copy_weights(self.norm, _Norm(decoder.norm, native))
        _copy_weights(self.head, arrange_weights([policy.head_weight], [policy.head_bias], False))
        _copy_weights([self.embedding], [decoder.embed_tokens.weight.detach()])

    def hidden(self, token_ids_N: Tensor, position_ids_N: Tensor, layout: Layout, static: bool = False) -> Tensor:
        """See `Decoder.hidden`.

        Args:
            static: no shape may depend on a number, as a CUDA graph asks of a decode step.
        """
        hidden_NH = F.embedding(token_ids_N, self.embedding)
        angles = self._rotation(position_ids_N)
        if self.blocks is not None and isinstance(layout, OneTokenEach):
            self.blocks.add(hidden_NH, angles, layout)
        else:
            for layer in self.layers:
                layer.add(hidden_NH, angles, layout, static)
        hidden_NH = self.norm(hidden_NH)
        return hidden_NH if self.scale == 1.0 else hidden_NH.mul_(self.scale)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """See `Decoder.logits`."""
        return self.head.widened(hidden_NH)

    def _rotation(self, position_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cos (N, D) and sin (N, D), with the sign of the half it multiplies, as the model does."""
        # Drawn tokens have one position on all three axes, which transformers 5.17 does not spread by itself.
        position_ids = position_ids_N[None]
        if hasattr(self.rotary, "mrope_section"):
            position_ids = position_ids.expand(3, 1, -1)
        cos_1ND, sin_1ND = self.rotary(self.embedding, position_ids)
        half = sin_1ND.shape[-1] // 2
        sin_1ND[..., :half].neg_()
        return cos_1ND[0], sin_1ND[0]


def _parts(of: Any) -> Iterator[Any]:
    """Yield what an arrangement of weights is made of, tensors and layers, always in the same order."""
    if isinstance(of, list | tuple):
        inside = list(of)
    elif isinstance(of, partial):
        inside = list(of.keywords.values())
    elif type(of).__module__ in (__name__, packing.__name__, mixture.__name__):
        yield of
        inside = list(vars(of).values())
    else:
        if isinstance(of, Tensor):
            yield of
        return
    for part in inside:
        yield from _parts(part)


def _copy_weights(mine: Any, theirs: Any) -> None:
    """Copy weights into those of an equal arrangement, where they are not the same memory."""
    pairs = [
        (a, b)
        for a, b in zip(_parts(mine), _parts(theirs), strict=True)
        if isinstance(a, Tensor) and a.data_ptr() != b.data_ptr()
    ]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


class _Layer:
    """One block; `add` adds what attention and MLP give to the residual stream in place."""

    def __init__(
        self, layer: Any, pack: Packing, native: Kernels | None, on_chosen: Callable[[Tensor], None] | None
    ) -> None:
        attention = layer.self_attn
        self.number = int(attention.layer_idx)
        self.size: int = attention.head_dim
        self.scaling: float = attention.scaling
        config = attention.config
        # Qwen's layers have their own, Mistral's take it from the config, Llama's know of none.
        windowed = config if type(attention).__name__ == "MistralAttention" else attention
        self.window: int | None = getattr(windowed, "sliding_window", None)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.input_norm, self.mlp_norm = (
            _Norm(norm, native) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.qkv = join_layers([attention.q_proj, attention.k_proj, attention.v_proj], pack)
        self.out = join_layers([attention.o_proj], pack)
        self.turn = _Turn(attention, self.heads, self.kv_heads, native)
        experts = hasattr(layer.mlp, "experts")
        self.mlp: Any = Experts(layer.mlp, pack, native, on_chosen) if experts else _MLP(layer.mlp, pack, native)

    def add(self, hidden_NH: Tensor, angles: tuple[Tensor, Tensor], layout: Layout, static: bool) -> None:
        """Add what the block computes to the residual stream, in place.

        Args:
            angles: cosines and sines of the rotary embedding, of each token.
            static: the shapes are those of every step, as a captured graph needs them.
        """
        turned = self.heads + self.kv_heads
        qkv_NHD = self.qkv(self.input_norm(hidden_NH)).view(len(hidden_NH), -1, self.size)
        both_NHD = self.turn(qkv_NHD[:, :turned], *angles)
        mixed_NHD = layout.attend(
            self.number,
            both_NHD[:, : self.heads],
            both_NHD[:, self.heads :],
            qkv_NHD[:, turned:],
            self.scaling,
            self.window,
        )
        _add(self.out, hidden_NH, mixed_NHD.reshape(len(hidden_NH), -1))
        if isinstance(self.mlp, _MLP):
            _add(self.mlp.down, hidden_NH, self.mlp.gated(self.mlp_norm(hidden_NH)))
        else:
            hidden_NH += self.mlp(self.mlp_norm(hidden_NH), static)


def _add(layer: Linear | PackedLinear, total_NH: Tensor, input_NI: Tensor) -> None:
    """Add a layer's outputs to the residual stream, in place."""
    if isinstance(layer, Linear):
        layer.add_to(total_NH, input_NI)
    else:
        total_NH += layer(input_NI)


class _Norm:
    """RMSNorm, in float32 and rounded before the weight multiplies, as in transformers."""

    def __init__(self, norm: Any, native: Kernels | None) -> None:
        self.weight = norm.weight.detach()
        self.epsilon: float = norm.variance_epsilon
        self.native = native

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.norm(hidden_NH, self.weight, self.epsilon)
        return F.rms_norm(hidden_NH, self.weight.shape, None, self.epsilon).mul_(self.weight)


class _Turn:
    """Rotary embedding of queries and keys, in Qwen3 after a norm of each head."""

    def __init__(self, attention: Any, heads: int, kv_heads: int, native: Kernels | None) -> None:
        self.weight: Tensor | None = None
        self.epsilon = 0.0
        self.native = native
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm, attention.k_norm
            assert query.variance_epsilon == key.variance_epsilon, "queries and keys are normed alike"
            self.weight = torch.cat([query.weight.expand(heads, -1), key.weight.expand(kv_heads, -1)]).detach()
            self.epsilon = query.variance_epsilon

    def __call__(self, both_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        if self.native is not None:
            self.native.rotate(both_NHD, cos_ND, sin_ND, self.weight, self.epsilon)
            return both_NHD
        if self.weight is not None:
            both_NHD = F.rms_norm(both_NHD, both_NHD.shape[-1:], None, self.epsilon).mul_(self.weight)
        return _rotate(both_NHD, cos_ND[:, None], sin_ND[:, None])


class _MLP:
    """down(silu(gate) * up), gate and up in one product."""

    def __init__(self, mlp: Any, pack: Packing, native: Kernels | None) -> None:
        self.gated: Callable[[Tensor], Tensor]
        if isinstance(pack, Panels):
            gate, up = mlp.gate_proj, mlp.up_proj
            self.gated = pack.gated((folded_weight(gate), folded_weight(up)), (gate.bias, up.bias))
        else:
            gate_up = join_layers([mlp.gate_proj, mlp.up_proj], pack)
            self.gated = partial(_gated_product, gate_up=gate_up, native=native)
        self.down = join_layers([mlp.down_proj], pack)

    def __call__(self, hidden_NH: Tensor, static: bool) -> Tensor:
        return self.down(self.gated(hidden_NH))


def _gated_product(hidden_NH: Tensor, gate_up: Linear | PackedLinear, native: Kernels | None) -> Tensor:
    return gated(gate_up(hidden_NH), native)


def _rotate(both_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Compute x cos + (-x2, x1) sin; the sign of the first half is in `sin_N1D`."""
    turned = both_NHD * cos_N1D
    half = both_NHD.shape[-1] // 2
    turned[..., :half].addcmul_(both_NHD[..., half:], sin_N1D[..., :half])
    turned[..., half:].addcmul_(both_NHD[..., :half], sin_N1D[..., half:])
    return turned
