"""Gradients of several objectives at the same weights, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sapo.model.sharding import whole
from sapo.objectives import Objective
from sapo.training.settings import TrainerSettings

Gradient = dict[int, Tensor]
"""The gradient of every master weight that has one, by its place."""


def compare_gradients(
    gradient_of: Callable[[TrainerSettings], Gradient], settings: TrainerSettings, objectives: Mapping[str, Objective]
) -> dict[str, float]:
    """Compare the gradient of each objective with that of the settings' own; see `Trainers.gradients`.

    Args:
        gradient_of: computes the gradient of a mini-batch under given settings.
    """
    settings = replace(settings, kl=None, entropy=False)
    used = gradient_of(settings)
    figures: dict[str, float] = {}
    for label, objective in objectives.items():
        # Handed on and not named here: the last one is gone before the next is made.
        compared = _compare(used, gradient_of(replace(settings, objective=objective)))
        figures |= {f"{label}/{name}": value for name, value in compared.items()}
    return figures


def _compare(used: Gradient, other: Gradient) -> dict[str, float]:
    """Return the cosine of two gradients and the second's norm over the first's; nothing if one is 0 or not finite."""
    used_norm, norm = _norm(used), _norm(other)
    product = used_norm * norm
    if not 0 < product < float("inf"):
        return {}
    inner = sum(whole(torch.sum(used[i] * other[i], dtype=torch.float64)).item() for i in used if i in other)
    return {"cosine": inner / product, "norm_ratio": norm / used_norm}


def _norm(gradient: Gradient) -> float:
    return sum(float(whole(g.double().square().sum())) for g in gradient.values()) ** 0.5
