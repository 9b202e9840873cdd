"""The objectives by name, and the loss and the gate weights of a padded batch.

`policy_loss` selects the response tokens, asks the objective for their values and weighs them by the normalizer. The
selection comes before any arithmetic, so that padding changes neither value nor gradient, even where it is NaN or inf.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sapo.objectives.checks import unknown_option
from sapo.objectives.normalizers import sequence_weights
from sapo.objectives.plugins import is_plugin, load_objective
from sapo.objectives.probability import DPPO, MASPO
from sapo.objectives.sequence import GMPO, GSPO, LUSPO, RLOO, VESPO, GSPOToken, SAPOSequence
from sapo.objectives.surrogates import Objective
from sapo.objectives.token import CISPO, DAPO, GRPO, SAPO, DrGRPO, MiniRL, Reinforce

OBJECTIVES: dict[str, type[Objective]] = {
    "sapo": SAPO,
    "grpo": GRPO,
    "gspo": GSPO,
    "gspo_token": GSPOToken,
    "sapo_seq": SAPOSequence,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "minirl": MiniRL,
    "reinforce": Reinforce,
    "rloo": RLOO,
    "cispo": CISPO,
    "maspo": MASPO,
    "gmpo": GMPO,
    "luspo": LUSPO,
    "vespo": VESPO,
    "dppo_tv": DPPO,
}


def find_objective(name: str) -> type[Objective]:
    """Return the class of an objective: one of OBJECTIVES, or a user's own as `module:Class`.

    >>> find_objective("dapo").normalizer
    'token_mean'

    Raises:
        ValueError: unknown name, or a class that cannot be imported or is no objective.
    """
    if is_plugin(name):
        return load_objective(name, taken=OBJECTIVES)
    if name not in OBJECTIVES:
        raise unknown_option("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def make_objective(name: str, **hyper: Any) -> Objective:
    """Make the objective of that name with these hyperparameters, and its own defaults for the others.

    >>> make_objective("sapo", tau_neg=1.1)
    SAPO(tau_pos=1.0, tau_neg=1.1, gate='sigmoid', side='both')

    Args:
        name: a name in OBJECTIVES, or `module:Class`.
        hyper: hyperparameters.

    Raises:
        ValueError: unknown name, a hyperparameter the objective does not have, or a value out of its range.
    """
    kind = find_objective(name)
    known = [field.name for field in fields(kind)]
    if hyper and not known:
        raise ValueError(f"{name} takes no hyperparameters; got {', '.join(hyper)}; leave it out")
    for option in hyper:
        if option not in known:
            raise unknown_option(f"hyperparameter of {name}", option, known)
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in hyper:
            raise ValueError(f"{name} needs a value for {field.name}, which has no default; got none; set it")
    try:
        return kind(**hyper)
    except Exception as error:
        if isinstance(error, ValueError) or not is_plugin(name):
            raise
        raise ValueError(f"objective {name!r} refuses its hyperparameters: {type(error).__name__}: {error}") from error


def policy_loss(
    name: str,
    logp_BT: Tensor,
    logp_old_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    normalizer: str | None = None,
    max_length: int | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    **hyper: Any,
) -> Tensor:
    """Compute the loss to minimise, equation (5) of https://arxiv.org/abs/2511.20347 with the objective's gate.

    Args:
        name: a name in OBJECTIVES, or `module:Class`; `hyper` are its hyperparameters.
        logp_BT: log pi_theta of each response token, (B, T); the loss is differentiable in it.
        logp_old_BT: log pi_old of the same tokens, (B, T); no gradient.
        advantages: (B,), or (B, T) for objectives that gate tokens; no gradient.
        mask_BT: which positions are response tokens, (B, T), bool or 0/1. A row may be empty.
        normalizer: a name in NORMALIZERS; the objective's own when left out, which is sequence_mean for SAPO, GRPO and
            GSPO.
        max_length, num_sequences, num_tokens: as in sequence_weights. For a micro-batch pass the counts of the whole
            mini-batch: the losses of its micro-batches then add up to its loss.

    Returns:
        Scalar in the dtype of `logp_BT`; 0 with a zero gradient when no token is a response token.

    Raises:
        ValueError: unknown options, shapes that do not fit, or advantages that vary within a sequence given to an
            objective that needs one for all of it.
    """
    objective = make_objective(name, **hyper)
    tokens = _flatten(objective, logp_BT, logp_old_BT, advantages, mask_BT)
    batch, selected = mask_BT.shape[0], tokens.selected_BT
    old_logprob_M = logp_old_BT.detach()[selected]
    log_ratio_M = logp_BT[selected] - old_logprob_M
    weights_B = sequence_weights(
        selected.sum(1),
        objective.normalizer if normalizer is None else normalizer,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        max_length=max_length,
    )
    surrogate = objective.surrogate(log_ratio_M, tokens.advantages_M, tokens.sequence_M, batch, old_logprob_M)
    return -(weights_B[tokens.sequence_M] * surrogate.value_M).sum().to(logp_BT.dtype)


@torch.no_grad()
def gate_weight(
    name: str,
    log_ratio_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    logp_old_BT: Tensor | None = None,
    **hyper: Any,
) -> Tensor:
    """Compute the gate weight f' of each response token, 0 at other positions; (B, T) in the dtype of the log-ratios.

    Args and errors are those of policy_loss, with log_ratio_BT = logp_BT - logp_old_BT. Objectives that gate by
    probability (`needs_old_logprob`) need `logp_old_BT` too; others ignore it. The mean over response tokens is the
    effective update ratio.
    """
    objective = make_objective(name, **hyper)
    other_BT = log_ratio_BT if logp_old_BT is None else logp_old_BT
    tokens = _flatten(objective, log_ratio_BT, other_BT, advantages, mask_BT)
    selected = tokens.selected_BT
    weight_BT = torch.zeros_like(log_ratio_BT)
    weight_BT[selected] = objective.surrogate(
        log_ratio_BT[selected],
        tokens.advantages_M,
        tokens.sequence_M,
        mask_BT.shape[0],
        None if logp_old_BT is None else logp_old_BT[selected],
    ).weight_M
    return weight_BT


@dataclass(frozen=True)
class _Tokens:
    """The response tokens of a padded batch.

    The mask [[1, 1, 0], [1, 0, 0]] gives sequence_M = [0, 0, 1].
    """

    selected_BT: Tensor
    advantages_M: Tensor
    sequence_M: Tensor


def _flatten(objective: Objective, logp_BT: Tensor, other_BT: Tensor, advantages: Tensor, mask_BT: Tensor) -> _Tokens:
    """Check the shapes of a padded batch and select its response tokens."""
    shape = tuple(logp_BT.shape)
    if len(shape) != 2 or not (tuple(other_BT.shape) == tuple(mask_BT.shape) == shape):
        raise ValueError(
            f"log-probabilities and mask must all be (B, T); got {shape}, {tuple(other_BT.shape)} "
            f"and mask {tuple(mask_BT.shape)}; pad them to one shape"
        )
    if tuple(advantages.shape) not in (shape, shape[:1]):
        raise ValueError(
            f"advantages must be (B,) = {shape[:1]} or (B, T) = {shape}; got {tuple(advantages.shape)}; "
            "pass one per sequence"
        )
    selected_BT = mask_BT.bool()
    if not torch.equal(selected_BT.to(mask_BT.dtype), mask_BT):
        raise ValueError("mask must be bool or hold only 0 and 1; got other values; the normalizer weighs tokens")
    sequence_M = selected_BT.nonzero()[:, 0]
    advantages_M = advantages[sequence_M] if advantages.dim() == 1 else advantages[selected_BT]
    if objective.shared_advantage and advantages.dim() == 2:
        _require_shared(objective.name, advantages_M, sequence_M, shape[0])
    return _Tokens(selected_BT, advantages_M, sequence_M)


def _require_shared(name: str, advantages_M: Tensor, sequence_M: Tensor, num_sequences: int) -> None:
    """Refuse advantages that differ within a sequence. A NaN passes, and comes out of the loss."""
    empty = advantages_M.new_zeros(num_sequences)
    highest_B = empty.scatter_reduce(0, sequence_M, advantages_M, "amax", include_self=False)
    lowest_B = empty.scatter_reduce(0, sequence_M, advantages_M, "amin", include_self=False)
    if bool((highest_B > lowest_B).any()):
        row = int((highest_B > lowest_B).nonzero()[0, 0])
        raise ValueError(
            f"{name} takes one advantage per sequence; got {lowest_B[row].item():g} to {highest_B[row].item():g} "
            f"within sequence {row}; pass advantages of shape (B,), or use gspo_token or sapo"
        )
