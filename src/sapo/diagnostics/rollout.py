"""Figures of one rollout batch: rewards, lengths, statuses, and how many groups teach nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo.data import Group, Status


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Figures over all completions of a step; with several tasks, also per task as `task/<name>/...`."""
    metrics = _figures(groups)
    tasks = sorted({g.prompt.task for g in groups})
    if len(tasks) > 1:
        for task in tasks:
            own = _figures([g for g in groups if g.prompt.task == task])
            metrics |= {f"task/{task}/{key}": value for key, value in own.items()}
    return metrics


def _figures(groups: Sequence[Group]) -> dict[str, float]:
    completions = [c for g in groups for c in g.completions]
    rewards = np.array([c.score.reward for c in completions])
    lengths = np.array([len(c) for c in completions])
    metrics: dict[str, float] = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "pass@1": float((rewards >= 1.0).mean()),
        "groups": len(groups),
        "groups/zero_variance": float(np.mean([g.teaches_nothing for g in groups])),
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
        "tokens/generated": int(lengths.sum()),
        "logprob/sampled_mean": float(np.mean([p for c in completions for p in c.logprobs])),
    }
    for status in Status:
        metrics[f"status/{status.value}"] = sum(c.score.status is status for c in completions)
    return metrics
