r"""The verifier `choice`: the letter or the value of an option, as MathVision is scored.

The options are in the prompt's metadata. Where a row has none, the letter or value of the answer itself is expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import after_phrase, last_boxed
from sapo.tasks.verifiers.mathtext import number_of, respell, squeezed, without_name
from sapo.tasks.verifiers.numbers import number_in

_LABELLED = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s)|[.:)]$)\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")

# Characters of an answer that is read: longer than any option, and short enough for the patterns here to be fast.
MAX_LENGTH = 1000


@dataclass(frozen=True)
class Choice:
    r"""Gives reward 1 for the right option by letter, value or both: B, (B), B. 5, \boxed{\text{B}}, \boxed{5}.

    The answer is the last \boxed{...}. Without a box it is what follows the last "answer is", or else the last line,
    where that is an option. A letter with the value of another option is a wrong answer.

    >>> prompt = Prompt(id=0, task="mathvision", text="?", answer="B", metadata={"options": ["4", "5", "6"]})
    >>> [Choice()(text, prompt).reward for text in (r"\boxed{B}", "The answer is (B) 5.", r"\boxed{5}", "A")]
    [1.0, 1.0, 1.0, 0.0]
    """

    options_field: str = "options"
    """Field of the prompt's metadata that lists the options."""
    require_box: bool = False
    """Read boxes only. A completion without one is unparseable."""

    def __post_init__(self) -> None:
        if not isinstance(self.options_field, str):
            raise TaskError(f"choice's options_field must name a field of the rows; got {self.options_field!r}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        options = [str(option) for option in _listed(prompt.metadata.get(self.options_field))]
        right = _pick(reference_of(prompt), options, words=True)
        if right is None:
            raise ValueError(f"choice needs an answer that is an option or its letter; got {prompt.answer!r}")
        boxed = last_boxed(text)
        if boxed is None and self.require_box:
            return unparseable("no \\boxed{} in the completion")
        candidates = [boxed] if boxed is not None else [after_phrase(text), *_last_line(text)]
        # Where the answer is in words, any words are an answer. Where it is a letter or a number, words are none.
        plain = bool(options) or len(right) == 1 or number_in(right) is not None
        read = (_pick(c, options, words=not plain) for c in candidates if c)
        given = next((g for g in read if g is not None), None)
        if given is None:
            shown = next((c for c in candidates if c), "")
            return unparseable(f"no option in the completion: {brief(shown)}")
        return Score(float(given == right), answer=given)


def _listed(options: object) -> Sequence[object]:
    # Any sequence, including numpy arrays. A string is one option, not many letters.
    if options is None or isinstance(options, str):
        return ()
    return list(options)  # type: ignore[call-overload]


def _last_line(text: str) -> list[str]:
    lines = text.strip().splitlines()
    return [lines[-1].strip()] if lines else []


def _pick(text: str, options: list[str], *, words: bool) -> str | None:
    """Return the letter of the option that a text names, or None. Without options, its letter, number or words."""
    if len(text) > MAX_LENGTH:
        return None
    spelt = _TEXT_COMMAND.sub(r"\1", without_name(respell(text))).strip()
    if not options:
        letter = _LETTER.fullmatch(spelt)
        number = number_of(spelt)
        if letter:
            return letter[1].upper()
        if number:
            return str(number.value)
        return (_plain(spelt) or None) if words else None
    letters = [chr(ord("A") + i) for i in range(len(options))]
    values = [_plain(option) for option in options]
    letter = _LETTER.fullmatch(spelt)
    if letter and letter[1].upper() in letters:
        return letter[1].upper()
    labelled = _LABELLED.fullmatch(spelt)
    if labelled and labelled[1].upper() in letters:
        name, rest = labelled[1].upper(), _plain(labelled[2])
        # A letter with the value of another option is no choice. Any other words after it only explain it.
        return name if rest not in values or values[letters.index(name)] == rest else None
    plain = _plain(spelt)
    return letters[values.index(plain)] if values.count(plain) == 1 else None


def _plain(text: str) -> str:
    """Return the text of an option in one spelling, and numbers by value."""
    spelt = _TEXT_COMMAND.sub(r"\1", respell(text)).strip()
    number = number_of(spelt)
    return str(number.value) if number and not number.percent else squeezed(spelt).lower()
