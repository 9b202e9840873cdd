"""Comparison: objectives x learning rates x seeds, from one cold start, on the same prompts, with the same budget.

`load_comparison` reads what is to be compared, `compare` makes the runs side by side and sets their results beside
each other. docs/comparing.md says how figures are computed and what they can show.
"""

from sapo.workflows.comparing.comparison import ComparedRuns, compare
from sapo.workflows.comparing.config import load_comparison
from sapo.workflows.comparing.outcomes import RunOutcome
from sapo.workflows.comparing.plan import ComparisonPlan, PlannedRun
from sapo.workflows.comparing.results import ComparisonResults

__all__ = [
    "ComparedRuns",
    "ComparisonPlan",
    "ComparisonResults",
    "PlannedRun",
    "RunOutcome",
    "compare",
    "load_comparison",
]
