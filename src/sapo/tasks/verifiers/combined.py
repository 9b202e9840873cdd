"""A weighted sum of verifiers, which a recipe writes as a list of them with weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sapo.data import Prompt, Score, Status
from sapo.tasks.base import checked_reward
from sapo.tasks.verifiers.base import (
    ABSTAINED,
    Verifier,
    check_machine,
    check_reference,
    deadline_of,
    is_batched,
    is_pure,
    prepare,
    score_batch,
    score_many,
)


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
    is an exception of the sum. A term that abstains is left out.

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

    def check_reference(self, prompt: Prompt) -> None:
        """Let the verifiers of the terms read the prompt's answer."""
        for term in self.terms:
            check_reference(term.verifier, prompt)

    def check_machine(self) -> None:
        """Let the verifiers of the terms check the machine."""
        for term in self.terms:
            check_machine(term.verifier)

    @property
    def batched(self) -> bool:
        """Return whether a term judges all completions of a prompt in one call."""
        return any(is_batched(term.verifier) for term in self.terms)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return self.score_batch([text], prompt)[0] or ABSTAINED

    def score_batch(self, texts: Sequence[str], prompt: Prompt) -> list[Score | None]:
        """Score completions of a prompt; None where every term abstains."""
        by_term = [score_batch(term.verifier, texts, prompt) for term in self.terms]
        return [self._sum(scores) for scores in zip(*by_term, strict=True)]

    def _sum(self, by_term: Sequence[Score | None]) -> Score | None:
        """Return the sum of a completion's scores, without the terms that abstained."""
        scores = [(term, score) for term, score in zip(self.terms, by_term, strict=True) if score is not None]
        if not scores:
            return None
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


@dataclass(frozen=True)
class CombinedHere(Combined):
    """A sum with a term that is a function of this process. The other terms run where each of them would by itself."""

    isolated = False

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return self.score_many([((text,), prompt)])[0][0] or ABSTAINED

    def score_many(self, requests: Sequence[tuple[Sequence[str], Prompt]]) -> list[list[Score | None]]:
        """Score the completions of several prompts: each term judges all of them before the next."""
        by_term = [score_many(term.verifier, requests) for term in self.terms]
        return [
            [self._sum_or_failure(scores) for scores in zip(*(found[i] for found in by_term), strict=True)]
            for i in range(len(requests))
        ]

    def _sum_or_failure(self, by_term: Sequence[Score | None]) -> Score | None:
        """Return the sum; a failure of one term is a failure of the sum, as where a term raises an exception."""
        for term, score in zip(self.terms, by_term, strict=True):
            if score is not None and score.status is Status.VERIFIER_ERROR:
                return Score(0.0, Status.VERIFIER_ERROR, f"{term.name}: {score.detail}")
        return self._sum(by_term)


def _weighted_sum(parts: Iterable[tuple[float, float]]) -> float:
    """Compute the sum of weight x reward in exact decimals, rounded once.

    In floating point 0.7 + 0.2 + 0.1 is below 1, and an answer with reward 1 from every term would not count as right.
    """
    return float(sum((_decimal(weight) * _decimal(checked_reward(reward)) for weight, reward in parts), Fraction()))


def _decimal(number: float) -> Fraction:
    return Fraction(repr(float(number)))
