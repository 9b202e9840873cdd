r"""The verifier `boxed_integer`: the last \boxed{...} as an integer, as AIME and BeyondAIME are scored."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import last_boxed
from sapo.tasks.verifiers.mathspell import respell
from sapo.tasks.verifiers.mathtext import last_value, number_of, without_name


@dataclass(frozen=True)
class BoxedInteger:
    r"""Gives reward 1 where the last \boxed{...} equals the answer's integer, however it is written.

    070, 70.0, $70$, N = 70, m+n = 70, 70^\circ and \frac{140}{2} are all 70; 1,234 and 1{,}234 are 1234. A number
    that is no integer, or outside minimum..maximum, is a wrong answer. One outside the range does not count in a
    majority. Anything else in the box, or no box, is unparseable.

    >>> BoxedInteger()(r"so \boxed{070}", Prompt(id=0, task="aime", text="?", answer="70")).reward
    1.0
    """

    minimum: int | None = None
    """Smallest possible answer: 0 for AIME."""
    maximum: int | None = None
    """Largest possible answer: 999 for AIME."""

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TaskError(f"boxed_integer's {name} must be an integer; got {value!r}; leave it out for no limit")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise TaskError(f"boxed_integer's minimum must not exceed maximum; got {self.minimum} > {self.maximum}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        answer = reference_of(prompt)
        reference = _value(answer)
        if reference is None or reference.denominator != 1:
            raise ValueError(f"boxed_integer needs an integer as the answer; got {brief(answer)}; use math")
        boxed = last_boxed(text)
        if boxed is None:
            return unparseable("no \\boxed{} in the completion")
        value = _value(boxed)
        if value is None:
            return unparseable(f"no integer in the last box: {brief(boxed)}")
        outside = (self.minimum is not None and value < self.minimum) or (
            self.maximum is not None and value > self.maximum
        )
        return Score(float(value == reference and not outside), answer=None if outside else str(value))


def _value(text: str) -> Fraction | None:
    # The limit is checked first, since respelling a whole page in a box would be slow.
    if len(text) > 400:
        return None
    spelt = without_name(respell(text))
    number = number_of(spelt) or (last_value(spelt) if "=" in spelt else None)
    return None if number is None or number.percent else number.value
