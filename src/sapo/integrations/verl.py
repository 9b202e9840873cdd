"""verl with our objectives: each registered as a policy loss, `sapo_rl_NAME`, when this module is imported.

    VERL_USE_EXTERNAL_MODULES=sapo.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=sapo_rl_sapo \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean ...

The environment variable reaches every process of verl's that imports it; `model.external_lib` does too. Settings come
from verl's actor where it has them (ACTOR_SETTINGS), otherwise they are the objective's defaults; a loss with settings
of your own is `register("my_name", "maspo", sigma=2.0)` in a module that is imported the same way.

The aggregation asked for is the one that is used, over the mini-batch that verl counts; the log-ratio is bounded;
padding is not read; and the effective update ratio is measured, `actor/eur`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

try:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
except ModuleNotFoundError as error:
    if error.name != "verl":
        raise
    raise ModuleNotFoundError("verl is not installed; see https://verl.readthedocs.io", name="verl") from None

from sapo.objectives import OBJECTIVES, effective_update_ratio, gate_weight, make_objective, policy_loss

PREFIX = "sapo_rl_"
"""Before the names of our objectives, for verl has losses called sapo, gspo and so on."""

ACTOR_SETTINGS: dict[str, dict[str, Callable[[Any], float]]] = {
    **{
        name: {"eps_low": lambda actor: _clip(actor, "low"), "eps_high": lambda actor: _clip(actor, "high")}
        for name in ("grpo", "gspo", "gspo_token", "dr_grpo", "dapo", "minirl", "rloo", "luspo")
    },
    **{
        name: {"tau_pos": lambda actor: actor.tau_pos, "tau_neg": lambda actor: actor.tau_neg}
        for name in ("sapo", "sapo_seq")
    },
    "cispo": {"ratio_cap": lambda actor: 1 + _clip(actor, "high")},
    "gmpo": {"log_low": lambda actor: _clip(actor, "low"), "log_high": lambda actor: _clip(actor, "high")},
    "dppo_tv": {
        "tv_low": lambda actor: _clip(actor, "low"),
        "tv_high": lambda actor: _clip(actor, "high"),
        "ratio_cap": lambda actor: actor.clip_ratio_c,
    },
}
"""Which settings of an objective are settings of verl's actor, as verl's own losses read them."""

AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",  # times the tokens it divides by
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant_length",
}
"""verl's loss_agg_mode as a normalizer of ours."""


def register(name: str, objective: str, **hyper: Any) -> None:
    """Make an objective a policy loss of verl's under a name: its `policy_loss.loss_mode`.

    Args:
        name: free in verl's registry, or one registered here before.
        objective: a name in sapo.objectives.OBJECTIVES, or `module:Class`.
        hyper: its settings, which verl's configuration then does not change. Those left out come from it where it has
            them.

    Raises:
        ValueError: a name that verl itself uses, an unknown objective, or a wrong setting.
    """
    taken = POLICY_LOSS_REGISTRY.get(name)
    if taken is not None and taken.__module__ != __name__:
        raise ValueError(f"the name must be free in verl's registry; got {name!r}, verl's own; put a prefix before it")
    make_objective(objective, **hyper)

    @register_policy_loss(name)
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        assert config is not None, "verl hands its actor's configuration to every policy loss"
        from_actor = {k: read(config) for k, read in ACTOR_SETTINGS.get(objective, {}).items() if k not in hyper}
        settings = {**from_actor, **hyper}
        mask_BT = response_mask.bool()
        if rollout_is_weights is not None:
            advantages = _scale(objective, advantages, rollout_is_weights)
        total = _aggregate(objective, (log_prob, old_log_prob, advantages, mask_BT), loss_agg_mode, config, settings)
        return total, _metrics(objective, (log_prob, old_log_prob, advantages, mask_BT), settings)

    loss.__module__ = __name__


def _clip(actor: Any, side: str) -> float:
    """Return verl's clip_ratio_low or clip_ratio_high, or clip_ratio where it is None."""
    own = getattr(actor, f"clip_ratio_{side}")
    value: float = actor.clip_ratio if own is None else own
    return value


def _scale(objective: str, advantages: Tensor, weights: Tensor) -> Tensor:
    """Scale advantages by rollout-correction weights: f(r) A w, of which only A is ours to scale."""
    if objective == "maspo":
        raise ValueError(
            "maspo's gate reads the advantage, so rollout_is_weights cannot scale it; got both; use another"
        )
    return advantages * weights


def _aggregate(objective: str, tensors: tuple[Tensor, ...], mode: str, config: Any, settings: dict[str, Any]) -> Tensor:
    """Aggregate the loss under verl's loss_agg_mode, over the mini-batch whose counts verl gives, or this batch."""
    if mode not in AGGREGATIONS:
        known = ", ".join(AGGREGATIONS)
        raise ValueError(f"loss_agg_mode must be one of {known}; got {mode!r}; choose one of these")
    given: dict[str, Any] = dict(config.global_batch_info)
    ranks = given.get("dp_size") or 1
    mask_BT = tensors[-1]
    tokens = int(mask_BT.sum()) if mode == "token-sum" else given.get("batch_num_tokens")
    loss = policy_loss(
        objective,
        *tensors,
        normalizer=AGGREGATIONS[mode],
        num_tokens=None if tokens is None else int(tokens),
        num_sequences=given.get("global_batch_size"),
        max_length=given.get("loss_scale_factor") or mask_BT.shape[1],
        **settings,
    )
    # verl's gradients are averaged over data-parallel ranks.
    return loss * ranks * (int(mask_BT.sum()) if mode == "token-sum" else 1)


@torch.no_grad()
def _metrics(objective: str, tensors: tuple[Tensor, ...], settings: dict[str, Any]) -> dict[str, float]:
    """Return what every micro-batch can say, for verl asks each for the same keys: EUR, mean |r - 1|, -log r."""
    log_prob, old_log_prob, advantages, mask_BT = tensors
    if not bool(mask_BT.any()):
        return {}
    log_ratio_BT = log_prob - old_log_prob
    weight_BT = gate_weight(objective, log_ratio_BT, advantages, mask_BT, logp_old_BT=old_log_prob, **settings)
    log_ratio_M = log_ratio_BT[mask_BT].double()
    return {
        "actor/eur": effective_update_ratio(weight_BT[mask_BT]).item(),
        "actor/ratio_abs_dev": (log_ratio_M.clamp(-20, 20).exp() - 1).abs().mean().item(),
        "actor/ppo_kl": (-log_ratio_M).mean().item(),
    }


for _name in OBJECTIVES:
    register(f"{PREFIX}{_name}", _name)
    assert set(ACTOR_SETTINGS.get(_name, {})) <= {field.name for field in fields(OBJECTIVES[_name])}
