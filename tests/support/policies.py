"""Tiny policies of each architecture, with weights that tell a wrong key or position at once."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import character_tokenizer, tiny_model

ALPHABET = "0123456789+-*=?"

ATTENTION_ONLY = ("qwen3", "qwen3_moe", "llama", "mistral")
"""Architectures without recurrent layers, which tests/model/test_recurrent.py has in plenty."""


WINDOW = 6
"""Sliding window of the tiny mistral: shorter than nearly every sequence the tests run."""


def make_policy(architecture: str, *, dtype: torch.dtype = torch.float32, gain: float = 5.0, **options) -> Policy:
    """A tiny policy over ALPHABET whose answers depend on every token it may see.

    Fresh weights attend almost evenly and give flat logits; `gain` times larger ones tell a wrong key or position at
    once. The embeddings stay as they are: the norms undo their size.
    """
    tokenizer = character_tokenizer(ALPHABET)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    window = {"sliding_window": WINDOW} if architecture == "mistral" else {}
    model = tiny_model(architecture, len(tokenizer), seed=0, **ids, **{"hidden_size": 32, **window, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(gain)
    if dtype == torch.float64:
        compute_in_double(model)
    return prepare_policy(model.to(dtype), tokenizer)


def compute_in_double(model: nn.Module) -> None:
    """Norms, routers and grouped experts of transformers go through float32 whatever the model's dtype; not here."""

    def norm(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        value, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, value / value.sum(-1, keepdim=True), index

    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(route, module)
