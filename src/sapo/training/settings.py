"""What a trainer is told once, before its first update."""

from __future__ import annotations

from dataclasses import dataclass

from sapo.objectives import TIS, KLPenalty, Objective


@dataclass(frozen=True)
class TrainerSettings:
    """How a trainer turns packed batches into a loss. How groups are packed is the driver's matter: see `Packer`.

    >>> from sapo.objectives import make_objective
    >>> TrainerSettings(make_objective("sapo"), temperature=0.8).kl is None
    True
    """

    objective: Objective
    """Gives each token its value and its slope; see `sapo.objectives.make_objective`."""
    temperature: float
    """Sampling temperature: the policy in the loss is the one that was sampled."""
    kl: KLPenalty | None = None
    """Penalty for leaving the reference policy, whose log-probabilities the batches then carry."""
    tis: TIS | None = None
    """Correction of the policy term for a sampler that is not the policy; the batches then carry log pi_old beside the
    sampler's own. A KL penalty is not weighted by it."""
    entropy: bool = True
    """Measure the entropy of the policy at each token."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
