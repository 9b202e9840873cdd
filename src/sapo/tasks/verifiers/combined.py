"""A weighted sum of verifiers, which a recipe writes as a list of them with weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from sapo.data import Prompt, Score, Status
from sapo.tasks.base import checked_reward
from sapo.tasks.verifiers.base import Verifier, check_machine, deadline_of, is_pure, prepare


@dataclass(frozen=True)
class Term:
    """One verifier of a sum."""

    name: str
    weight: float
    verifier: Verifier


@dataclass(frozen=True)
class Combined:
    """Gives the sum of weight x reward over the terms.

    The answer is that of the first term that has one. The reward of each term is a figure under its name. Where a term
    with a weight above 0 is unparseable, so is the sum, which keeps the rewards of the others. An exception in a term
    is an exception of the sum.

    >>> from sapo.tasks.verifiers.numbers import last_number
    >>> from sapo.tasks.verifiers.patterns import Format
    >>> terms = (Term("last_number", 0.9, last_number), Term("format", 0.1, Format(pattern="^So ")))
    >>> score = Combined(terms)("So 6", Prompt(id=0, task="t", text="?", answer="5"))
    >>> score.reward, score.answer, dict(score.figures)
    (0.1, '6', {'last_number': 0.0, 'format': 1.0})
    """

    terms: tuple[Term, ...]

    @property
    def isolated(self) -> bool:
        """Return whether a term must run in a worker. Then all do."""
        return any(getattr(term.verifier, "isolated", False) for term in self.terms)

    @property
    def deadline(self) -> float:
        """Return the sum of the deadlines of the isolated terms, in seconds."""
        return sum(deadline_of(term.verifier) for term in self.terms)

    @property
    def pure(self) -> bool:
        """Return whether every term is pure."""
        return all(is_pure(term.verifier) for term in self.terms)

    def prepare(self) -> None:
        """Prepare the verifiers of the terms."""
        for term in self.terms:
            prepare(term.verifier)

    def check_machine(self) -> None:
        """Let the verifiers of the terms check the machine."""
        for term in self.terms:
            check_machine(term.verifier)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        scores = [(term, term.verifier(text, prompt)) for term in self.terms]
        failed = [(t, s) for t, s in scores if s.status is not Status.SCORED and t.weight > 0]
        figures: dict[str, float] = {}
        for term, score in scores:
            figures |= {term.name: score.reward, **score.figures}
        return Score(
            reward=_weighted_sum((term.weight, score.reward) for term, score in scores),
            status=failed[0][1].status if failed else Status.SCORED,
            detail=f"{failed[0][0].name}: {failed[0][1].detail}" if failed else "",
            answer=next((score.answer for _, score in scores if score.answer is not None), None),
            figures=figures,
        )


def _weighted_sum(parts: Iterable[tuple[float, float]]) -> float:
    """Compute the sum of weight x reward in exact decimals, rounded once.

    In floating point 0.7 + 0.2 + 0.1 is below 1, and an answer with reward 1 from every term would not count as right.
    """
    return float(sum((_decimal(weight) * _decimal(checked_reward(reward)) for weight, reward in parts), Fraction()))


def _decimal(number: float) -> Fraction:
    return Fraction(repr(float(number)))
