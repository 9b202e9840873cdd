"""What one batch says: measured figures of an update and of a rollout batch, under flat names for metrics.jsonl.

Only what was measured is reported: a figure that does not exist (the entropy when it was not asked for, any figure of
an update that was skipped) is left out, never written as 0.
"""

from sapo.diagnostics.panels import task_panels
from sapo.diagnostics.rollout import rollout_metrics
from sapo.diagnostics.update import gate_metrics, step_update_metrics, task_update_metrics, update_metrics

__all__ = [
    "gate_metrics",
    "rollout_metrics",
    "step_update_metrics",
    "task_panels",
    "task_update_metrics",
    "update_metrics",
]
