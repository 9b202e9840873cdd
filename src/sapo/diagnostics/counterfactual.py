"""Counterfactual gates: what other objectives would have done to the tokens of an update, from its log-ratios alone.

Every objective is asked about the same ratios, advantages and weights of the loss: those of the run. So the figures
compare gates and nothing else; they do not say what a run under another objective would have become.

On grad log pi of a token stands v = weight of the loss x slope. The vector v of another objective is compared with that
of the one in use by cosine and by norm. Gradients of the tokens are not orthogonal, so this is not the cosine of the
parameters' gradients: that is `Trainers.gradients`, at the price of a backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sapo.diagnostics.tokens import GatedTokens
from sapo.objectives import Objective


@torch.no_grad()
def counterfactual_figures(tokens: GatedTokens, objectives: Mapping[str, Objective]) -> dict[str, float]:
    """Return figures as counterfactual/LABEL/...: eur, silenced, below_tenth, cosine and norm_ratio.

    Args:
        tokens: of the update, with the weights of the loss and log pi_old.
        objectives: by label.

    Returns:
        Nothing without tokens. `cosine` and `norm_ratio` are left out where one of the two vectors is 0.
    """
    if not len(tokens):
        return {}
    assert tokens.loss_weight_M is not None
    log_ratio_M, advantage_M, sequence_M = (
        torch.from_numpy(array) for array in (tokens.log_ratio_M, tokens.advantage_M, tokens.sequence_M)
    )
    old_logprob_M = None if tokens.old_logprob_M is None else torch.from_numpy(tokens.old_logprob_M)
    used_M = tokens.loss_weight_M * tokens.slope_M
    used_norm = float(np.linalg.norm(used_M))
    figures: dict[str, float] = {}
    for label, objective in objectives.items():
        other = objective.surrogate(log_ratio_M, advantage_M, sequence_M, len(tokens.sequence_ids), old_logprob_M)
        weight_M, slope_M = other.weight_M.numpy(), tokens.loss_weight_M * other.slope_M.numpy()
        norm = float(np.linalg.norm(slope_M))
        own = {
            "eur": weight_M.mean().item(),
            "silenced": np.count_nonzero(weight_M == 0) / len(weight_M),
            "below_tenth": np.count_nonzero(weight_M < 0.1) / len(weight_M),
        }
        if norm > 0 and used_norm > 0:
            # Scaled before the product: norms of calm batches are small, and their product smaller.
            own["cosine"] = float((used_M / used_norm) @ (slope_M / norm))
            own["norm_ratio"] = norm / used_norm
        figures |= {f"counterfactual/{label}/{name}": value for name, value in own.items()}
    return figures
