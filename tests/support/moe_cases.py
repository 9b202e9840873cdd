"""Tiny mixtures of experts of each family whose routers can be replayed, and the same forward with experts by hand."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer

TOKENIZER = character_tokenizer("0123456789+-*%=;#")
EXPERTS, PER_TOKEN = 6, 2
LAYERS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "max_position_embeddings": 128,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
}
# Family, its options, and whether the weights of a token's experts are made to add up to 1 (its published config).
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, True),
    "qwen3_moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False}, False),
    "qwen3_moe, one layer dense": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, True),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}, False),
    "mixtral": ("mixtral", {"sliding_window": None}, True),
    "olmoe": ("olmoe", {"norm_topk_prob": False}, False),
}

# Class of a router -> the model type whose config makes one.
ROUTER_MODELS = {
    "Qwen2MoeTopKRouter": "qwen2_moe",
    "Qwen3MoeTopKRouter": "qwen3_moe",
    "Qwen3VLMoeTextTopKRouter": "qwen3_vl_moe_text",
    "Qwen3NextTopKRouter": "qwen3_next",
    "Qwen3_5MoeTopKRouter": "qwen3_5_moe_text",
    "MixtralTopKRouter": "mixtral",
    "OlmoeTopKRouter": "olmoe",
    "FlexOlmoTopKRouter": "flex_olmo",
    "GptOssTopKRouter": "gpt_oss",
    "GraniteMoeTopKRouter": "granitemoe",
    "GraniteMoeSharedTopKRouter": "granitemoeshared",
    "GraniteMoeHybridTopKRouter": "granitemoehybrid",
    "GraniteMoeSWATopKRouter": "granitemoe_swa",
    "DeepseekV3TopkRouter": "deepseek_v3",
    "Dots1TopkRouter": "dots1",
    "ExaoneMoeTopkRouter": "exaone_moe",
    "Glm4MoeTopkRouter": "glm4_moe",
    "Glm4MoeLiteTopkRouter": "glm4_moe_lite",
    "KimiLinearTopkRouter": "kimi_linear",
    "MiMoV2FlashTopkRouter": "mimo_v2_flash",
    "NemotronHTopkRouter": "nemotron_h",
    "SolarOpenTopkRouter": "solar_open",
    "MiniMaxM2TopKRouter": "minimax_m2",
    "Lfm2MoeTopKRouter": "lfm2_moe",
}


def make_router(name: str) -> Any:
    """A router of a class of transformers, far from undecided, its scale and its bias none that change nothing."""
    config = AutoConfig.for_model(
        ROUTER_MODELS[name],
        hidden_size=16,
        num_experts_per_tok=PER_TOKEN,
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        **dict.fromkeys(("n_group", "topk_group"), 1),
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        mamba_n_heads=4,  # of the hybrids; the default does not fit the width
    )
    folder = ROUTER_MODELS[name].removesuffix("_text")
    router: Any = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return router


def make_moe(family: str = "qwen3_moe", seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """An untrained policy whose routers are far from undecided."""
    name, options, _ = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **options}))
    model.set_experts_implementation("eager")  # torch's grouped product has no float64, and rounds by the batch
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in parameter_name:
                parameter.mul_(5)
    return prepare_policy(model.to(dtype), TOKENIZER)


def perturb(policy: Policy, scale: float = 0.3, seed: int = 1) -> None:
    """Move every weight, so that many tokens would go elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(scale * parameter.abs().mean() * noise)


def mixture_layers(model: Any) -> list[nn.Module]:
    """The blocks that have a router."""
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")]


class ByHand:
    """transformers' own model on one sequence at a time, each token sent to given experts by plain loops.

    Shares nothing with what is tested: no hook, no gather, no packing, no router module.
    """

    def __init__(self, policy: Policy, family: str) -> None:
        self.model = copy.deepcopy(policy.model)
        self.model.set_attn_implementation("eager")
        self.normalised = FAMILIES[family][2]
        self.experts: Sequence[Sequence[Sequence[int]]] = ()
        for layer, block in enumerate(mixture_layers(self.model)):
            block.forward = lambda hidden, block=block, layer=layer: self._block(block, layer, hidden)

    def _block(self, block: Any, layer: int, hidden_1TH: Tensor) -> Tensor:
        tokens = list(hidden_1TH[0])
        assert len(tokens) == len(self.experts), "one list of experts a token"
        return torch.stack(
            [self._token(block, x, chosen[layer]) for x, chosen in zip(tokens, self.experts, strict=True)]
        )[None]

    def _token(self, block: Any, x: Tensor, chosen: Sequence[int]) -> Tensor:
        score = (block.gate.weight @ x).exp()
        share = [score[e] / score.sum() for e in chosen]
        total = sum(share) if self.normalised else 1.0
        output = torch.zeros_like(x)
        for weight, e in zip(share, chosen, strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ x).chunk(2)
            output = output + weight / total * (block.experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
        if hasattr(block, "shared_expert"):
            gate, up = block.shared_expert.gate_proj(x), block.shared_expert.up_proj(x)
            shared = block.shared_expert.down_proj(gate * torch.sigmoid(gate) * up)
            output = output + torch.sigmoid(block.shared_expert_gate(x)) * shared
        return output

    def logprobs(self, token_ids: Sequence[int], experts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """(T - 1,) log-probability of each token but the first; `experts` by token of the T - 1 inputs, and layer."""
        self.experts = experts
        ids = torch.tensor([list(token_ids)])
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        return torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
