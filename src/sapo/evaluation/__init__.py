"""Evaluation on held-out problems: mean@n, pass@k, majority, greedy and the best constant answer, with intervals.

`evaluate_policy` draws, judges and counts. `EvaluationStore` keeps one on disk so that it can be killed, `Results` is
what is written in the end, `write_page` its completions to be read, `compare` sets two beside each other.
"""

from sapo.evaluation.comparison import Comparison, compare
from sapo.evaluation.constant import best_constant
from sapo.evaluation.estimates import Estimate, bootstrap, majority_share, pass_at_k
from sapo.evaluation.examination import ask, evaluate_policy, examine
from sapo.evaluation.figures import ConstantAnswer, Evaluation
from sapo.evaluation.page import page_data, write_page
from sapo.evaluation.records import Answered, Sample
from sapo.evaluation.results import Results, read_results
from sapo.evaluation.store import EvaluationStore

__all__ = [
    "Answered",
    "Comparison",
    "ConstantAnswer",
    "Estimate",
    "Evaluation",
    "EvaluationStore",
    "Results",
    "Sample",
    "ask",
    "best_constant",
    "bootstrap",
    "compare",
    "evaluate_policy",
    "examine",
    "majority_share",
    "page_data",
    "pass_at_k",
    "read_results",
    "write_page",
]
