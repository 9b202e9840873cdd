"""How far the ratios of an update have moved and what the gate made of them, over all tokens and by the sign of A.

Tails are described by quantiles of logarithms and not by means: a few ratios of several hundred would decide a mean.
"""

from __future__ import annotations

import numpy as np

from sapo.diagnostics.tokens import Floats, GatedTokens

QUANTILES = {"p001": 0.001, "p01": 0.01, "p50": 0.5, "p99": 0.99, "p999": 0.999}


def quantiles(values: Floats, ends: bool = True) -> dict[str, float]:
    """Return the order statistics at QUANTILES and the two ends; each is a measured value, none is interpolated.

    >>> quantiles(np.array([3.0, 1.0, 2.0]))
    {'p001': 1.0, 'p01': 1.0, 'p50': 2.0, 'p99': 3.0, 'p999': 3.0, 'min': 1.0, 'max': 3.0}
    """
    ordered = np.sort(values)
    places = [min(len(ordered) - 1, int(q * len(ordered))) for q in QUANTILES.values()]
    found = dict(zip(QUANTILES, ordered[places].tolist(), strict=True))
    return found | ({"min": ordered[0].item(), "max": ordered[-1].item()} if ends else {})


def ratio_figures(tokens: GatedTokens) -> dict[str, float]:
    """Return figures of r over all tokens, and of log r by the sign of A."""
    figures = {"ratio/abs_dev": np.abs(tokens.ratio_M - 1).mean().item()}
    figures |= {f"ratio/{name}": value for name, value in quantiles(tokens.ratio_M).items()}
    for side, own_M in tokens.sides.items():
        figures |= {f"log_ratio/{name}_{side}": v for name, v in quantiles(tokens.log_ratio_M[own_M]).items()}
    return figures


def gate_figures(weight_M: Floats, sides: dict[str, np.ndarray]) -> dict[str, float]:
    """Return figures of the gate weight f', over all tokens and by the sign of A."""
    figures = _weight_figures(weight_M)
    figures["gate/min"] = weight_M.min().item()
    for side, own_M in sides.items():
        figures |= {f"{name}_{side}": value for name, value in _weight_figures(weight_M[own_M]).items()}
    return figures


def _weight_figures(weight_M: Floats) -> dict[str, float]:
    return {
        "gate/eur": weight_M.mean().item(),
        "gate/effective_tokens": effective_tokens(weight_M),
        "gate/below_half": np.count_nonzero(weight_M < 0.5) / len(weight_M),
        "gate/below_tenth": np.count_nonzero(weight_M < 0.1) / len(weight_M),
    }


def effective_tokens(weight_M: Floats) -> float:
    """Return Kish's effective sample size, as `sapo.objectives.effective_tokens`; 0 when nothing weighs anything."""
    largest = np.abs(weight_M).max()
    if largest == 0:
        return 0.0
    scaled = weight_M / largest  # squares of weights in a far tail would underflow to 0 / 0
    return float(scaled.sum() ** 2 / (scaled @ scaled))


def tail_figures(tokens: GatedTokens) -> dict[str, float]:
    """Return quantiles of the gate weight and of the slope's coefficient f'(r) r, by the sign of A.

    The coefficient is slope / A, what an advantage is multiplied with on grad log pi; a token with A = 0 has none.
    """
    figures: dict[str, float] = {}
    for side, own_M in tokens.sides.items():
        figures |= {f"gate/{name}_{side}": value for name, value in quantiles(tokens.weight_M[own_M]).items()}
        advantage_M, slope_M = tokens.advantage_M[own_M], tokens.slope_M[own_M]
        if side == "neg" and (spread_M := advantage_M != 0).sum() < len(advantage_M):
            advantage_M, slope_M = advantage_M[spread_M], slope_M[spread_M]
        if len(advantage_M):
            figures |= {f"slope/{name}_{side}": v for name, v in quantiles(slope_M / advantage_M).items()}
    return figures
