"""Measure the updates of a run as its recipe asks: figures of each, and of some also distributions, counterfactual
gates and true gradients.

Nothing measured here enters the training: a run without it writes the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group
from sapo.diagnostics import (
    counterfactual_figures,
    distribution_record,
    figures_of_update,
    gated_tokens,
    minibatch_metrics,
    sequence_figures,
    task_figures,
)
from sapo.objectives import TAU_NEG, TAU_POS, Objective, make_objective
from sapo.training.ranks import Shares, Trainers
from sapo.training.update_result import UpdateResult


@dataclass(frozen=True)
class Measured:
    """What was measured of one update.

    >>> Measured({"loss": 0.1}).distribution is None
    True
    """

    figures: dict[str, float]
    """For its line of metrics.jsonl."""
    distribution: dict[str, Any] | None = None
    """For a line of kind "distribution"; None where none is due or no token carried a gradient."""


class Diagnosis:
    """Measures the updates of a run.

    Args:
        config: of the run; `diagnostics`, `objective` and `tasks` are read.
        objective: the one in use.
    """

    def __init__(self, config: RunConfig, objective: Objective) -> None:
        self.settings = config.diagnostics
        self.objectives = {c.key: make_objective(c.name, **c.hyperparameters) for c in self.settings.counterfactuals}
        # Temperatures of the sequence gate: the objective's where it has them, the paper's otherwise.
        self.temperatures = {"tau_pos": TAU_POS, "tau_neg": TAU_NEG}
        self.temperatures |= {name: getattr(objective, name) for name in self.temperatures if hasattr(objective, name)}
        self.several_tasks = len(config.tasks) > 1

    def before(
        self, step: int, trainers: Trainers, shares: Shares, should_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Measure what needs the weights that an update starts from: the true gradients of other objectives.

        Args:
            step: counted from 1, as metrics.jsonl does.

        Raises:
            Interrupted: when `should_stop` says so.
        """
        if not _due(step, self.settings.true_gradient_every):
            return {}
        figures = trainers.gradients(shares, self.objectives, should_stop)
        return {f"true_gradient/{name}": value for name, value in figures.items()}

    def after(self, step: int, result: UpdateResult, groups: Sequence[Group]) -> Measured:
        """Measure an update of these groups from its result."""
        figures = minibatch_metrics(groups)
        if result.skipped:
            return Measured(figures)
        tokens = gated_tokens(result)
        sequences = sequence_figures(tokens, **self.temperatures) if len(tokens) else None
        figures |= figures_of_update(result, tokens, sequences)
        if self.several_tasks:
            figures |= task_figures(tokens, [g.prompt.task for g in groups for _ in g.completions], sequences)
        if _due(step, self.settings.counterfactuals_every):
            figures |= counterfactual_figures(tokens, self.objectives)
        if sequences is None or not _due(step, self.settings.distributions_every):
            return Measured(figures)
        return Measured(figures, distribution_record(tokens, sequences))


def _due(step: int, every: int) -> bool:
    return every > 0 and (step == 1 or step % every == 0)
