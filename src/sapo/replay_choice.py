"""Which routing replay a run makes: R2, recorded by the trainer, or R3, recorded by the engine.

`model.routing_replay: true` takes the one that goes with the run's log pi_old. Where the engine's log-probabilities
serve, no forward of the trainer is made at the weights that sampled, so only the engine can record.
"""

from __future__ import annotations

from typing import Literal

from sapo.config import RunConfig

ReplayKind = Literal["R2", "R3"]


def replay_kind(config: RunConfig, old_logprobs: str | None) -> ReplayKind | None:
    """R2 or R3; None without replay, and while it is not known whose log pi_old the run takes.

    Args:
        old_logprobs: engine, trainer or current, once the self-check has decided.
    """
    setting = config.model.routing_replay
    if setting is False or (setting is True and old_logprobs is None):
        return None
    if setting is not True:
        return setting
    return "R3" if old_logprobs == "engine" else "R2"


def replay_sentence(config: RunConfig) -> str | None:
    """Which routing replay is in force, None without; what `true` comes to may be the self-check's to say."""
    settled = None if config.train.old_logprobs == "auto" else config.train.old_logprobs
    recorder = {
        "R2": "the trainer records the experts as it computes log pi_old",
        "R3": "the engine records the experts as it samples",
    }
    ending = "every update goes through them."
    if config.model.routing_replay is False:
        return None
    if (kind := replay_kind(config, settled)) is not None:
        return f"Routing replay {kind}: {recorder[kind]}; {ending}"
    return (
        f"Routing replay R3 ({recorder['R3']}) if the self-check takes log pi_old from it, else R2 ({recorder['R2']}); "
        f"{ending}"
    )
