"""The true gradients: d loss / d parameters of a mini-batch under several objectives at the same weights.

Nothing of the run is changed: weights, optimiser and the trainer's objective are what they were, no random number is
drawn, and the gradients are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sapo.errors import Interrupted
from sapo.objectives import Objective
from sapo.training.batch import MiniBatch
from sapo.training.trainer import Trainer


def true_gradient_figures(
    trainer: Trainer,
    minibatch: MiniBatch,
    objectives: Mapping[str, Objective],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Cosine and norm of each objective's gradient against that of the trainer's own, as true_gradient/LABEL/...

    One backward pass for each objective and one for the trainer's, and the memory of one gradient more. The weights of
    the loss are those of the mini-batch for all; a KL penalty is left out.

    Returns:
        Nothing for a mini-batch without a gradient; `cosine` and `norm_ratio` of an objective are left out where one of
        the two gradients is 0 or not finite.

    Raises:
        Interrupted: when `should_stop` says so between micro-batches.
    """
    if not minibatch.microbatches:
        return {}
    figures: dict[str, float] = {}
    with _undisturbed(trainer):
        used = _gradient(trainer, minibatch, trainer.objective, should_stop)
        for label, objective in objectives.items():
            # Handed on and not named here: the last one is gone before the next is made.
            compared = _compared(used, _gradient(trainer, minibatch, objective, should_stop))
            figures |= {f"true_gradient/{label}/{name}": value for name, value in compared.items()}
    return figures


@contextmanager
def _undisturbed(trainer: Trainer) -> Iterator[None]:
    """The trainer without its penalty and its entropy, and afterwards as it was."""
    kept = trainer.objective, trainer.kl, trainer.entropy
    trainer.kl, trainer.entropy = None, False
    trainer.policy.model.train(trainer._checkpointing)
    try:
        yield
    finally:
        trainer.objective, trainer.kl, trainer.entropy = kept
        trainer.optimizer.zero_grad()
        trainer.policy.model.eval()


def _gradient(
    trainer: Trainer, minibatch: MiniBatch, objective: Objective, should_stop: Callable[[], bool]
) -> dict[int, Tensor]:
    """The gradient of every master weight that has one, by its place."""
    trainer.objective = objective
    trainer.optimizer.zero_grad()
    for batch in minibatch.microbatches:
        if should_stop():
            raise Interrupted
        with trainer.replaying(batch):
            trainer._forward(batch)[0].loss.backward()
        trainer.optimizer.collect_gradients()
    return {i: m.grad for i, m in enumerate(trainer.optimizer.masters) if m.grad is not None}


def _compared(used: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> dict[str, float]:
    """Cosine of two gradients and the second's norm over the first's; nothing where one is 0 or not finite."""
    used_norm, norm = _norm(used), _norm(other)
    product = used_norm * norm
    if not 0 < product < float("inf"):
        return {}
    inner = sum(torch.sum(used[i] * other[i], dtype=torch.float64).item() for i in used if i in other)
    return {"cosine": inner / product, "norm_ratio": norm / used_norm}


def _norm(gradient: Mapping[int, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
