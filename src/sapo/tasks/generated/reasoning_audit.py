"""Audit the datasets of reasoning-gym, and refuse those whose questions or scores cannot be trusted.

The scorers of the datasets in SOUND were read in version 0.1.25 and their items checked: the reference answer scores 1,
and none but countdown's evaluates the answer as code (reasoning_scoring.py replaces that one). Any other dataset is
checked when it is made. Its scorer may not reach eval, exec or sympy, which evaluates strings. Its items must be
repeatable. The reference answers of the first items must score 1, and junk at most 0.01. A refusal gives the reason.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.generated.reasoning_scoring import generate_entry, make_dataset, score_answer

SOUND = (
    "chain_sum",
    "gcd",
    "simple_equations",
    "base_conversion",
    "countdown",
    "knights_knaves",
    "zebra_puzzles",
    "mini_sudoku",
    "spell_backward",
    "letter_counting",
    "list_functions",
    "codeio",
)

_SALTED = "its questions change with PYTHONHASHSEED, so that no run could be resumed or repeated"

REFUSED = {
    "propositional_logic": "its own reference answer scores 0",
    "composite": "it is a mixture of other datasets; write them as tasks with weights",
    "isomorphic_strings": _SALTED,
    "knight_swap": _SALTED,
    "ransom_note": _SALTED,
}

CHECKED_ITEMS = 8
"""Number of first items of a dataset that are checked."""
MAX_JUNK_SCORE = 0.01
"""Largest score of junk that is accepted: countdown gives 0.01 for an answer that is no expression."""

JUNK = ("junk", "I do not know.", "0 0 0", "None", "{}", "[]", "\\x00", "The answer is in the question.")

_EVALUATORS = frozenset({"eval", "exec", "compile", "__import__"})


def check_dataset(name: str, knobs: str) -> None:
    """Refuse a dataset whose questions are not repeatable or whose scores cannot be trusted.

    Raises:
        TaskError: the dataset is refused; the message gives the reason.
    """
    if name in REFUSED:
        raise _refusal(name, REFUSED[name])
    if name in SOUND:
        return
    dataset = make_dataset(name, knobs)
    evaluator = find_evaluator(type(dataset).score_answer, type(dataset))
    if evaluator is not None:
        raise _refusal(name, f"its scorer evaluates text by {evaluator}, which must never see a model's answer")
    for item in range(CHECKED_ITEMS):
        entry = generate_entry(name, knobs, item)
        again = generate_entry.__wrapped__(name, knobs, item)
        if (entry["question"], entry["answer"]) != (again["question"], again["answer"]):
            raise _refusal(name, f"item {item} is another question each time it is made")
        if not isinstance(entry["answer"], str):
            raise _refusal(name, f"item {item} has no reference answer in text")
        reference = score_answer(name, dataset, entry["answer"], entry)
        if reference != 1.0:
            raise _refusal(name, f"the reference answer of item {item} scores {reference:.3g}, and must score 1")
        for junk in JUNK:
            junk_score = _score_or_nothing(name, dataset, junk, entry)
            if junk != entry["answer"] and junk_score > MAX_JUNK_SCORE:
                raise _refusal(
                    name, f"junk ({junk!r}) scores {junk_score:.3g} on item {item}, and may score {MAX_JUNK_SCORE}"
                )


def find_evaluator(function: Callable[..., Any], owner: type) -> str | None:
    """Return the first evaluator of strings that a scorer can reach through code of the package, or None.

    The search follows the functions and classes of the package that the code names: globals of its module, attributes
    of the owner, and nested functions.
    """
    seen: set[CodeType] = set()
    waiting: list[tuple[FunctionType, type]] = [(function, owner)] if isinstance(function, FunctionType) else []
    while waiting:
        current, holder = waiting.pop()
        if current.__code__ in seen:
            continue
        seen.add(current.__code__)
        for code in _nested(current.__code__):
            for instruction in dis.get_instructions(code):
                name = instruction.argval
                if not isinstance(name, str) or not instruction.opname.startswith(("LOAD", "IMPORT")):
                    continue
                target = current.__globals__.get(name)
                if instruction.opname == "LOAD_GLOBAL" and name in _EVALUATORS and target is None:
                    return name
                if _is_of_sympy(target) or (instruction.opname.startswith("IMPORT") and name.startswith("sympy")):
                    return f"sympy ({name})"
                waiting += _followed(target, holder)
                waiting += _followed(inspect.getattr_static(holder, name, None), holder)
    return None


def _nested(code: CodeType) -> list[CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [code, *(deeper for part in inner for deeper in _nested(part))]


def _followed(target: Any, holder: type) -> list[tuple[FunctionType, type]]:
    """Return the functions of the package behind a name, each with the class whose attributes its code may use."""
    if isinstance(target, (staticmethod, classmethod)):
        target = target.__func__
    if isinstance(target, property):
        target = target.fget
    if not str(getattr(target, "__module__", "")).startswith("reasoning_gym"):
        return []
    if isinstance(target, type):
        members = (getattr(m, "__func__", m) for c in target.__mro__ for m in vars(c).values())
        return [(member, target) for member in members if isinstance(member, FunctionType)]
    return [(target, holder)] if isinstance(target, FunctionType) else []


def _is_of_sympy(target: Any) -> bool:
    name = target.__name__ if isinstance(target, ModuleType) else getattr(target, "__module__", None)
    return str(name).partition(".")[0] == "sympy"


def _score_or_nothing(name: str, dataset: Any, answer: str, entry: Any) -> float:
    # An answer on which the scorer raises an exception is unparseable, with reward 0.
    try:
        return score_answer(name, dataset, answer, entry)
    except Exception:
        return 0.0


def _refusal(name: str, reason: str) -> TaskError:
    return TaskError(f"reasoning-gym's {name} cannot be used: {reason}; known to be sound: {', '.join(SOUND)}")
