"""The verifier `hash_answer`: what follows the last `#`, as in GSM8K."""

from __future__ import annotations

from fractions import Fraction

from sapo.data import Prompt, Score
from sapo.tasks.verifiers.base import brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import last_boxed
from sapo.tasks.verifiers.mathspell import respell
from sapo.tasks.verifiers.mathtext import last_value, number_of, without_name
from sapo.tasks.verifiers.numbers import after_hash, number_in

# Longer lines are no answers, and respelling them would be slow.
MAX_LENGTH = 400


def hash_answer(text: str, prompt: Prompt) -> Score:
    """Give reward 1 where what follows the last `#` is the answer, as in GSM8K: by value for numbers, else by text.

    A number may have a unit, a currency sign, bold type or a box: `#### 18 dollars`. An answer field with a whole
    solution that ends in `#### 18` is read in the same way.

    >>> hash_answer("6 * 3 = 18 #### 18", Prompt(id=0, task="gsm8k", text="?", answer="three sixes #### 18")).reward
    1.0
    """
    answer = after_hash(reference_of(prompt))
    if not answer:
        raise ValueError(
            f"hash_answer needs an answer after the last '#'; got {brief(prompt.answer or '')}; fix the row"
        )
    if "#" not in text:
        return unparseable("no '#' in the completion")
    given = after_hash(text)
    if not given:
        return unparseable("nothing after the last '#'")
    reference = number_in(answer)
    if reference is None:
        return Score(float(given == answer), answer=given)
    value = _number_after(given)
    if value is None:
        return unparseable(f"no number after the last '#': {given[:40]!r}")
    return Score(float(value == reference), answer=str(value))


def _number_after(given: str) -> Fraction | None:
    """Return the number of the first line, or that of the last line below a heading without one."""
    lines = [line for line in given.splitlines() if line.strip()]
    if len(lines) > 1 and not any(character.isdigit() for character in lines[0]):
        lines = lines[-1:]
    line = lines[0].strip() if lines else ""
    if len(line) > MAX_LENGTH:
        return None
    boxed = last_boxed(line)
    spelt = without_name(respell(line if boxed is None else boxed))
    number = number_of(spelt) or (last_value(spelt) if "=" in spelt else None)
    return None if number is None else number.value
