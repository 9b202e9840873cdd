"""The trainer of a run and the driver's side of it, from its recipe."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sapo.config import RunConfig, TrainConfig
from sapo.errors import ConfigError
from sapo.model.context import ContextGroup
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.model.sharding import allocate, shard
from sapo.objectives import make_objective
from sapo.run.machine import resolve_device
from sapo.training.collective import Collective
from sapo.training.optimizer import OptimizerOptions, PolicyOptimizer, find_optimizer
from sapo.training.optimizer_check import prove_optimizer
from sapo.training.packer import Packer
from sapo.training.settings import TrainerSettings
from sapo.training.trainer import Trainer


def trainer_settings(config: RunConfig) -> TrainerSettings:
    """Return what a recipe tells its trainer."""
    objective = config.objective
    return TrainerSettings(
        objective=make_objective(objective.name, **objective.hyperparameters),
        temperature=config.rollout.temperature,
        kl=None if objective.kl is None else objective.kl.penalty,
        tis=None if objective.tis is None else objective.tis.weights,
        entropy=config.train.entropy,
        activation_checkpointing=config.train.activation_checkpointing,
    )


def make_trainer(
    config: RunConfig,
    settings: TrainerSettings,
    policy: Policy,
    reference: Policy | None = None,
    routers: Routers | None = None,
    ranks: Collective | None = None,
    context: ContextGroup | None = None,
) -> Trainer:
    """Make the trainer of a policy in this process, with a fresh optimizer.

    Args:
        reference: what a KL penalty keeps close to; None for the policy with its adapter switched off.
        routers: for routing replay.
        ranks: the training group that the policy is sharded over.
        context: the ranks among them that share each micro-batch.
    """
    train = config.train
    optimizer = PolicyOptimizer(
        [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad],
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
        name=train.optimizer,
        scaled=_scaled(config, policy),
        rounded=policy.sharded is not None and not {*policy.sharded.values()} <= {torch.float32, torch.float64},
    )
    return Trainer(policy, optimizer, settings, reference=reference, routers=routers, ranks=ranks, context=context)


def _scaled(config: RunConfig, policy: Policy) -> dict[str, float]:
    """Return the factors of the learning rate by parameter, where it is not that of all."""
    scale = config.model.vision.learning_rate_scale
    if policy.vision is None or scale == 1:
        return {}
    return {name: scale for part in ("merger", "tower") for name, _ in policy.vision.parameters(part)}


def make_rank(config: RunConfig, policy: Policy, reference: Policy | None, ranks: Collective) -> Trainer:
    """Make the trainer of one rank; the policies, which are alike on every rank, are sharded in place.

    Policies on the meta device get memory for this rank's slices, and values from `receive_weights`.
    """
    device, replicas = torch.device(config.device).type, config.train.replicas
    if replicas == 1:
        mesh = init_device_mesh(device, (ranks.size,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, ranks.size // replicas)
        mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    for sharded in (policy, reference):
        if sharded is not None:
            empty = sharded.device.type == "meta"
            shard(sharded, mesh)
            if empty:
                allocate(sharded, config.device)
    routers = Routers(policy) if config.model.routing_replay else None
    context = context_group(ranks, config.train.context_parallel)
    return make_trainer(config, trainer_settings(config), policy, reference, routers, ranks, context)


def context_group(ranks: Collective, size: int) -> ContextGroup | None:
    """Make the groups of so many neighbouring ranks, and return this rank's; None for ranks by themselves.

    A collective: every rank makes every group.
    """
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks.size, size)]
    return ContextGroup(ranks.rank % size, size, groups[ranks.rank // size])


def check_optimizer(config: RunConfig) -> None:
    """Refuse an optimizer that cannot be run or resumed here, or that a recipe gives settings it does not take.

    Raises:
        ConfigError: the rule, and the way out.
    """
    train = config.train
    check_sliceable(config)
    takes = find_optimizer(train.optimizer).takes
    for option in fields(OptimizerOptions):
        key = {"eps": "adam_eps"}.get(option.name, option.name)
        value = getattr(train, key)
        if option.name not in takes and value != TrainConfig.model_fields[key].default:
            raise ConfigError(
                f"train.optimizer={train.optimizer} takes no {option.name}; got train.{key}={value}; leave train.{key} "
                f"out, or add {option.name} to its __init__"
            )
    options = OptimizerOptions(train.betas, train.adam_eps, train.weight_decay)
    prove_optimizer(train.optimizer, options, resolve_device(config.device))


def check_sliceable(config: RunConfig) -> None:
    """Refuse an optimizer whose state cannot be sliced over the ranks of a recipe.

    Raises:
        ConfigError: the rule, and the way out.
    """
    train = config.train
    if train.ranks > 1 and train.optimizer == "adamw_8bit":
        raise ConfigError(
            f"train.optimizer=adamw_8bit needs train.ranks=1, since its blocks of 256 elements would be cut by the "
            f"slices of the ranks; got {train.ranks} ranks; use train.optimizer=adamw"
        )


def make_packer(config: RunConfig, policy: Policy) -> Packer:
    """Make the packer of a run, for a trainer that computes where the policy is, or for the ranks of a group."""
    ranks = config.train.ranks
    return Packer(
        normalizer=config.objective.normalizer,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        max_new_tokens=config.rollout.max_new_tokens,
        device=policy.device if ranks == 1 else "cpu",
        include_flat=config.objective.kl is not None,
        ranks=ranks // config.train.context_parallel if ranks > 1 else 1,
        picture_tokens_per_microbatch=config.train.picture_tokens_per_microbatch,
    )
