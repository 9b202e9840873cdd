"""The independent implementation that tests compare with: a model with every forward its own again."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def plain_copy(model: nn.Module) -> Any:
    """A copy with transformers' own attention, products, norms and MLPs."""
    twin: Any = copy.deepcopy(model)
    for module in twin.modules():
        forward = module.__dict__.get("forward")
        if forward is not None and forward.__func__.__module__.startswith("sapo."):
            del module.forward
    twin.set_attn_implementation("sdpa")
    return twin
