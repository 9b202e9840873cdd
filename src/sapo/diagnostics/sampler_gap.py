"""Measure the mismatch between sampler and trainer at equal weights: pi_old / mu, and the weights that correct it."""

from __future__ import annotations

from sapo.objectives import LOG_RATIO_LIMIT
from sapo.training.update_result import UpdateResult

MISMATCH_METRICS = ("mismatch/abs_dev", "tis/mean", "tis/clipped_share")


def mismatch_metrics(result: UpdateResult) -> dict[str, float]:
    """Return the figures of an update whose log pi_old is the trainer's; none where it is the sampler's.

    `mismatch/abs_dev` is the mean |pi_old / mu - 1| over its tokens, `tis/mean` the mean weight of the correction and
    `tis/clipped_share` the share of tokens where that is its cap, or 0.
    """
    metrics: dict[str, float] = {}
    if result.log_mismatch_M is not None and result.log_mismatch_M.numel():
        bounded_M = result.log_mismatch_M.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        metrics["mismatch/abs_dev"] = bounded_M.expm1().abs().mean().item()
    if result.tis is not None and result.tis.weight_M.numel():
        metrics["tis/mean"] = result.tis.weight_M.mean().item()
        metrics["tis/clipped_share"] = result.tis.clipped_M.double().mean().item()
    return metrics
