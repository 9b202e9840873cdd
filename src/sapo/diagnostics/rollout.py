"""Figures of one rollout batch: rewards, lengths, statuses, and how many groups have zero variance.

They are over all that was sampled, groups that left the batch included: what is measured of the policy must not depend
on what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo.data import Group, Status


def rollout_metrics(
    groups: Sequence[Group],
    dropped: Sequence[Group] | None = None,
    *,
    by_task: bool | None = None,
    penalised: bool = True,
) -> dict[str, float]:
    """Return figures over all completions of a step; with several tasks, also per task as `task/<name>/...`.

    Args:
        groups: the batch.
        dropped: groups that were sampled and left the batch; None when none could.
        by_task: whether the run has several tasks; told from the groups when None.
        penalised: shaped rewards, where there are some, are plain ones less a penalty, and not drawn at random.
    """
    metrics = _figures(groups, dropped, penalised)
    drawn = (*groups, *(dropped or ()))
    tasks = sorted({g.prompt.task for g in drawn})
    if len(tasks) > 1 if by_task is None else by_task:
        for task in tasks:
            own = _figures(
                [g for g in groups if g.prompt.task == task],
                None if dropped is None else [g for g in dropped if g.prompt.task == task],
                penalised,
            )
            metrics |= {f"task/{task}/{key}": value for key, value in own.items()}
    return metrics


def _figures(kept: Sequence[Group], dropped: Sequence[Group] | None, penalised: bool) -> dict[str, float]:
    groups = [*kept, *(dropped or ())]
    completions = [c for g in groups for c in g.completions]
    rewards = np.array([c.score.reward for c in completions])
    lengths = np.array([len(c) for c in completions])
    metrics: dict[str, float] = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "pass@1": float((rewards >= 1.0).mean()),
        "groups": len(groups),
        "groups/zero_variance": float(np.mean([g.zero_variance for g in groups])),
        "groups/none_right": float(np.mean([g.zero_variance and max(g.rewards) < 1.0 for g in groups])),
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
        "length/at_limit": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "tokens/generated": int(lengths.sum()),
        "logprob/sampled_mean": sum(sum(c.logprobs.tolist()) for c in completions) / int(lengths.sum()),
    }
    for status in Status:
        metrics[f"status/{status.value}"] = sum(c.score.status is status for c in completions)
    if dropped is not None:
        metrics["groups/kept"] = len(kept)
        metrics["groups/dropped"] = len(dropped)
        metrics["tokens/dropped"] = sum(len(c) for g in dropped for c in g.completions)
    for name in sorted({name for c in completions for name in c.score.figures}):
        metrics[f"figure/{name}"] = float(
            np.mean([c.score.figures[name] for c in completions if name in c.score.figures])
        )
    return metrics | _shaped(groups, penalised)


def minibatch_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return `batch/...`, what an update was made of, with a gradient or without; nothing without groups."""
    completions = [c for g in groups for c in g.completions]
    if not completions:
        return {}
    metrics: dict[str, float] = {
        "batch/groups": len(groups),
        "batch/zero_variance": sum(g.zero_variance for g in groups) / len(groups),
        "batch/reward_mean": sum(c.score.reward for c in completions) / len(completions),
        "batch/length_mean": sum(len(c) for c in completions) / len(completions),
        "batch/at_limit": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }
    return metrics | {f"batch/status/{s.value}": sum(c.score.status is s for c in completions) for s in Status}


def _shaped(groups: Sequence[Group], penalised: bool) -> dict[str, float]:
    """Return figures of shaped rewards and of masked completions, where there are any."""
    metrics: dict[str, float] = {}
    shaped = np.array([r for g in groups for r in g.shaped_rewards])
    if shaped.size:
        metrics["reward/shaped_mean"] = float(shaped.mean())
    if shaped.size and penalised:
        rewards = np.array([r for g in groups for r in g.rewards])
        metrics["overlong/penalty_mean"] = float((shaped - rewards).mean())
        metrics["overlong/penalised"] = float((shaped < rewards).mean())
    masked = [m for g in groups for m in g.masked]
    if masked:
        metrics["overlong/masked"] = float(np.mean(masked))
    return metrics
