"""Which models vLLM can sample with: those whose pictures it can be given, and whose adapters fold into the weights."""

from __future__ import annotations

from sapo.errors import ConfigError
from sapo.model.adapters import unfoldable
from sapo.model.policy import Policy
from sapo.rollout.vllm.pictures import FIELDS


def check_model(policy: Policy, *, folds: bool = True) -> None:
    """Refuse a model whose pictures vLLM cannot be given, and an adapter that it cannot.

    Args:
        folds: the adapter is folded into the weights, and not sent as itself.

    Raises:
        ConfigError: the rule, the layer and the way out.
    """
    kind = policy.model.config.model_type
    if policy.vision is not None and kind not in FIELDS:
        raise ConfigError(
            f"rollout.engine=vllm takes pictures for models of {', '.join(sorted(FIELDS))}; got {kind}; set "
            "rollout.engine=local, or train on text alone (model.vision.load=false, where the model has it)"
        )
    name = unfoldable(policy)
    if name is not None:
        rule = "that fold into the weight of a linear layer" if folds else "of linear layers"
        raise ConfigError(
            f"rollout.engine=vllm takes adapters {rule}, which those of experts and routers "
            f"{'do' if folds else 'are'} not; got one at {name}; set model.lora.targets to the attention's layers, as "
            "[q_proj,k_proj,v_proj,o_proj], or rollout.engine=local"
        )
