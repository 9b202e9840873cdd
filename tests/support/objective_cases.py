"""Every objective in every variant, and one small ragged batch: what the tests of this folder share."""

from __future__ import annotations

import torch
from torch import Tensor

from sapo.objectives import GATES, NORMALIZERS, Objective, Surrogate

# Temperatures and clips chosen so that the batch below has tokens on both sides of each gate, unlike the defaults.
VARIANTS: list[tuple[str, dict[str, object]]] = [
    *(
        ("sapo", {"gate": gate, "side": side, "tau_pos": 1.3, "tau_neg": 2.1})
        for gate in GATES
        for side in ("both", "drift")
    ),
    ("grpo", {"eps_low": 0.2, "eps_high": 0.27}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("gspo_token", {"eps_low": 0.1, "eps_high": 0.15}),
    ("sapo_seq", {"tau_pos": 1.3, "tau_neg": 2.1}),
    ("dr_grpo", {"eps_low": 0.2, "eps_high": 0.2}),
    ("dapo", {"eps_low": 0.2, "eps_high": 0.28}),
    ("minirl", {"eps_low": 0.2, "eps_high": 0.27}),
    ("reinforce", {}),
    ("rloo", {"eps_low": 0.4, "eps_high": 0.5}),
    ("cispo", {"ratio_cap": 1.2}),
    ("maspo", {"sigma": 0.6, "alpha": 0.4, "beta_pos": 0.5, "beta_neg": 0.3}),
    ("gmpo", {"log_low": 0.3, "log_high": 0.2}),
    ("luspo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("vespo", {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}),
    ("dppo_tv", {"tv_low": 0.1, "tv_high": 0.2, "ratio_cap": 1.4}),
]
UNGATED = {"reinforce"}
"""Objectives whose gate is 1 everywhere."""
AMPLIFYING = {"vespo"}
"""Objectives whose gate weight exceeds 1 somewhere, as their source has it."""
VARIANT_IDS = ["-".join([name, *(str(hyper[k]) for k in ("gate", "side") if k in hyper)]) for name, hyper in VARIANTS]
NORMALIZER_OPTIONS = [{"normalizer": n, "max_length": 9 if n == "constant_length" else None} for n in NORMALIZERS]

OLD_LOGPROB = -1.0
"""log pi_old of every token of the batch: a probability of 0.37."""
LENGTHS = (3, 1, 0, 5, 4, 2)
ADVANTAGES = (0.7, -1.2, 0.5, -0.4, 1.5, 0.0)
DRIFTS = (0.4, -0.5, 0.0, 0.2, -0.2, 0.3)
"""Mean log-ratio of each sequence: the first two have drifted the way their advantage pushes, the others have not."""


def flat_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, int]:
    """Log-ratios, advantages and sequence ids of the ragged batch, flat; one sequence is empty, one has A = 0."""
    sequence_M = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    generator = torch.Generator().manual_seed(5)
    noise_M = 0.3 * torch.randn(sequence_M.numel(), generator=generator, dtype=torch.float64)
    log_ratio_M = torch.tensor(DRIFTS, dtype=torch.float64)[sequence_M] + noise_M
    advantages_M = torch.tensor(ADVANTAGES, dtype=torch.float64)[sequence_M]
    return log_ratio_M.to(dtype), advantages_M.to(dtype), sequence_M, len(LENGTHS)


def padded_batch(dtype: torch.dtype = torch.float64, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same batch as (B, width): logp, logp_old, advantages (B,), mask. Padding holds zeros."""
    log_ratio_M, _, _, batch = flat_batch()
    mask_BT = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    logp_old_BT = torch.where(mask_BT, OLD_LOGPROB, 0.0).double()
    logp_BT = logp_old_BT.clone()
    logp_BT[mask_BT] += log_ratio_M
    assert mask_BT.shape == (batch, width)
    return logp_BT.to(dtype), logp_old_BT.to(dtype), torch.tensor(ADVANTAGES, dtype=dtype), mask_BT


def leaf(values: Tensor) -> Tensor:
    """A copy that collects gradient."""
    return values.clone().requires_grad_(True)


def evaluate(
    objective: Objective, log_ratio_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int
) -> Surrogate:
    """The objective's surrogate where every token has log pi_old = OLD_LOGPROB."""
    old_logprob_M = torch.full_like(advantages_M, OLD_LOGPROB)
    return objective.surrogate(log_ratio_M, advantages_M, sequence_M, num_sequences, old_logprob_M)
