"""Figures of one update: how far the policy has moved and what the gate made of it. docs/metrics.md defines each.

All figures are over the response tokens that carried a gradient, in float64. Without a KL penalty these are the tokens
of groups whose rewards differ. With one, the tokens of zero-variance groups carry the penalty's gradient: `kl`,
`entropy` and `tokens/gradient` count them. Figures of ratios, gate and theory, and figures by the sign of the
advantage, leave them out, because no gate weighs an advantage of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sapo.diagnostics.ratios import gate_figures, ratio_figures, tail_figures
from sapo.diagnostics.sampler_gap import MISMATCH_METRICS, mismatch_metrics
from sapo.diagnostics.sequences import SequenceFigures, sequence_figures, theory_figures
from sapo.diagnostics.tokens import GatedTokens, gated_tokens
from sapo.objectives import TAU_NEG, TAU_POS
from sapo.training.update_result import UpdateResult

# Means over the updates of a step, as update/NAME.
OF_A_STEP = (
    "loss",
    "grad_norm",
    "entropy",
    "entropy_pos",
    "entropy_neg",
    "kl",
    "gate/eur",
    "gate/eur_pos",
    "gate/eur_neg",
    "gate/effective_tokens",
    "gate/below_half",
    "gate/below_tenth",
    "ratio/abs_dev",
    "theory/variance_mean",
    "theory/low_variance_share",
    "routing/changed_share",
    *MISMATCH_METRICS,
)

# The same apart for updates at the weights that sampled and for the later ones, as on_policy/NAME and off_policy/NAME.
BY_POLICY = ("grad_norm", "gate/eur", "gate/below_half", "ratio/abs_dev", "theory/variance_mean")

OF_A_TASK = ("entropy", "gate/eur", "gate/below_half", "ratio/abs_dev", "theory/variance_mean")


def update_metrics(result: UpdateResult, *, tau_pos: float = TAU_POS, tau_neg: float = TAU_NEG) -> dict[str, float]:
    """Return the figures of one update.

    Args:
        result: what the trainer measured.
        tau_pos, tau_neg: temperatures of the sequence gate that D_i compares with; the objective's where it has them.
    """
    if result.skipped:
        return {}
    tokens = gated_tokens(result)
    sequences = sequence_figures(tokens, tau_pos=tau_pos, tau_neg=tau_neg) if len(tokens) else None
    return figures_of_update(result, tokens, sequences)


def figures_of_update(result: UpdateResult, tokens: GatedTokens, sequences: SequenceFigures | None) -> dict[str, float]:
    """Return `update_metrics` of what has been fetched and measured already."""
    metrics = {"loss": result.loss, "grad_norm": result.grad_norm}
    if sequences is not None:
        metrics |= ratio_figures(tokens) | gate_figures(tokens.weight_M, tokens.sides) | tail_figures(tokens)
        metrics |= theory_figures(sequences)
    if result.entropy_M is not None:
        metrics["entropy"] = result.entropy_M.double().mean().item()
    if tokens.entropy_M is not None:
        metrics |= {f"entropy_{side}": tokens.entropy_M[own_M].mean().item() for side, own_M in tokens.sides.items()}
    if result.kl_M is not None:
        metrics["kl"] = result.kl_M.mean().item()
    if result.changed_share is not None:
        metrics["routing/changed_share"] = result.changed_share
    metrics |= mismatch_metrics(result)
    metrics["tokens/gradient"] = result.log_ratio_M.numel()
    metrics["tokens/packed"] = result.num_packed_tokens
    return metrics


def gate_metrics(log_ratio_M: Tensor, weight_M: Tensor, advantage_M: Tensor) -> dict[str, float]:
    """Return how far the ratios have moved and what the gate left of them; nothing without tokens.

    Args:
        log_ratio_M: log r of each token, float64.
        weight_M: gate weight f' of each.
        advantage_M: whose sign tells the sides apart; a side without tokens is left out.
    """
    if not log_ratio_M.numel():
        return {}
    z_M, w_M, a_M = (t.detach().double().cpu().numpy() for t in (log_ratio_M, weight_M, advantage_M))
    tokens = GatedTokens(z_M, w_M, w_M, a_M, sequence_M=np.zeros(len(z_M), dtype=np.int64), sequence_ids=(0,))
    return ratio_figures(tokens) | gate_figures(tokens.weight_M, tokens.sides)


def task_update_metrics(result: UpdateResult, tasks: Sequence[str]) -> dict[str, float]:
    """Return `task/<name>/...`, what the gate made of each task with a token that carried a gradient.

    Args:
        tasks: the task of each sequence of the mini-batch, those without a gradient counted.
    """
    if result.skipped:
        return {}
    return task_figures(gated_tokens(result), tasks)


def task_figures(
    tokens: GatedTokens, tasks: Sequence[str], sequences: SequenceFigures | None = None
) -> dict[str, float]:
    """Return `task_update_metrics` of what has been fetched already; with Var_i where it has been measured."""
    of_sequence = np.array([tasks[i] for i in tokens.sequence_ids])
    metrics: dict[str, float] = {}
    for name in sorted(set(of_sequence.tolist())):
        own_B = of_sequence == name
        own_M = np.repeat(own_B, tokens.lengths_B)
        weight_M = tokens.weight_M[own_M]
        figures: dict[str, float] = {
            "gate/eur": weight_M.mean().item(),
            "gate/below_half": np.count_nonzero(weight_M < 0.5) / len(weight_M),
            "ratio/abs_dev": np.abs(tokens.ratio_M[own_M] - 1).mean().item(),
            "tokens/gradient": int(own_M.sum()),
        }
        if sequences is not None:
            figures["theory/variance_mean"] = sequences.variance_B[own_B].mean().item()
        if tokens.entropy_M is not None:
            figures["entropy"] = tokens.entropy_M[own_M].mean().item()
        metrics |= {f"task/{name}/{key}": value for key, value in figures.items()}
    return metrics


def step_update_metrics(updates: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """Average over the updates of a step that moved the weights.

    The means are `update/...` and `task/<name>/update/...`; over the updates at the weights that sampled alone they are
    `on_policy/...`, and over the later ones `off_policy/...`.

    Args:
        updates: figures of each update, with `skipped` and, for the two apart, `on_policy`.
        tasks: of the run.
    """
    done = [u for u in updates if not u["skipped"]]
    metrics = _means(done, "update/", OF_A_STEP)
    for task in tasks:
        metrics |= _means(done, f"task/{task}/update/", OF_A_TASK, prefix=f"task/{task}/")
    for name, on_policy in (("on_policy/", True), ("off_policy/", False)):
        metrics |= _means([u for u in done if u.get("on_policy") is on_policy], name, BY_POLICY)
    if done and "ratio/abs_dev" in done[0]:  # the first that moved the weights: those before it were skipped
        metrics["first_update/ratio/abs_dev"] = done[0]["ratio/abs_dev"]
    metrics["updates/skipped"] = len(updates) - len(done)
    return metrics


def _means(updates: Sequence[Mapping[str, Any]], to: str, names: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Average the figures that some update has, under `to`."""
    metrics: dict[str, float] = {}
    for name in names:
        values = [u[prefix + name] for u in updates if prefix + name in u]
        if values:
            metrics[to + name] = sum(values) / len(values)
    return metrics
