"""The shape of a model for a plan: its parameters, what its passes keep and what its tokens cost.

The model is built on the meta device, where tensors have shapes and no memory, as a rank builds it (model/skeleton.py).
What a forward pass keeps is counted there by the code that counts it in a dry run (activations.py). Blocks that have
the same parameters are taken to keep the same, so that two of them are run and not all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers.integrations.moe as experts
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from sapo.config import RunConfig
from sapo.data import Segment
from sapo.errors import ModelError
from sapo.model.adapters import add_adapter
from sapo.model.attention import ATTENTION_NAME, TreeLayout, attend_by
from sapo.model.blocks import use_proven_forms
from sapo.model.known import model_config
from sapo.model.loading import own_attention_of
from sapo.model.mixtures import num_experts
from sapo.model.policy import DTYPES, Policy
from sapo.model.sharding import blocks
from sapo.rollout.local.decoder import copied_bytes
from sapo.training.optimizer_check import state_bytes
from sapo.utils.hashing import seed_for
from sapo.utils.text import first_line
from sapo.workflows.activations import ActivationCost, measure_activations
from sapo.workflows.coldstart import coldstart_config
from sapo.workflows.memory import CacheCost, measure_cache


@dataclass(frozen=True)
class Parameter:
    """A parameter as sharding sees it.

    >>> Parameter(rows=128, width=10, itemsize=2, trained=True, active=80.0).slice_elements(256)  # 128 ranks have none
    10
    """

    rows: int
    width: int
    """Elements of a row."""
    itemsize: int
    trained: bool
    active: float
    """Elements that a token is multiplied with: of a matrix all of them, of experts the share that a token goes to."""

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return self.rows * self.width

    def slice_elements(self, ranks: int) -> int:
        """Return the elements of the rank that keeps the most: whole rows, as FSDP2 cuts along the first dimension."""
        return -(-self.rows // ranks) * self.width


@dataclass(frozen=True)
class ModelShape:
    """What a plan knows of a model."""

    name: str
    blocks: tuple[tuple[Parameter, ...], ...]
    """Parameters of each block of the decoder, which is gathered by itself."""
    root: tuple[Parameter, ...]
    """Embedding, final norm and output embedding, a tied one once: gathered together for a whole pass."""
    itemsize: int
    """Bytes of an element in the precision of a pass."""
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    """Channels of an attention head."""
    tied: bool
    head_trained: bool
    expert_share: float
    """Experts of a token over all experts; 1 for a dense model."""
    expert_elements: int
    """Elements of all experts together."""
    kept: ActivationCost
    """What a forward pass keeps."""
    checkpointed: ActivationCost
    """Likewise with activation checkpointing."""
    arranged_bytes: int
    """Weights that the local engine holds a second time while it draws."""
    cache: CacheCost
    """What the engine keeps of a sequence."""
    path: str
    """How the model runs: on packed tokens, or in rows."""
    chunk_tokens: int
    """Tokens that recurrent layers scan at once; 0 without such layers."""
    state_bytes_per_element: float
    """Bytes that the optimizer keeps for an element."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Return all parameters."""
        return (*self.root, *(p for block in self.blocks for p in block))

    @property
    def elements(self) -> int:
        """Return the number of elements of all parameters."""
        return sum(p.elements for p in self.parameters)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights as the unsharded policy keeps them."""
        return sum(p.elements * p.itemsize for p in self.parameters)

    @property
    def active(self) -> float:
        """Return the elements of the blocks that a token is multiplied with."""
        return sum(p.active for block in self.blocks for p in block)

    @property
    def head_elements(self) -> int:
        """Return the elements of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def largest_block(self) -> tuple[Parameter, ...]:
        """Return the block with the most elements."""
        return max(self.blocks, key=lambda block: sum(p.elements for p in block))

    @property
    def largest_parameter(self) -> int:
        """Return the elements of the largest parameter."""
        return max(p.elements for p in self.parameters)


def shape_of(config: RunConfig) -> ModelShape:
    """Return the shape of a recipe's model, its adapter included.

    Raises:
        ModelError: its dimensions are not known without a download, or it cannot be built.
    """
    settings = config.model
    described = model_config(settings.path) if settings.path is not None else coldstart_config(_coldstart(config))
    return _shape(settings.path or "cold start", described, config)


def _coldstart(config: RunConfig) -> Any:
    assert config.model.coldstart is not None
    return config.model.coldstart


def _shape(name: str, described: Any, config: RunConfig) -> ModelShape:
    policy = build_on_meta(described, config)
    text, layers = described.get_text_config(), blocks(policy)
    of_block = {id(p): i for i, block in enumerate(layers) for p in block.parameters()}
    share = _expert_share(text)
    groups: list[list[Parameter]] = [[] for _ in layers]
    root: list[Parameter] = []
    embedding, head = policy.model.get_input_embeddings().weight, policy.head_weight
    for parameter_name, p in policy.model.named_parameters():
        is_expert = ".experts." in parameter_name and p.dim() == 3
        active = p.numel() * (share if is_expert else 1.0) if p.dim() > 1 and p is not embedding else 0.0
        width = p.numel() // p.shape[0] if p.dim() else 1
        found = Parameter(p.shape[0] if p.dim() else 1, width, p.element_size(), p.requires_grad, active)
        (groups[of_block[id(p)]] if id(p) in of_block else root).append(found)
    probe = [torch.empty(64, 64, device="meta")]
    device = torch.device("cpu" if config.device == "cpu" else "meta")
    arranged = copied_bytes(policy, config.rollout.max_new_tokens, device)
    heads = getattr(text, "num_attention_heads", 1)  # models of states alone have none
    return ModelShape(
        name=name,
        blocks=tuple(map(tuple, groups)),
        root=tuple(root),
        itemsize=policy.dtype.itemsize,
        vocabulary=head.shape[0],
        hidden=head.shape[1],
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tied=embedding is head,
        head_trained=head.requires_grad,
        expert_share=share,
        expert_elements=sum(p.numel() for n, p in policy.model.named_parameters() if ".experts." in n and p.dim() == 3),
        kept=_activations(described, config, policy, False),
        checkpointed=_activations(described, config, policy, True),
        arranged_bytes=arranged,
        cache=_cache(policy),
        path=policy.path,
        chunk_tokens=policy.chunk_tokens,
        state_bytes_per_element=state_bytes(config.train.optimizer, probe) / probe[0].numel(),
    )


def build_on_meta(described: Any, config: RunConfig, layers: int | None = None) -> Policy:
    """Build the policy of a recipe on the meta device, without a tokenizer; norms and MLPs in closed form.

    Args:
        layers: build so many only.
    """
    if getattr(described, "vision_config", None) is not None and type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"a plan counts decoders of text; got {config.model.path or 'model.coldstart'} of the family "
            f"{described.model_type}, which has a vision part; `sapo train RECIPE --dry-run` loads the model, and "
            "estimates the memory of one process"
        )
    described = copy.deepcopy(described)
    if layers is not None:
        described.get_text_config().num_hidden_layers = layers
        if getattr(described.get_text_config(), "layer_types", None):
            described.get_text_config().layer_types = described.get_text_config().layer_types[:layers]
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                described, dtype=DTYPES[config.model.dtype], attn_implementation=ATTENTION_NAME
            )
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"the model of {config.model.path or 'model.coldstart'} cannot be built: {first_line(error)}"
            ) from error
        policy = Policy(model, tokenizer=None)
        if (lora := config.model.lora) is not None:
            seed = seed_for(config.seed, "adapter")
            add_adapter(policy, **lora.model_dump(), seed=seed)
    use_proven_forms(policy.model, _provable(policy.model))
    _run_in_rows_if_not_packed(policy)
    return policy


def _run_in_rows_if_not_packed(policy: Policy) -> None:
    """Let a policy run in rows whose layers do not take packed tokens at all; nothing can be proven without weights."""
    layout = TreeLayout((Segment(0, 4, -1), Segment(4, 2, 0)), "meta")
    ids_N = torch.zeros(6, dtype=torch.int64, device="meta")
    with torch.no_grad(), suppress(Exception):  # which attention asked the layout before counts, and nothing else
        policy.hidden(ids_N, ids_N, layout)
    if not layout.was_asked:
        policy.path = "rows"
        attend_by(policy.model, own_attention_of(policy.model))


def _provable(model: nn.Module) -> dict[str, str]:
    """Return the modules that would be proven to compute in closed form: there is nothing here to prove it on.

    They are the ones that `use_closed_forms` tries, where the activation is the one it has.
    """
    forms: dict[str, str] = {}
    for name, module in model.named_modules():
        own = {n for n, _ in module.named_parameters(recurse=False)}
        if own == {"weight"} and hasattr(module, "variance_epsilon"):
            forms[name] = "norm"
        elif all(type(getattr(module, part, None)) is nn.Linear for part in ("gate_proj", "up_proj", "down_proj")):
            down: Any = module.down_proj
            if down.bias is None and "silu" in type(getattr(module, "act_fn", None)).__name__.lower():
                forms[name] = "mlp"
    return forms


def _activations(described: Any, config: RunConfig, policy: Policy, checkpointing: bool) -> ActivationCost:
    layers = blocks(policy)
    alike = {tuple((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in layers}
    with _countable_experts(policy):
        if len(alike) > 1 or len(layers) < 3:
            return measure_activations(policy, checkpointing)
        one, two = (measure_activations(build_on_meta(described, config, n), checkpointing) for n in (1, 2))
    more = len(layers) - 2

    def scaled(first: float, second: float) -> float:
        return second + more * (second - first)

    return ActivationCost(
        scaled(one.per_token, two.per_token),
        scaled(one.per_query, two.per_query),
        scaled(one.per_key, two.per_key),
        scaled(one.per_pair, two.per_pair),
        two.per_mask,  # one for all layers
        len(layers),
        scaled(one.per_scanned, two.per_scanned),
    )


def _cache(policy: Policy) -> CacheCost:
    if policy.path == "rows":  # transformers' own cache, of which the meta device says nothing
        text = policy.model.config.get_text_config()
        if not hasattr(text, "num_attention_heads"):  # states alone, which do not grow with the sequence
            return CacheCost(0, 0)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return CacheCost(2 * text.num_hidden_layers * heads * width, 0)
    with _countable_experts(policy):
        return measure_cache(policy)


@contextmanager
def _countable_experts(policy: Policy) -> Iterator[None]:
    """Let products of groups be counted: on the meta device torch has them in bfloat16 only, as on a GPU."""
    if not hasattr(experts, "_grouped_mm"):
        with nullcontext():
            yield
        return
    own = experts._grouped_mm

    def counted(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        result: Tensor = _GroupedProduct.apply(input, weight)
        return result

    experts._grouped_mm = counted
    try:
        yield
    finally:
        experts._grouped_mm = own


class _GroupedProduct(torch.autograd.Function):
    """What a product of groups keeps and returns, without its values."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(rows.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a pass on the meta device has no gradients")


def _expert_share(text: Any) -> float:
    chosen = getattr(text, "num_experts_per_tok", None)
    total = num_experts(text.to_dict())
    return float(chosen) / float(total) if chosen and total else 1.0
