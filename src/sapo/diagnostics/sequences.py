"""When the token gates of an update act like one sequence gate: what equations (16)-(23) of
https://arxiv.org/abs/2511.20347 assume, and what the assumption costs, measured sequence by sequence in float64.

SAPO's update of sequence i is mean_t f'(r_it) r_it A_i grad log pi(y_it). With (A1) r near 1, f'(r_it) r_it becomes
g(z_it), g(z) = sech^2(tau z / 2); with (A2) small Var_i, mean_t g(z_it) becomes g(mu_i). Measured here:

    D_i = | mean_t g(z_it) - g(mu_i) | <= (tau^2 / 4) Var_i             what A2 costs, and its bound (21)
    E_i = | mean_t f'(r_it) r_it - g(mu_i) |                            what A1 and A2 cost a sequence together
    | mean_t f'(r_it) - mean_t g(z_it) |                                what writing log r for r - 1 (17) costs its gate

with f' the sigmoid gate of SAPO at the temperatures given, whichever objective is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sapo.diagnostics.tokens import Floats, GatedTokens

# Within this variance of the log-ratios the paper's assumption A2 holds for a sequence (its Figures 2 and 3).
LOW_VARIANCE = 0.02

# Within this |r - 1| assumption A1 holds for a token: log r then differs from r - 1 by at most .005.
NEAR_ONE = 0.1

# A sequence of which this share of tokens is near 1 is mostly so.
MOST_TOKENS = 0.95


@dataclass(frozen=True)
class SequenceFigures:
    """Figures of B sequences, each (B,) float64.

    >>> two = GatedTokens(np.log([1.0, 1.5]), np.ones(2), np.ones(2), np.ones(2), np.array([0, 0]), (0,))
    >>> figures = sequence_figures(two, tau_pos=1.0, tau_neg=1.05)
    >>> bool(0 < figures.discrepancy_B[0] <= figures.bound_B[0] == figures.variance_B[0] / 4)
    True
    """

    variance_B: Floats
    """Var_i = mean_t (z_it - mu_i)^2."""
    discrepancy_B: Floats
    """D_i."""
    bound_B: Floats
    """(tau^2 / 4) Var_i."""
    error_B: Floats
    """E_i."""
    log_error_B: Floats
    """What (17) alone costs the mean gate."""
    near_one_B: Floats
    """Share of tokens with |r - 1| <= NEAR_ONE."""
    slope_error: float | None
    """||v - u|| / ||v|| over all tokens: v_it = w_i f'(r_it) r_it A_i is what SAPO puts on grad log pi(y_it) and
    u_it = w_i g(mu_i) A_i what its sequence gate would, w_i the weight of the loss (1 where it was not kept);
    None where every advantage is 0."""


def sequence_figures(tokens: GatedTokens, *, tau_pos: float, tau_neg: float) -> SequenceFigures:
    """Return figures of every sequence of an update; there must be a token."""
    z_M, lengths_B = tokens.log_ratio_M, tokens.lengths_B
    tau_B = np.where(tokens.positive_B, tau_pos, tau_neg)
    tau_M = np.repeat(tau_B, lengths_B)
    mean_B = tokens.sequence_mean(z_M)
    variance_B = tokens.sequence_mean(np.square(z_M - np.repeat(mean_B, lengths_B)))
    gate_B = sech_squared(tau_B * mean_B / 2)
    log_gate_B = tokens.sequence_mean(sech_squared(tau_M * z_M / 2))
    drift_M = tokens.ratio_M - 1
    weight_M = sech_squared(tau_M * drift_M / 2)
    coefficient_M = weight_M * tokens.ratio_M
    scale_M = tokens.advantage_M if tokens.loss_weight_M is None else tokens.advantage_M * tokens.loss_weight_M
    slope_M = coefficient_M * scale_M
    difference_M = slope_M - np.repeat(gate_B, lengths_B) * scale_M
    norm = float(np.linalg.norm(slope_M))
    return SequenceFigures(
        variance_B=variance_B,
        discrepancy_B=np.abs(log_gate_B - gate_B),
        bound_B=np.square(tau_B) / 4 * variance_B,
        error_B=np.abs(tokens.sequence_mean(coefficient_M) - gate_B),
        log_error_B=np.abs(tokens.sequence_mean(weight_M) - log_gate_B),
        near_one_B=tokens.sequence_mean((np.abs(drift_M) <= NEAR_ONE).astype(np.float64)),
        slope_error=float(np.linalg.norm(difference_M)) / norm if norm else None,
    )


def theory_figures(sequences: SequenceFigures) -> dict[str, float]:
    """Return figures over the sequences of an update, under the names of metrics.jsonl."""
    variance_B, discrepancy_B = sequences.variance_B, sequences.discrepancy_B
    count = len(variance_B)
    error = {} if sequences.slope_error is None else {"theory/slope_error": sequences.slope_error}
    return {
        "theory/variance_mean": variance_B.mean().item(),
        "theory/variance_max": variance_B.max().item(),
        "theory/low_variance_share": np.count_nonzero(variance_B < LOW_VARIANCE) / count,
        "theory/near_one_share": np.count_nonzero(sequences.near_one_B == 1) / count,
        "theory/mostly_near_one_share": np.count_nonzero(sequences.near_one_B >= MOST_TOKENS) / count,
        "theory/discrepancy_mean": discrepancy_B.mean().item(),
        "theory/discrepancy_max": discrepancy_B.max().item(),
        "theory/bound_violations": int(np.count_nonzero(discrepancy_B > sequences.bound_B + 1e-12)),
        "theory/gate_error_mean": sequences.error_B.mean().item(),
        "theory/gate_error_max": sequences.error_B.max().item(),
        "theory/log_gate_error_mean": sequences.log_error_B.mean().item(),
        **error,
    }


def sech_squared(x: Floats) -> Floats:
    """Compute sech^2(x) as 4 e / (1 + e)^2 with e = exp(-2 |x|): 1 / cosh^2 would overflow."""
    e = np.exp(-2 * np.abs(x))
    result: Floats = 4 * e / np.square(1 + e)
    return result
