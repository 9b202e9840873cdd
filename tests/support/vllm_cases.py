"""What the tests of the engine `vllm` share: a mark, and tiny policies whose heads its CPU build has kernels for."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sapo.model.policy import Policy
from support.policies import make_policy

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
)

SHAPE = {"hidden_size": 64, "heads": 2, "kv_heads": 1}
"""Heads of 32 channels, the smallest it takes."""


def wide_policy(architecture: str, **options) -> Policy:
    return make_policy(architecture, **{**SHAPE, **options})


@torch.no_grad()
def disturb(policy: Policy, seed: int = 0, share: float = 0.1) -> None:
    """Change every parameter, by a share of its own spread: what updates do, and more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        spread = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 1.0
        parameter.add_(share * spread * torch.randn(parameter.shape, generator=generator))
