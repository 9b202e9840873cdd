"""The trainer of a run and the driver's side of it, from its recipe."""

from __future__ import annotations

from dataclasses import fields

from sapo.config import RunConfig, TrainConfig
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.objectives import make_objective
from sapo.run.machine import resolve_device
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
) -> Trainer:
    """Make the trainer of a policy in this process, with a fresh optimizer.

    Args:
        reference: what a KL penalty keeps close to; None for the policy with its adapter switched off.
        routers: for routing replay.
    """
    train = config.train
    optimizer = PolicyOptimizer(
        [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad],
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        grad_clip=train.grad_clip,
        name=train.optimizer,
    )
    return Trainer(policy, optimizer, settings, reference=reference, routers=routers)


def check_optimizer(config: RunConfig) -> None:
    """Refuse an optimizer that cannot be run or resumed here, or that a recipe gives settings it does not take.

    Raises:
        ConfigError: the rule, and the way out.
    """
    train = config.train
    takes = find_optimizer(train.optimizer).takes
    for option in fields(OptimizerOptions):
        key = {"eps": "adam_eps"}.get(option.name, option.name)
        value = getattr(train, key)
        if option.name not in takes and value != TrainConfig.model_fields[key].default:
            raise ConfigError(
                f"train.{key} must be left out where the optimizer does not take it; got {value} for train.optimizer="
                f"{train.optimizer}, whose __init__ has no {option.name}; leave it out, or give it that parameter"
            )
    options = OptimizerOptions(train.betas, train.adam_eps, train.weight_decay)
    prove_optimizer(train.optimizer, options, resolve_device(config.device))


def make_packer(config: RunConfig, policy: Policy) -> Packer:
    """Make the packer of a run, for a trainer that computes where the policy is."""
    return Packer(
        normalizer=config.objective.normalizer,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        max_new_tokens=config.rollout.max_new_tokens,
        device=policy.device,
        include_flat=config.objective.kl is not None,
    )
