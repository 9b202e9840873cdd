"""Figures of the episodes of a rollout batch: how many turns, how they ended, what the environments said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo.data import Completion, Status


def episode_metrics(episodes: Sequence[Completion]) -> dict[str, float]:
    """Return `turns/...`, `tokens/observed` and `environment/errors` of the episodes of environments.

    >>> from sapo.data import Observation
    >>> two = Completion((7, 1, 8), (-0.1,) * 3, "stop", observations=(Observation(2, (5, 6)),))
    >>> figures = episode_metrics([two, Completion((7,), (-0.1,), "stop")])
    >>> figures["turns/mean"], figures["turns/max"], figures["tokens/observed"]
    (1.5, 2, 2)
    """
    if not episodes:
        return {}
    turns = [len(e.turns) for e in episodes]
    statuses = [e.score.status for e in episodes]
    return {
        "turns/mean": float(np.mean(turns)),
        "turns/max": max(turns),
        "turns/cut": statuses.count(Status.TRUNCATED) / len(episodes),
        "tokens/observed": sum(len(o.token_ids) for e in episodes for o in e.observations),
        "environment/errors": statuses.count(Status.ENVIRONMENT_ERROR),
    }
