"""Comparison: objectives x learning rates x seeds, from one cold start, on the same prompts, with the same budget.

`load_comparison` reads what is to be compared, `compare` makes the runs side by side and sets their results beside
each other. docs/comparing.md says how figures are computed and what they can show.
"""

from sapo.comparing.comparison import ComparedRuns, compare
from sapo.comparing.outcomes import Outcome
from sapo.comparing.plan import ComparisonPlan, PlannedRun
from sapo.comparing.recipe import load_comparison
from sapo.comparing.results import ComparisonResults

__all__ = [
    "ComparedRuns",
    "ComparisonPlan",
    "ComparisonResults",
    "Outcome",
    "PlannedRun",
    "compare",
    "load_comparison",
]
