r"""The verifier `choice_or_math`: an option where there are options, else the value, as MathVision is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from sapo.data import Prompt, Score
from sapo.tasks.verifiers.base import IsolatedOptions, check_reference
from sapo.tasks.verifiers.choice import Choice, listed
from sapo.tasks.verifiers.math import Math

_LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class ChoiceOrMath(IsolatedOptions):
    r"""Judges as `choice` a row whose metadata has options or whose answer is a letter, and as `math` any other.

    The figure `answered_by_letter` is 1 for an answer that is read as an option's letter, 0 for every other.

    >>> judge = ChoiceOrMath()
    >>> rows = [Prompt(0, "t", "?", answer="B", metadata={"options": ["4", "5"]}), Prompt(0, "t", "?", answer="1/2")]
    >>> [judge(text, row).reward for text, row in zip((r"\boxed{5}", r"\boxed{0.5}"), rows)]
    [1.0, 1.0]
    """

    options_field: str = "options"
    """Field of the prompt's metadata that lists the options."""
    require_box: bool = False
    """Read boxes only. A completion without one is unparseable."""
    pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._choice, self._math  # their options are checked now

    @cached_property
    def _choice(self) -> Choice:
        return Choice(options_field=self.options_field, require_box=self.require_box)

    @cached_property
    def _math(self) -> Math:
        return Math(deadline=self.deadline, require_box=self.require_box)

    def prepare(self) -> None:
        """Load what `math` needs."""
        self._math.prepare()

    def check_reference(self, prompt: Prompt) -> None:
        """Let the verifier that judges this prompt read its answer."""
        check_reference(self._choice if self._by_option(prompt) else self._math, prompt)

    def _by_option(self, prompt: Prompt) -> bool:
        options = prompt.metadata.get(self.options_field)
        has_options = bool(options) if isinstance(options, str) else bool(listed(options))
        # The options of some rows stand in the picture alone: their answer is a letter, and the list is empty.
        return has_options or (prompt.answer or "") in _LETTERS

    def __call__(self, text: str, prompt: Prompt) -> Score:
        by_option = self._by_option(prompt)
        score = (self._choice if by_option else self._math)(text, prompt)
        letter = by_option and score.answer is not None and len(score.answer) == 1 and score.answer.isalpha()
        return replace(score, figures={**score.figures, "answered_by_letter": float(letter)})
