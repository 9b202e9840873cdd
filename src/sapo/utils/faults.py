"""Tell programming errors of this package from what other people's code cannot do.

The proofs at loading (model/proof.py, rollout/local/proof.py) run models that nobody here has seen: whatever their code
raises is a reason to run them another way. An `AttributeError` from this package's own lines is a bug of ours, and a
slower way would hide it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_MISTAKES = (NameError, AttributeError, TypeError, LookupError, AssertionError, ArithmeticError, ImportError)
"""Exceptions that mean a mistake in the program where a line of this package raises them."""


def is_bug_of_ours(error: BaseException) -> bool:
    """Return whether an exception is a programming error that a line of this package has raised.

    What a call into torch or transformers raises is theirs, and so is a `ValueError` or `RuntimeError` of shapes that
    do not fit.

    >>> is_bug_of_ours(AttributeError("never raised")), is_bug_of_ours(ValueError("a refusal"))
    (False, False)
    """
    if not isinstance(error, _MISTAKES):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return False
    return Path(frame.tb_frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE)
