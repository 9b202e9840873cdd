"""The user's mistake in a model, and how messages of ours quote another library's."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be used as it is; the message says what is missing."""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, for a message of ours that quotes it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
