"""The conformance kit: laws that any policy loss can be judged by, ours, a neighbour's or your own.

`sapo conformance trl` and `sapo conformance my_module:my_loss` on the command line;
`judge(function_subject("my_module:my_loss"))` from Python. A subject says which objective it claims to be, with which
settings and normaliser; `laws.LAWS` are held against it, and a broken one comes with the smallest counter-example
found.
"""

from sapo.conformance.cases import Batch, Case, Response
from sapo.conformance.laws import BROKEN, DOES_NOT_APPLY, HELD, LAWS, Verdict, judge
from sapo.conformance.subjects import Subject, Whole, function_subject, own_subjects

__all__ = [
    "BROKEN",
    "DOES_NOT_APPLY",
    "HELD",
    "LAWS",
    "Batch",
    "Case",
    "Response",
    "Subject",
    "Verdict",
    "Whole",
    "function_subject",
    "judge",
    "own_subjects",
]
