"""Tools of a user's own."""

import os


def twice(n: int) -> int:
    """Double a number.

    Args:
        n: the number.
    """
    return 2 * n


def where() -> int:
    """Return the process id of who calls."""
    return os.getpid()
