"""Verifiers for tasks from files: three by name, and any function of the user's as `module:function`.

A verifier takes a finished completion's text and its prompt and returns a Score. What it cannot read is `unparseable`,
which is not the same as wrong. Numbers are compared exactly, as fractions, and those of absurd length are not read.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from sapo.data import Prompt, Score, Status
from sapo.tasks.base import TaskError, did_you_mean
from sapo.tasks.scoring import checked_reward

Verifier = Callable[[str, Prompt], Score]

# Longer than any sensible answer, and short enough that exact arithmetic on it costs nothing.
MAX_NUMBER_LENGTH = 100

# A sign counts unless it follows a word, a number or a bracket: the last number of "10-5" is 5, of "= -5" it is -5.
_NUMBER = re.compile(
    r"(?:(?<![\w).])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9])|/[0-9]+)?"
)


def exact(text: str, prompt: Prompt) -> Score:
    """Reward 1 when the text, without the blanks around it, is the answer.

    >>> exact(" Paris\\n", Prompt(id=0, task="capitals", text="France?", answer="Paris")).reward
    1.0
    """
    return Score(float(text.strip() == _answer(prompt).strip()))


def last_number(text: str, prompt: Prompt) -> Score:
    """Reward 1 when the last number in the text has the value of the answer: 1,000 and 1000.0 and 2000/2 are equal.

    >>> last_number("12 eggs at 4 make $1,000.50.", Prompt(id=0, task="t", text="?", answer="1000.5")).reward
    1.0
    """
    reference = _number(_after_hash(_answer(prompt)))
    if reference is None:
        raise ValueError(f"last_number needs a number as the answer; got {prompt.answer!r}; use another verifier")
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not numbers:
        return Score(0.0, Status.UNPARSEABLE, "no number in the completion")
    value = _number(numbers[-1])
    if value is None:
        return Score(0.0, Status.UNPARSEABLE, f"the last number cannot be read: {numbers[-1][:40]!r}")
    return Score(float(value == reference))


def hash_answer(text: str, prompt: Prompt) -> Score:
    """Reward 1 when what follows the last `#` is the answer, as in GSM8K: by value for numbers, else by text.

    An answer field that holds a whole solution ending in `#### 18` is read the same way.

    >>> hash_answer("6 * 3 = 18 #### 18", Prompt(id=0, task="gsm8k", text="?", answer="three sixes #### 18")).reward
    1.0
    """
    if "#" not in text:
        return Score(0.0, Status.UNPARSEABLE, "no '#' in the completion")
    given, answer = _after_hash(text), _after_hash(_answer(prompt))
    if not given:
        return Score(0.0, Status.UNPARSEABLE, "nothing after the last '#'")
    reference = _number(answer)
    if reference is None:
        return Score(float(given == answer))
    value = _number(given)
    if value is None:
        return Score(0.0, Status.UNPARSEABLE, f"no number after the last '#': {given[:40]!r}")
    return Score(float(value == reference))


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "last_number": last_number,
    "hash_answer": hash_answer,
}

USER_PARAMETERS = ("completion", "answer", "prompt", "metadata")


def load_verifier(spec: str) -> Verifier:
    """The verifier called `spec`: a name of VERIFIERS, or `module:function` of the user's.

    A module is looked for on sys.path and, last, in the current directory. Its function is called with those of the
    keyword arguments completion: str, answer: str | None, prompt: str, metadata: Mapping that its signature takes, and
    returns a number, a bool or a Score.

    Raises:
        TaskError: no such name, module or function, or a function that cannot be called so.
    """
    if spec in VERIFIERS:
        return VERIFIERS[spec]
    module_name, colon, function_name = spec.partition(":")
    if not (module_name and colon and function_name):
        raise TaskError(
            f"a verifier must be one of {', '.join(VERIFIERS)} or module:function; got {spec!r}"
            f"{did_you_mean(spec, VERIFIERS)}"
        )
    function = _import_function(spec, module_name, function_name)
    accepted = _accepted_parameters(spec, function)

    def verify(text: str, prompt: Prompt) -> Score:
        values = {"completion": text, "answer": prompt.answer, "prompt": prompt.text, "metadata": prompt.metadata}
        result = function(**{name: values[name] for name in accepted})
        return result if isinstance(result, Score) else Score(checked_reward(result))

    return verify


def _import_function(spec: str, module_name: str, function_name: str) -> Callable[..., Any]:
    # Last on the path, and for good: a console script has no current directory there, a file of the user's must not
    # shadow the standard library, and a module may import its neighbours late.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TaskError(
            f"verifier {spec!r}: importing {module_name!r} failed: {reason}; run from the directory that has it"
        ) from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        hint = did_you_mean(function_name, (name for name, value in vars(module).items() if callable(value)))
        where = getattr(module, "__file__", None) or module_name
        raise TaskError(f"verifier {spec!r}: {where} has no function {function_name!r}{hint}")
    return function


def _accepted_parameters(spec: str, function: Callable[..., Any]) -> tuple[str, ...]:
    rule = f"verifier {spec!r} must take completion and may take {', '.join(USER_PARAMETERS[1:])}, by keyword"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TaskError(f"{rule}; got a function without a readable signature; wrap it in one of your own") from error
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = tuple(name for name in USER_PARAMETERS if takes_all or name in by_keyword)
    unmet = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.kind is p.POSITIONAL_ONLY or p.name not in USER_PARAMETERS
    ]
    if "completion" not in accepted or unmet:
        got = f"required {unmet}" if unmet else f"parameters {[p.name for p in parameters]}"
        raise TaskError(f"{rule}; got {got}; rename them or give defaults")
    return accepted


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError("this verifier compares with the prompt's answer; got none; set answer_field")
    return prompt.answer


def _after_hash(text: str) -> str:
    return text.rpartition("#")[2].strip()


def _number(text: str) -> Fraction | None:
    """The exact value of a text that is one number and nothing else (a leading $ aside), or None."""
    text = text.removeprefix("$").replace("\N{MINUS SIGN}", "-")
    if len(text) > MAX_NUMBER_LENGTH or not _NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.replace(",", "").partition("/")
    if denominator and not int(denominator):
        return None
    return Fraction(numerator) / int(denominator or 1)
