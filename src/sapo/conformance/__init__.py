"""The conformance kit: laws that any policy loss can be judged by, ours, a neighbour's or your own.

On the command line it is `sapo conformance trl`, `sapo conformance my_module:my_loss` for a loss function and
`sapo conformance my_module:MyObjective` for an objective. From Python it is
`judge(function_subject("my_module:my_loss"))` and `judge_objective("my_module:MyObjective")`.

A subject names the objective that it claims to be, with settings and normalizer. `laws.LAWS` are for its loss,
`objective_laws.OBJECTIVE_LAWS` for an objective. A broken law comes with the smallest counterexample found.
"""

from sapo.conformance.cases import Batch, Case, Response
from sapo.conformance.laws import LAWS, judge
from sapo.conformance.objective_laws import OBJECTIVE_LAWS, REQUIRED, Judgement, judge_objective
from sapo.conformance.search import BROKEN, DOES_NOT_APPLY, HELD, Verdict
from sapo.conformance.subjects import Subject, Whole, function_subject, objective_subject, own_subjects

__all__ = [
    "BROKEN",
    "DOES_NOT_APPLY",
    "HELD",
    "LAWS",
    "OBJECTIVE_LAWS",
    "REQUIRED",
    "Batch",
    "Case",
    "Judgement",
    "Response",
    "Subject",
    "Verdict",
    "Whole",
    "function_subject",
    "judge",
    "judge_objective",
    "objective_subject",
    "own_subjects",
]
