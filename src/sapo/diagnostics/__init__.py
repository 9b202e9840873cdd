"""Measure each update and each rollout batch, and find in the figures that a run goes wrong.

The figures have the names of metrics.jsonl, which docs/metrics.md defines.

Only what was measured is reported: a figure that does not exist (the entropy when it was not asked for, any figure of
an update that was skipped) is left out, never written as 0.
"""

from sapo.diagnostics.counterfactual import counterfactual_figures
from sapo.diagnostics.distributions import distribution_record
from sapo.diagnostics.panels import task_panels
from sapo.diagnostics.rollout import minibatch_metrics, rollout_metrics
from sapo.diagnostics.sequences import SequenceFigures, sequence_figures
from sapo.diagnostics.tokens import GatedTokens, gated_tokens
from sapo.diagnostics.update import (
    figures_of_update,
    gate_metrics,
    step_update_metrics,
    task_figures,
    task_update_metrics,
    update_metrics,
)
from sapo.diagnostics.warnings import Health, Warning, observe, replay_warnings

__all__ = [
    "GatedTokens",
    "Health",
    "SequenceFigures",
    "Warning",
    "counterfactual_figures",
    "distribution_record",
    "figures_of_update",
    "gate_metrics",
    "gated_tokens",
    "minibatch_metrics",
    "observe",
    "replay_warnings",
    "rollout_metrics",
    "sequence_figures",
    "step_update_metrics",
    "task_figures",
    "task_panels",
    "task_update_metrics",
    "update_metrics",
]
