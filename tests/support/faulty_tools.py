"""A tool of a user's own."""


def twice(n: int) -> int:
    """Double a number.

    Args:
        n: the number.
    """
    return 2 * n
