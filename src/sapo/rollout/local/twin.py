"""A second policy over the modules of the first: for an engine that samples with other weights than the trainer's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sapo.model.policy import Policy


class Twin:
    """A copy of a policy's modules whose weights are exchanged, and never the policy's.

    At rest its parameters are the policy's own tensors, so that it takes no memory but for its modules.

    Args:
        policy: in the form it is to be copied in, its adapter included.
    """

    def __init__(self, policy: Policy) -> None:
        self._original = policy
        # A parameter that stands in the memo is not copied; a tied one stands there once, and stays tied.
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in policy.model.parameters()}
        memo[id(policy.tokenizer)] = policy.tokenizer
        self.policy: Policy = copy.deepcopy(policy, memo)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let these tensors be the weights, by the names of the policy's."""
        for name, parameter in self.policy.model.named_parameters():
            parameter.data = weights[name]

    def release(self) -> None:
        """Let go of the weights that were put there."""
        self.put(dict(self._original.weights()))
