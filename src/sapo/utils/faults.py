"""Tell programming errors of this package from what other people's code cannot do.

The proofs at loading (model/proof.py, rollout/local/proof.py) run models that nobody here has seen: whatever their code
raises is a reason to run them another way. An `AttributeError` from this package's own lines is a bug of ours, and a
slower way would hide it.
"""

from __future__ import annotations

from pathlib import Path

from sapo.utils.text import first_line

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


def memory_failure(error: BaseException) -> str | None:
    """Return what was said where the machine or a GPU had no more memory; None for an error of another kind.

    torch has a class for GPUs alone; what its allocator of the machine's memory raises is told by its words.

    >>> memory_failure(MemoryError("no room for 3 GiB"))
    'no room for 3 GiB'
    >>> memory_failure(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    >>> memory_failure(RuntimeError("x")) is None
    True
    """
    of_a_gpu = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    of_the_machine = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    if isinstance(error, MemoryError) or of_a_gpu or of_the_machine:
        return first_line(error) or type(error).__name__
    return None
