"""Verifiers, which score completions: by name, by `module:function`, or as weighted sums (docs/verifiers.md)."""

from sapo.tasks.verifiers.base import Verifier
from sapo.tasks.verifiers.registry import (
    VERIFIERS,
    Isolated,
    VerifierSpec,
    build_verifier,
    load_verifier,
    needs_answer,
    reference_check,
)

__all__ = [
    "VERIFIERS",
    "Isolated",
    "Verifier",
    "VerifierSpec",
    "build_verifier",
    "load_verifier",
    "needs_answer",
    "reference_check",
]
