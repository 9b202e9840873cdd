"""Compact histograms and a scatter of one update, from which a page draws figures without the tokens: Figures 2 and 3
of https://arxiv.org/abs/2511.20347.

Edges are the same in every run, so that histograms of updates, steps and runs add up; the record repeats them, so that
it can be read alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sapo.diagnostics.sequences import SequenceFigures
from sapo.diagnostics.tokens import Floats, GatedTokens

_STEPS = np.logspace(-4, 1, 41)  # eight bins to a decade: finer tells nothing, coarser hides the shoulder

LOG_RATIO_EDGES: Floats = np.concatenate([-_STEPS[::-1], _STEPS])
"""Of log r, in nats: logarithmic on both sides of a bin that holds what did not move, |log r| < 1e-4. Ratios from e^-10
to e^10; the two ends are counted apart."""

VARIANCE_EDGES: Floats = np.logspace(-8, 2, 41)
"""Of Var_i, in nats squared, four bins to a decade."""

WEIGHT_EDGES: Floats = np.linspace(0, 1, 21)
"""Of the gate weight."""

SCATTER_POINTS = 64
"""Most sequences of the scatter."""


def distribution_record(tokens: GatedTokens, sequences: SequenceFigures) -> dict[str, Any]:
    """Return an update's line of kind "distribution" in metrics.jsonl, without step and update.

    `log_ratio` and `gate_weight` are over tokens by the sign of A, `variance` over sequences, each with `edges`. A list
    of counts has one entry more than `edges` at either end: what lies below the first edge and what lies at or above
    the last. `scatter` holds at most SCATTER_POINTS sequences, evenly spaced in the order of Var_i, the largest among
    them.
    """
    of_tokens = {"log_ratio": (tokens.log_ratio_M, LOG_RATIO_EDGES), "gate_weight": (tokens.weight_M, WEIGHT_EDGES)}
    record: dict[str, Any] = {
        name: {"edges": _rounded(edges)}
        | {side: histogram(values_M[own_M], edges) for side, own_M in tokens.sides.items()}
        for name, (values_M, edges) in of_tokens.items()
    }
    variance_B = sequences.variance_B
    record["variance"] = {"edges": _rounded(VARIANCE_EDGES), "count": histogram(variance_B, VARIANCE_EDGES)}
    chosen = np.argsort(variance_B, kind="stable")[spread_out(len(variance_B), SCATTER_POINTS)]
    record["scatter"] = {
        "variance": variance_B[chosen].tolist(),
        "discrepancy": sequences.discrepancy_B[chosen].tolist(),
        "bound": sequences.bound_B[chosen].tolist(),
        "positive": tokens.positive_B[chosen].tolist(),
    }
    return record


def histogram(values: Floats, edges: Floats) -> list[int]:
    """Count below the first edge, in [edge, next edge), and at or above the last: len(edges) + 1 counts.

    >>> histogram(np.array([-1.0, 0.0, 0.5, 2.0, 9.0]), np.array([0.0, 1.0, 2.0]))
    [1, 2, 0, 2]
    """
    counts: list[int] = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1).tolist()
    return counts


def spread_out(count: int, most: int) -> list[int]:
    """Return at most `most` places among `count`, evenly spaced, the first and the last among them.

    >>> spread_out(10, 4), spread_out(3, 4)
    ([0, 3, 6, 9], [0, 1, 2])
    """
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _rounded(edges: Floats) -> list[float]:
    """Round to six digits: an edge is a convention, and need not be written with seventeen."""
    return [float(f"{edge:.6g}") for edge in edges.tolist()]
