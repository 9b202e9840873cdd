"""Which models vLLM can sample with: those of text, whose adapters fold into the weights it is given."""

from __future__ import annotations

from sapo.errors import ConfigError
from sapo.model.adapters import unfoldable
from sapo.model.policy import Policy
from sapo.rollout.vllm.pictures import _FIELDS as PICTURED


def check_model(policy: Policy, *, folds: bool = True) -> None:
    """Refuse a model that sees pictures, and an adapter that vLLM cannot be given.

    Args:
        folds: the adapter is folded into the weights, and not sent as itself.

    Raises:
        ConfigError: the rule, the layer and the way out.
    """
    if policy.vision is not None and policy.vision.family.config.model_type not in PICTURED:
        raise ConfigError(
            f"rollout.engine=vllm takes models of text so far; got {type(policy.model).__name__}, which has a "
            "vision tower; set rollout.engine=local"
        )
    name = unfoldable(policy)
    if name is not None:
        rule = "that fold into the weight of a linear layer" if folds else "of linear layers"
        raise ConfigError(
            f"rollout.engine=vllm takes adapters {rule}, which those of experts and routers "
            f"{'do' if folds else 'are'} not; got one at {name}; set model.lora.targets to the attention's layers, as "
            "[q_proj,k_proj,v_proj,o_proj], or rollout.engine=local"
        )
