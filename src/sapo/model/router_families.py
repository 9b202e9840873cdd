"""Families of routers: the weights that a router gives the experts of a token, computed again for experts given.

A router of transformers returns logits, the weights of the chosen experts and which they are. Replay keeps its logits,
which carry the gradient, and needs the weights of other experts by the same operations: with the experts that the
router chose itself they are its own, bit for bit (tests/model/test_routing.py runs every class here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WeightsOf = Callable[[Tensor, Tensor], Tensor]
"""Map (N, E) logits and (N, k) experts to the (N, k) weights of these experts."""


@dataclass(frozen=True)
class RouterFamily:
    """Describe how a class of routers weighs experts, and in which order it returns its three tensors."""

    name: str
    """Name of the models, as users know them."""
    weights: Callable[[Any], WeightsOf]
    """Make the function of weights from a router, whose settings it reads once."""
    order: tuple[int, int, int] = (0, 1, 2)
    """Places of logits, weights and experts in what the router returns."""


def _softmax_of_all(normalised: Callable[[Any], bool]) -> Callable[[Any], WeightsOf]:
    """Take the softmax over all experts in float32; a token's weights may then be made to add up to 1."""

    def of(router: Any) -> WeightsOf:
        adds_up = normalised(router)

        def weights(logits_NE: Tensor, experts_Nk: Tensor) -> Tensor:
            probability_NE = torch.nn.functional.softmax(logits_NE, dtype=torch.float32, dim=-1)
            weights_Nk = probability_NE.gather(1, experts_Nk)
            return weights_Nk / weights_Nk.sum(dim=-1, keepdim=True) if adds_up else weights_Nk

        return weights

    return of


def _softmax_of_chosen(_: Any) -> WeightsOf:
    """Take the softmax over a token's experts alone, in the precision of the logits."""
    return lambda logits_NE, experts_Nk: torch.softmax(logits_NE.gather(1, experts_Nk), dim=-1)


def _sigmoid(epsilon: float, widened: bool = False) -> Callable[[Any], WeightsOf]:
    """Take each expert's sigmoid; a token's weights may be divided by their sum, and are scaled.

    Args:
        epsilon: added to the sum.
        widened: computed in float32 whatever the logits are.
    """

    def of(router: Any) -> WeightsOf:
        adds_up = bool(getattr(router, "norm_topk_prob", True))
        scale = getattr(router, "routed_scaling_factor", getattr(router, "router_scaling_factor", 1.0))

        def weights(logits_NE: Tensor, experts_Nk: Tensor) -> Tensor:
            weights_Nk = (logits_NE.float() if widened else logits_NE).sigmoid().gather(1, experts_Nk)
            if adds_up:
                weights_Nk = weights_Nk / (weights_Nk.sum(dim=-1, keepdim=True) + epsilon)
            return weights_Nk * scale

        return weights

    return of


_BY_FLAG, _ALWAYS = _softmax_of_all(lambda router: router.norm_topk_prob), _softmax_of_all(lambda _: True)
_DEEPSEEK = _sigmoid(1e-20)
_EXPERTS_FIRST = (2, 1, 0)

ROUTERS: dict[str, RouterFamily] = {
    "Qwen2MoeTopKRouter": RouterFamily("Qwen2-MoE", _BY_FLAG),
    "Qwen3MoeTopKRouter": RouterFamily("Qwen3-MoE", _BY_FLAG),
    "Qwen3VLMoeTextTopKRouter": RouterFamily("Qwen3-VL-MoE", _ALWAYS),
    "Qwen3NextTopKRouter": RouterFamily("Qwen3-Next", _BY_FLAG),
    "Qwen3_5MoeTopKRouter": RouterFamily("Qwen3.5-MoE", _ALWAYS),
    "MixtralTopKRouter": RouterFamily("Mixtral", _ALWAYS),
    "OlmoeTopKRouter": RouterFamily("OLMoE", _BY_FLAG),
    "FlexOlmoTopKRouter": RouterFamily("FlexOlmo", _BY_FLAG),
    "GptOssTopKRouter": RouterFamily("gpt-oss", _softmax_of_chosen),
    "GraniteMoeTopKRouter": RouterFamily("Granite-MoE", _softmax_of_chosen, _EXPERTS_FIRST),
    "GraniteMoeSharedTopKRouter": RouterFamily("Granite-MoE shared", _softmax_of_chosen, _EXPERTS_FIRST),
    "GraniteMoeHybridTopKRouter": RouterFamily("Granite hybrid", _softmax_of_chosen, _EXPERTS_FIRST),
    "GraniteMoeSWATopKRouter": RouterFamily("Granite-MoE-SWA", _softmax_of_chosen),
    "DeepseekV3TopkRouter": RouterFamily("DeepSeek-V3", _DEEPSEEK),
    "Dots1TopkRouter": RouterFamily("dots.llm1", _DEEPSEEK),
    "ExaoneMoeTopkRouter": RouterFamily("EXAONE-MoE", _DEEPSEEK),
    "Glm4MoeTopkRouter": RouterFamily("GLM-4.5", _DEEPSEEK),
    "Glm4MoeLiteTopkRouter": RouterFamily("GLM-4.7-Flash", _DEEPSEEK),
    "KimiLinearTopkRouter": RouterFamily("Kimi-Linear", _DEEPSEEK),
    "MiMoV2FlashTopkRouter": RouterFamily("MiMo-V2-Flash", _DEEPSEEK),
    "NemotronHTopkRouter": RouterFamily("Nemotron-H", _DEEPSEEK),
    "SolarOpenTopkRouter": RouterFamily("Solar Open", _DEEPSEEK),
    "MiniMaxM2TopKRouter": RouterFamily("MiniMax-M2", _sigmoid(0.0, widened=True)),
    "Lfm2MoeTopKRouter": RouterFamily("LFM2-MoE", _sigmoid(1e-6)),
}
"""Class of the router -> its family."""


def router_family(module: torch.nn.Module) -> RouterFamily | None:
    """Return the family of a router, peft's own classes around one included; None for any other module."""
    return next((ROUTERS[c.__name__] for c in type(module).__mro__ if c.__name__ in ROUTERS), None)
