"""How long a sequence may be before a rotary embedding turns all of its tokens otherwise.

Longrope takes other frequencies for every token once a forward holds a position beyond the original length, and
dynamic NTK does so beyond the positions of its config. One long row would then change the log-probabilities of the
others in its micro-batch, and a token drawn early would have another probability when the row is trained on. Up to
that length the frequencies are fixed, and a row is the same function alone and among others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def fixed_length(config: Any) -> tuple[int, str] | None:
    """Return the tokens up to which the frequencies do not depend on the length of a forward, and the embedding's name.

    Args:
        config: of the text model.

    Returns:
        None where they never do.
    """
    limits = list(_limits(config))
    return min(limits) if limits else None


def longest_sequence(config: Any) -> int | None:
    """Return the most tokens of a sequence: the positions of the config, and no more than `fixed_length`."""
    fixed = fixed_length(config)
    limits = (getattr(config, "max_position_embeddings", None), None if fixed is None else fixed[0])
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _limits(config: Any) -> Iterator[tuple[int, str]]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = parameters.values() if all(isinstance(p, Mapping) for p in parameters.values()) else [parameters]
    for rope in each:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        positions = getattr(config, "max_position_embeddings", None)
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = positions if "dynamic" in kind else original or positions
        if limit and (kind == "longrope" or "dynamic" in kind):
            yield int(limit), kind
