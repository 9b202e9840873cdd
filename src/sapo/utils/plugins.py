"""Import what a recipe names as `module:attribute`: a verifier, an engine, any part that is the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from sapo.errors import UserError
from sapo.utils.names import did_you_mean


def import_named(spec: str, *, what: str, noun: str, error: type[UserError]) -> Any:
    """Return the attribute of a module that `module:attribute` names.

    The current directory is searched last, after sys.path, and stays on it.

    Args:
        spec: as a recipe writes it.
        what: begins the error message, as in "verifier".
        noun: what the attribute has to be, as in "function"; it must be callable.
        error: the class of error to raise.

    Raises:
        UserError: of the class given. No such module or attribute, or the import failed.
    """
    module_name, _, name = spec.partition(":")
    # Last on the path, and for good: a console script has no current directory there, a file of the user's must not
    # shadow the standard library, and a module may import its neighbours late.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as failure:
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())
        raise error(
            f"{what} {spec!r}: importing {module_name!r} failed: {reason}; run from the directory that has it"
        ) from failure
    found = getattr(module, name, None)
    if found is None or not callable(found):
        hint = did_you_mean(name, (n for n, value in vars(module).items() if callable(value)))
        where = getattr(module, "__file__", None) or module_name
        raise error(f"{what} {spec!r}: {where} has no {noun} {name!r}{hint}")
    return found
