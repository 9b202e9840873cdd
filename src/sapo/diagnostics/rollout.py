"""Figures of one rollout batch: rewards, lengths, statuses, and how many groups have zero variance.

They are over all that was sampled, groups that left the batch included: what is measured of the policy must not depend
on what is trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from sapo.data import Group
from sapo.diagnostics.episodes import episode_metrics
from sapo.tasks import status_counts
from sapo.utils.rewards import ROUNDING, is_right


def rollout_metrics(
    groups: Sequence[Group],
    dropped: Sequence[Group] | None = None,
    *,
    by_task: bool | None = None,
    penalised: bool = True,
    environments: Collection[str] = (),
) -> dict[str, float]:
    """Return figures over all completions of a step; with several tasks, also per task as `task/<name>/...`.

    Args:
        groups: the batch.
        dropped: groups that were sampled and left the batch; None when none could.
        by_task: whether the run has several tasks; told from the groups when None.
        environments: names of the tasks that are played in episodes; their figures are added.
        penalised: shaped rewards, where there are some, are plain ones less a penalty, and not drawn at random.
    """
    metrics = _figures(groups, dropped, penalised, environments)
    drawn = (*groups, *(dropped or ()))
    tasks = sorted({g.prompt.task for g in drawn})
    if len(tasks) > 1 if by_task is None else by_task:
        for task in tasks:
            own = _figures(
                [g for g in groups if g.prompt.task == task],
                None if dropped is None else [g for g in dropped if g.prompt.task == task],
                penalised,
                environments,
            )
            metrics |= {f"task/{task}/{key}": value for key, value in own.items()}
    return metrics


def _figures(
    kept: Sequence[Group], dropped: Sequence[Group] | None, penalised: bool, environments: Collection[str]
) -> dict[str, float]:
    groups = [*kept, *(dropped or ())]
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([len(c) for c in completions])
    metrics: dict[str, float] = {
        **_rewards(groups),
        "groups": len(groups),
        "groups/zero_variance": float(np.mean([g.zero_variance for g in groups])),
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
        "length/at_limit": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "tokens/generated": int(lengths.sum()),
    }
    if lengths.any():
        metrics["logprob/sampled_mean"] = sum(sum(c.logprobs.tolist()) for c in completions) / int(lengths.sum())
    metrics |= {f"status/{name}": count for name, count in status_counts(completions).items()}
    if dropped is not None:
        metrics["groups/kept"] = len(kept)
        metrics["groups/dropped"] = len(dropped)
        metrics["tokens/dropped"] = sum(len(c) for g in dropped for c in g.completions)
    for name in sorted({name for c in completions for name in c.score.figures}):
        metrics[f"figure/{name}"] = float(
            np.mean([c.score.figures[name] for c in completions if name in c.score.figures])
        )
    metrics |= episode_metrics([c for g in groups if g.prompt.task in environments for c in g.completions])
    return metrics | _shaped(groups, penalised)


def _rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Return figures of the rewards of completions that did not fail; nothing where all did."""
    rewards = np.array([r for g in groups for r in g.scored_rewards])
    if not rewards.size:
        return {}
    scored = [g for g in groups if g.scored_rewards]
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "pass@1": float((rewards >= 1.0 - ROUNDING).mean()),
        "groups/none_right": float(
            np.mean([g.zero_variance and not any(map(is_right, g.scored_rewards)) for g in scored])
        ),
    }


def minibatch_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return `batch/...`, what an update was made of, with a gradient or without; nothing without groups."""
    completions = [c for g in groups for c in g.completions]
    if not completions:
        return {}
    metrics: dict[str, float] = {
        "batch/groups": len(groups),
        "batch/zero_variance": sum(g.zero_variance for g in groups) / len(groups),
        "batch/length_mean": sum(len(c) for c in completions) / len(completions),
        "batch/at_limit": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }
    if rewards := [r for g in groups for r in g.scored_rewards]:
        metrics["batch/reward_mean"] = sum(rewards) / len(rewards)
    return metrics | {f"batch/status/{name}": count for name, count in status_counts(completions).items()}


def _shaped(groups: Sequence[Group], penalised: bool) -> dict[str, float]:
    """Return figures of shaped rewards and of masked completions, where there are any."""
    metrics: dict[str, float] = {}
    shaped = np.array([r for g in groups for r in _scored(g, g.shaped_rewards)])
    if shaped.size:
        metrics["reward/shaped_mean"] = float(shaped.mean())
    if shaped.size and penalised:
        rewards = np.array([r for g in groups for r in g.scored_rewards])
        metrics["overlong/penalty_mean"] = float((shaped - rewards).mean())
        metrics["overlong/penalised"] = float((shaped < rewards).mean())
    # Failed completions are masked whatever the recipe says of overlong ones.
    marked = [
        list(zip(g.masked, (c.score.status.failed for c in g.completions), strict=True)) for g in groups if g.masked
    ]
    overlong = [mask and not failed for pairs in marked for mask, failed in pairs]
    if any(overlong) or any(not any(failed for _, failed in pairs) for pairs in marked):
        metrics["overlong/masked"] = float(np.mean(overlong))
    return metrics


def _scored(group: Group, rewards: Sequence[float]) -> list[float]:
    """Return those of some rewards of a group, or of none, whose completions did not fail."""
    return [r for r, c in zip(rewards, group.completions, strict=False) if not c.score.status.failed]
