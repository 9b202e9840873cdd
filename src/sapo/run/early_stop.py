"""End a run before its last step by a figure of its evaluations: `train.stop_when`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapo.config import RunConfig
from sapo.config.training import StopConfig
from sapo.errors import ConfigError
from sapo.run.state import RunState
from sapo.utils.names import did_you_mean


def judged_figure(config: RunConfig, figures: Mapping[str, Any], some_failed: bool = False) -> float | None:
    """Return the figure that train.stop_when looks at, None without that setting.

    Args:
        figures: of an evaluation.
        some_failed: completions failed to be judged; the figure may be missing then, and None is returned.

    Raises:
        ConfigError: evaluations have no such figure.
    """
    stop = config.train.stop_when
    if stop is None:
        return None
    known = [name for name, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    if stop.metric not in known and some_failed:
        return None
    if stop.metric not in known:
        raise ConfigError(
            f"train.stop_when.metric must be a figure of the evaluations: {', '.join(known)}; got {stop.metric!r}"
            f"{did_you_mean(stop.metric, known)}"
        )
    return float(figures[stop.metric])


def note_judged(config: RunConfig, state: RunState, figures: Mapping[str, Any], *, some_failed: bool = False) -> None:
    """Add the figure of an evaluation to those that train.stop_when looks at.

    Figures of another name, from before a resume changed the rule, go; so do all where there is no rule any more.

    Args:
        figures: of an evaluation.
        some_failed: completions failed to be judged, so that the figure may be missing, and none is added.

    Raises:
        ConfigError: evaluations have no such figure.
    """
    stop, judged = config.train.stop_when, judged_figure(config, figures, some_failed)
    if stop is None:
        state.judged, state.judged_metric = [], None
        return
    new = [] if judged is None else [judged]
    state.judged, state.judged_metric = [*judged_by(stop, state), *new], stop.metric


def judged_by(stop: StopConfig, state: RunState) -> list[float]:
    """Return the figures that a rule looks at: none of another name.

    >>> judged_by(StopConfig(patience=1), RunState(judged=[30.0], judged_metric="length/mean"))
    []
    """
    return state.judged if state.judged_metric == stop.metric else []


def reason_to_end(stop: StopConfig, judged: Sequence[float]) -> str | None:
    """Say why a run ends now, None where it goes on.

    Args:
        judged: the figure at each evaluation so far.

    >>> reason_to_end(StopConfig(reaches=0.9), [0.2, 0.95])
    'pass@1 0.950 has reached 0.9'
    >>> reason_to_end(StopConfig(patience=2), [0.2, 0.4, 0.4, 0.3])
    'pass@1 has not been above 0.400 for 2 evaluations'
    >>> reason_to_end(StopConfig(patience=2), [0.4, 0.4, 0.5]) is None
    True
    """
    if not judged:
        return None
    if stop.reaches is not None and judged[-1] >= stop.reaches:
        return f"{stop.metric} {judged[-1]:.3f} has reached {stop.reaches:g}"
    if stop.patience is not None:
        best = judged.index(max(judged))
        if len(judged) - 1 - best >= stop.patience:
            return f"{stop.metric} has not been above {judged[best]:.3f} for {stop.patience} evaluations"
    return None
