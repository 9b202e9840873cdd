"""Figures of one update: how far the policy has moved and what the gate made of it.

All figures are over the response tokens that carried a gradient, in float64: those of groups with some variance. With a
KL penalty the tokens of other groups carry one too, the penalty's: `kl`, `entropy` and `tokens/gradient` count them.
Figures of ratios, gate and theory leave them out, whose advantage of 0 no gate weighs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sapo.diagnostics.mismatch import MISMATCH_METRICS, mismatch_metrics
from sapo.objectives import (
    LOG_RATIO_LIMIT,
    discrepancy_bound,
    effective_tokens,
    effective_update_ratio,
    gate_discrepancy,
    variance,
)
from sapo.training.trainer import UpdateResult

RATIO_QUANTILES = {"p001": 0.001, "p01": 0.01, "p50": 0.5, "p99": 0.99, "p999": 0.999}

# Within this variance of the log-ratios the paper's assumption A2 holds for a sequence (its Figures 2 and 3).
LOW_VARIANCE = 0.02


def update_metrics(result: UpdateResult, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> dict[str, float]:
    """Figures of one update.

    Args:
        result: what the trainer measured.
        tau_pos, tau_neg: temperatures of the sequence gate that D_i compares with; the objective's where it has them.
    """
    if result.skipped:
        return {}
    metrics = {"loss": result.loss, "grad_norm": result.grad_norm}
    gated = _gated(result)
    metrics |= gate_metrics(gated.log_ratio_M, gated.weight_M, gated.advantage_M)
    if gated.log_ratio_M.numel():
        metrics |= _theory_metrics(gated, tau_pos, tau_neg)
    if result.entropy_M is not None:
        metrics["entropy"] = result.entropy_M.double().mean().item()
    if result.kl_M is not None:
        metrics["kl"] = result.kl_M.mean().item()
    if result.changed_share is not None:
        metrics["routing/changed_share"] = result.changed_share
    metrics |= mismatch_metrics(result)
    metrics["tokens/gradient"] = result.log_ratio_M.numel()
    metrics["tokens/packed"] = result.num_packed_tokens
    return metrics


def _gated(result: UpdateResult) -> UpdateResult:
    """The tokens that the objective's gate weighs: all, but for those that only a KL penalty brought along."""
    if result.kl_M is None:
        return result
    kept_M = result.advantage_M != 0
    numbers, sequence_M = torch.unique(result.sequence_M[kept_M], return_inverse=True)
    return replace(
        result,
        log_ratio_M=result.log_ratio_M[kept_M],
        weight_M=result.weight_M[kept_M],
        slope_M=result.slope_M[kept_M],
        advantage_M=result.advantage_M[kept_M],
        sequence_M=sequence_M,
        sequence_ids=tuple(result.sequence_ids[i] for i in numbers.tolist()),
        entropy_M=None if result.entropy_M is None else result.entropy_M[kept_M],
        kl_M=None,
    )


def gate_metrics(log_ratio_M: Tensor, weight_M: Tensor, advantage_M: Tensor) -> dict[str, float]:
    """How far the ratios have moved and what the gate left of them; nothing without tokens.

    Args:
        log_ratio_M: log r of each token, float64.
        weight_M: gate weight f' of each.
        advantage_M: whose sign tells the sides apart; a side without tokens is left out.
    """
    if not log_ratio_M.numel():
        return {}
    metrics = _ratio_metrics(log_ratio_M)
    metrics |= {
        "gate/eur": effective_update_ratio(weight_M).item(),
        "gate/effective_tokens": effective_tokens(weight_M).item(),
        "gate/below_half": (weight_M < 0.5).double().mean().item(),
        "gate/min": weight_M.min().item(),
    }
    for name, side_M in (("pos", advantage_M > 0), ("neg", advantage_M <= 0)):
        if side_M.any():
            metrics[f"gate/eur_{name}"] = effective_update_ratio(weight_M[side_M]).item()
    return metrics


def task_update_metrics(result: UpdateResult, tasks: Sequence[str]) -> dict[str, float]:
    """What the gate made of each task, as `task/<name>/...`; of those with a token that carried a gradient.

    Args:
        tasks: the task of each sequence of the mini-batch, those without a gradient counted.
    """
    if result.skipped:
        return {}
    result = _gated(result)
    names = sorted({tasks[i] for i in result.sequence_ids})
    number = torch.tensor([names.index(tasks[i]) for i in result.sequence_ids], device=result.sequence_M.device)
    task_M = number[result.sequence_M]
    metrics: dict[str, float] = {}
    for i, name in enumerate(names):
        own_M = task_M == i
        metrics[f"task/{name}/gate/eur"] = effective_update_ratio(result.weight_M[own_M]).item()
        metrics[f"task/{name}/tokens/gradient"] = int(own_M.sum())
        if result.entropy_M is not None:
            metrics[f"task/{name}/entropy"] = result.entropy_M[own_M].double().mean().item()
    return metrics


def step_update_metrics(updates: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """Means over the updates of a step that moved the weights, as `update/...` and `task/<name>/update/...`.

    Args:
        updates: figures of each update, with `skipped`.
        tasks: of the run.
    """
    done = [u for u in updates if not u["skipped"]]
    figures = ("loss", "grad_norm", "entropy", "kl", "gate/eur", "gate/effective_tokens", "ratio/abs_dev")
    names = [("", n) for n in (*figures, "routing/changed_share", *MISMATCH_METRICS)]
    names += [(f"task/{task}/", n) for task in tasks for n in ("entropy", "gate/eur")]
    metrics: dict[str, float] = {}
    for prefix, name in names:
        values = [u[prefix + name] for u in done if prefix + name in u]
        if values:
            metrics[f"{prefix}update/{name}"] = sum(values) / len(values)
    if done and "ratio/abs_dev" in done[0]:  # the first that moved the weights: those before it were skipped
        metrics["first_update/ratio/abs_dev"] = done[0]["ratio/abs_dev"]
    metrics["updates/skipped"] = len(updates) - len(done)
    return metrics


def _ratio_metrics(log_ratio_M: Tensor) -> dict[str, float]:
    ratio_M = log_ratio_M.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    metrics = {"ratio/abs_dev": (ratio_M - 1).abs().mean().item()}
    ordered = ratio_M.sort().values
    for name, quantile in RATIO_QUANTILES.items():  # torch.quantile refuses more than 16 million elements
        metrics[f"ratio/{name}"] = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))].item()
    metrics |= {"ratio/min": ordered[0].item(), "ratio/max": ordered[-1].item()}
    return metrics


def _theory_metrics(result: UpdateResult, tau_pos: float, tau_neg: float) -> dict[str, float]:
    """Var_i, D_i and how much of the bound (21) it uses."""
    sequence_M = result.sequence_M
    count = int(sequence_M[-1]) + 1
    variance_B = variance(result.log_ratio_M, sequence_M, count)
    advantage_B = torch.zeros(count, dtype=torch.float64, device=sequence_M.device)
    advantage_B[sequence_M] = result.advantage_M.double()
    tau_B = torch.where(advantage_B > 0, tau_pos, tau_neg).double()
    discrepancy_B = gate_discrepancy(result.log_ratio_M, sequence_M, count, tau=tau_B)
    bound_B = discrepancy_bound(result.log_ratio_M, sequence_M, count, tau=tau_B)
    return {
        "theory/variance_mean": variance_B.mean().item(),
        "theory/variance_max": variance_B.max().item(),
        "theory/low_variance_share": (variance_B < LOW_VARIANCE).double().mean().item(),
        "theory/discrepancy_mean": discrepancy_B.mean().item(),
        "theory/discrepancy_max": discrepancy_B.max().item(),
        "theory/bound_violations": int((discrepancy_B > bound_B + 1e-12).sum()),
    }
