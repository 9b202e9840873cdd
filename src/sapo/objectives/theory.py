"""Measures of when a token gate acts like a sequence gate, equations (16)-(22) of https://arxiv.org/abs/2511.20347,
and of the effective size of an update.

Pure functions, float64, of flat log-ratios z: `log_ratio_M` (M,) holds the tokens of all sequences and `sequence_M`
(M,) int64 the sequence of each; results are (B,) with B = `num_sequences`. A sequence without tokens gives 0.
Log-ratios are not clamped here, and are expected to be finite.

Departure: with A1, r - 1 ~ log r, the paper writes the token gate as g(z) = sech^2(tau z / 2), and so does this file;
the objective itself gates r - 1. The bound below is exact for g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapo.objectives.gates import sech_squared


def sequence_sum(values_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Sum over the tokens of each sequence; of log-ratios this is the log-ratio of the response. (M,) -> (B,)."""
    values = values_M.double()
    return values.new_zeros(num_sequences).index_add(0, sequence_M, values)


def sequence_mean(values_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Average over the tokens of each sequence; of log-ratios this is mu_i = log s_i. (M,) -> (B,), differentiable."""
    totals_B = sequence_sum(values_M, sequence_M, num_sequences)
    lengths_B = torch.bincount(sequence_M, minlength=num_sequences)
    return totals_B / lengths_B.clamp(min=1)


def variance(log_ratio_M: Tensor, sequence_M: Tensor, num_sequences: int) -> Tensor:
    """Compute Var_i = mean_t (z_it - mu_i)^2, the dispersion that (A2) asks to be small. (M,) -> (B,)."""
    means_B = sequence_mean(log_ratio_M, sequence_M, num_sequences)
    return sequence_mean((log_ratio_M.double() - means_B[sequence_M]).square(), sequence_M, num_sequences)


def sequence_gate(log_ratio: Tensor, tau: float | Tensor) -> Tensor:
    """Compute g(z) = sech^2(tau z / 2), equation (17); sup |g''| = tau^2 / 2, reached at z = 0. Elementwise."""
    return sech_squared(tau * log_ratio.double() / 2)


def gate_discrepancy(log_ratio_M: Tensor, sequence_M: Tensor, num_sequences: int, *, tau: float | Tensor) -> Tensor:
    """Compute D_i = | mean_t g(z_it) - g(mu_i) |, mean token gate less gate of the sequence. (M,) -> (B,).

    Args:
        tau: one temperature, or one for each sequence, (B,).
    """
    tau_B = torch.as_tensor(tau, dtype=torch.float64, device=log_ratio_M.device).expand(num_sequences)
    means_B = sequence_mean(log_ratio_M, sequence_M, num_sequences)
    token_gates_B = sequence_mean(sequence_gate(log_ratio_M, tau_B[sequence_M]), sequence_M, num_sequences)
    lengths_B = torch.bincount(sequence_M, minlength=num_sequences)
    # A sequence without tokens has mean gate 0 and g(0) = 1: there is nothing to compare.
    return torch.where(lengths_B > 0, (token_gates_B - sequence_gate(means_B, tau_B)).abs(), 0.0)


def discrepancy_bound(log_ratio_M: Tensor, sequence_M: Tensor, num_sequences: int, *, tau: float | Tensor) -> Tensor:
    """Compute (tau^2 / 4) Var_i, the bound (21) on D_i by Taylor's theorem and sup |g''|. (M,) -> (B,)."""
    tau_B = torch.as_tensor(tau, dtype=torch.float64, device=log_ratio_M.device)
    return tau_B.square() / 4 * variance(log_ratio_M, sequence_M, num_sequences)


def effective_update_ratio(weight_M: Tensor) -> Tensor:
    """Compute the EUR of https://arxiv.org/abs/2602.19345, the mean of f'(r), () float64; 0 without tokens.

    For a hard clip it is 1 - the clip fraction.
    """
    return weight_M.double().sum() / max(weight_M.numel(), 1)


def effective_tokens(weight_M: Tensor) -> Tensor:
    """Compute Kish's effective sample size of the gate weights, (sum w)^2 / sum w^2, () float64.

    It is M when all M weights are equal, and 0 when all are 0.
    """
    weight = weight_M.double()
    # Scale by the largest first: squares of weights in a far tail would underflow to 0 / 0.
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    scaled = weight / torch.where(largest == 0, 1.0, largest)
    squares = scaled.square().sum()
    return scaled.sum().square() / torch.where(squares == 0, 1.0, squares)
