r"""The verifier `math`: compare a completion's answer with the reference, however the two are written.

The answer is found by mathanswer.py, respelt by mathspell.py and compared by mathcompare.py.
Departures from math-verify's rules, each of which prevents a wrong verdict:
- 52_8 is a numeral in base 8; math-verify drops the base.
- A decimal must equal a decimal exactly; math-verify rounds to six places.
- Points are compared part by part; math-verify turns (8, -2) and (9, -3) both into the empty interval.
- x = 1, y = 2 is not x = 2, y = 1.
- An anagram is another word.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import IsolatedOptions, brief, reference_of, unparseable
from sapo.tasks.verifiers.mathalgebra import nothing_evaluated, within
from sapo.tasks.verifiers.mathanswer import answer_in
from sapo.tasks.verifiers.mathcompare import canonical_answer, equal
from sapo.tasks.verifiers.mathexact import is_too_large
from sapo.tasks.verifiers.mathreference import MAX_ANSWER_LENGTH, check_answer, reference_answer
from sapo.tasks.verifiers.mathspell import respell, squeezed
from sapo.tasks.verifiers.mathtext import base_of, listing_of, words_of


@dataclass(frozen=True)
class Math(IsolatedOptions):
    r"""Gives reward 1 where the answer equals the prompt's: 1/2, \frac12, \dfrac{1}{2}, 0.5 and x = 0.5 are equal.

    The answer is the last \boxed{...}. Without a box it is the first of these that is present: what follows `####`,
    what follows "answer is", the last formula, the whole text where it is one short formula, the last number.

    >>> prompt = Prompt(id=0, task="maths", text="?", answer=r"\frac{1}{2}")
    >>> Math()(r"So $x = \boxed{0.50}$.", prompt).reward
    1.0
    """

    require_box: bool = False
    """Read boxes only. A completion without one is unparseable."""
    pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("math_verify") is None:
            raise TaskError("verifier 'math' needs the package math-verify; pip install 'sapo-rl[tasks]'")

    def prepare(self) -> None:
        """Load SymPy, including what it loads when it first simplifies."""
        with nothing_evaluated():
            equal("(x+1)^2", "x^2+2x+1")

    def check_reference(self, prompt: Prompt) -> None:
        """Refuse an answer that is none: see `mathreference.check_answer`.

        Raises:
            ValueError: it is none.
        """
        check_answer(reference_of(prompt))

    def __call__(self, text: str, prompt: Prompt) -> Score:
        reference = respell(reference_answer(reference_of(prompt)))
        if not reference:
            raise ValueError(f"verifier 'math' needs an answer; got {brief(prompt.answer or '')}")
        if not self.require_box and len(text) <= MAX_ANSWER_LENGTH and squeezed(respell(text)) == squeezed(reference):
            found: str | None = text
        else:
            several = listing_of(reference) is not None
            found = answer_in(text, several=several, require_box=self.require_box)
        if found is None:
            return unparseable("no \\boxed{} in the completion" if self.require_box else "no answer in the completion")
        if len(found) > MAX_ANSWER_LENGTH:
            return unparseable(f"the answer is longer than {MAX_ANSWER_LENGTH} characters: {brief(found)}")
        given = respell(found)
        if not given:
            return unparseable("the answer is empty")
        with nothing_evaluated():
            # A right answer is recorded as the reference, so that all right answers are equal text for a majority.
            if within(self.deadline * 0.6, equal, reference, given):
                return Score(1.0, answer=canonical_answer(reference) or squeezed(reference))
            try:
                canonical = within(self.deadline * 0.2, canonical_answer, given)
            except TimeoutError:  # its canonical form is unknown, but it is wrong
                return Score(0.0, answer=squeezed(given))
        if canonical is None and is_too_large(given):
            return Score(0.0, answer=squeezed(given))
        if canonical is None and words_of(reference) is None and base_of(reference) is None:
            return unparseable(f"the answer cannot be read: {brief(found)}")
        return Score(0.0, answer=canonical if canonical is not None else squeezed(given))
