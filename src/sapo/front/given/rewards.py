"""Rewards given in Python as the setting `verifier` of a task.

A function that a worker can import is named `module:function`; any other stays in this process
(tasks/verifiers/in_process.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo.errors import TaskError
from sapo.tasks.verifiers.in_process import is_in_process, keep_function


def verifier_settings(rewards: Any) -> Any:
    """Return the setting `verifier` of a task for rewards that were given.

    Args:
        rewards: a function, a verifier's name or its settings; or several, as a list of these or of pairs with weights,
            or as a mapping of these to weights. The weight is 1 where none is given.

    Raises:
        TaskError: they are none of these.

    >>> verifier_settings([("math", 0.9), ({"name": "length", "limit": 100}, 0.1)])
    [{'name': 'math', 'weight': 0.9}, {'name': 'length', 'limit': 100, 'weight': 0.1}]
    """
    if isinstance(rewards, Mapping) and "name" not in rewards:
        rewards = list(rewards.items())
    if callable(rewards) or isinstance(rewards, str | Mapping):
        return _term(rewards, [])
    if not isinstance(rewards, Sequence) or not rewards:
        raise TaskError(
            "rewards must be a function, a verifier's name, a list of these or of pairs (reward, weight), or a dict of "
            f"rewards with weights; got {rewards!r:.80}"
        )
    terms: list[dict[str, Any]] = []
    for item in rewards:
        pair = isinstance(item, tuple) and len(item) == 2
        reward, weight = item if pair else (item, 1.0)
        if isinstance(reward, Mapping) and "weight" in reward:
            reward, weight = {k: v for k, v in reward.items() if k != "weight"}, reward["weight"]
        term = _term(reward, [term["name"] for term in terms])
        terms.append({**({"name": term} if isinstance(term, str) else term), "weight": weight})
    return terms


def _term(reward: Any, taken: Sequence[str]) -> Any:
    if isinstance(reward, Mapping):
        return {**reward, "name": _term(reward["name"], taken)}
    if isinstance(reward, str):
        return reward
    if not callable(reward):
        raise TaskError(
            f"a reward must be a function, a verifier's name or its settings; got {reward!r:.80}; a weight stands "
            "beside it: (reward, 0.5)"
        )
    return importable_name(reward) or keep_function(reward, taken)


def importable_name(function: Callable[..., Any]) -> str | None:
    """Return `module:function` of a function that a worker process can import, None of any other.

    >>> import json
    >>> importable_name(json.dumps), importable_name(lambda: 0)
    ('json:dumps', None)
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not str(name).isidentifier():
        return None
    loaded = sys.modules.get(str(module))
    if loaded is None or getattr(loaded, str(name), None) is not function:
        return None
    file = getattr(loaded, "__file__", None)
    if file is None or not _found_anew(str(module), Path(file).absolute()):
        return None
    return f"{module}:{name}"


def _found_anew(module: str, file: Path) -> bool:
    """Return whether an import by another process finds the file: a test or a notebook may have loaded it otherwise."""
    for entry in (*sys.path, ""):
        base = Path(entry or ".").absolute().joinpath(*module.split("."))
        if file in (base.with_suffix(".py"), base / "__init__.py"):
            return True
    return False


def keep_rewards(rewards: Any) -> list[str]:
    """Make functions known in this process to a run that is resumed, and return how a recipe names them."""
    return in_process_names(verifier_settings(rewards))


def in_process_names(verifier: Any) -> list[str]:
    """Return the names of functions of this process in a setting `verifier`."""
    terms = verifier if isinstance(verifier, list | tuple) else [verifier]
    names = [term.get("name") if isinstance(term, Mapping) else term for term in terms]
    return [name for name in names if isinstance(name, str) and is_in_process(name)]
