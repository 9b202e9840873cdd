"""Objectives of a user's own, named `module:Class`: imported, and checked for what every objective must have.

Whether the mathematics is right is for sapo.conformance to say; this file checks the class alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container
from dataclasses import fields

from sapo.errors import UserError
from sapo.objectives.advantages import ADVANTAGES
from sapo.objectives.checks import unknown_option
from sapo.objectives.normalizers import NORMALIZERS
from sapo.objectives.surrogates import Objective
from sapo.utils.plugins import import_named

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def is_plugin(name: str) -> bool:
    """Tell whether a name is a user's own `module:Class`, and not one of OBJECTIVES.

    >>> is_plugin("my_module:MyObjective"), is_plugin("sapo")
    (True, False)
    """
    return ":" in name


def load_objective(spec: str, taken: Container[str] = ()) -> type[Objective]:
    """Import the class that `module:Class` names.

    Args:
        spec: module and class; the working directory is searched too.
        taken: names of other objectives, which the class may not have.

    Raises:
        UserError: no such module or class.
        ValueError: a class that is no complete objective.
    """
    found = import_named(spec, what="objective", noun="class", error=UserError)
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise ValueError(
            f"objective {spec!r} must be a class derived from sapo.objectives.Objective; got {found!r}; derive it from "
            "TokenObjective (a gate for each token) or SequenceObjective (a gate for each sequence)"
        )
    _check_class(spec, found, taken)
    return found


def _check_class(spec: str, found: type[Objective], taken: Container[str]) -> None:
    """Refuse a class that is not a complete objective with a name of its own."""
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"objective {spec!r} must define {' and '.join(missing)}; see {found.__mro__[1].__name__}")
    if "__dataclass_fields__" not in vars(found):
        raise ValueError(
            f"objective {spec!r} must be a frozen dataclass, so that its hyperparameters are known; put "
            "@dataclass(frozen=True, kw_only=True) above it"
        )
    name = vars(found).get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in taken:
        raise ValueError(
            f"objective {spec!r} must have a name of its own, letters, digits and _.+- without a space; got {name!r}; "
            'write name: ClassVar[str] = "my_objective"'
        )
    reserved = sorted({f.name for f in fields(found)} & set(inspect.get_annotations(Objective)))
    if reserved:
        raise ValueError(
            f"objective {spec!r} must have {', '.join(reserved)} as class variables and not as hyperparameters; got "
            f"fields; write {reserved[0]}: ClassVar[...] = ..."
        )
    for option, known in (("normalizer", NORMALIZERS), ("advantage", ADVANTAGES)):
        if (got := getattr(found, option)) not in known:
            raise unknown_option(f"{option} of objective {spec!r}", got, known)
