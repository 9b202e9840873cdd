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
    """The sum of weight x reward over the terms.

    The answer is that of the first term that has one. Each term's reward is a figure of its own, under its name. When a
    term with a weight above 0 can read no answer, the whole is unparseable, with the reward that the others gave; an
    exception in a term is one of the whole.

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
        """True when a term must run in a worker: then all do."""
        return any(getattr(term.verifier, "isolated", False) for term in self.terms)

    @property
    def deadline(self) -> float:
        """That of all isolated terms together."""
        return sum(deadline_of(term.verifier) for term in self.terms)

    @property
    def pure(self) -> bool:
        """True when every term is."""
        return all(is_pure(term.verifier) for term in self.terms)

    def prepare(self) -> None:
        """Prepare the terms."""
        for term in self.terms:
            prepare(term.verifier)

    def check_machine(self) -> None:
        """Check it for the terms."""
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
    """The sum of weight x reward of the decimals as written, rounded once.

    In floating point 0.7 + 0.2 + 0.1 is below 1, and an answer to which every term gave 1 would not count as right.
    """
    return float(sum((_decimal(weight) * _decimal(checked_reward(reward)) for weight, reward in parts), Fraction()))


def _decimal(number: float) -> Fraction:
    return Fraction(repr(float(number)))
