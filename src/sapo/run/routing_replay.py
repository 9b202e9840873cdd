"""Routing replay in a run: who records which experts when, and where it is written down.

R2: the trainer records in the forward that computes log pi_old. R3: the engine records while it samples. In both, every
forward of the trainer over the groups goes through the recorded experts from then on. Evaluation, a cold start and a
reference policy route freely.
"""

from __future__ import annotations

from typing import Any

from sapo.config import RunConfig
from sapo.config.summary import replay_kind
from sapo.model.policy import Policy
from sapo.model.routing import Routers
from sapo.run.directory import RunDirectory


class RoutingReplay:
    """Routing replay of one run.

    Args:
        config: with `model.routing_replay`.
        policy: the one trained.

    Raises:
        ModelError: a model without routers to replay.
    """

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self._config = config
        self.routers = Routers(policy)

    @classmethod
    def of(cls, config: RunConfig, policy: Policy) -> RoutingReplay | None:
        """Make the routing replay of a run, None where it has none."""
        return cls(config, policy) if config.model.routing_replay else None

    def engine_records(self, old_logprobs: str | None) -> bool:
        """Return whether the engine records as it samples.

        It does so too before the self-check has decided, which is made on the first step's batch.
        """
        return replay_kind(self._config, old_logprobs) != "R2"

    def trainer_records(self, old_logprobs: str | None) -> bool:
        """Return whether the forward that computes log pi_old is recorded; under R3 it uses the engine's experts."""
        return replay_kind(self._config, old_logprobs) == "R2"

    def record_choice(self, old_logprobs: str, directory: RunDirectory) -> dict[str, Any]:
        """Write the kind of replay the self-check decided on into config.yaml, under provenance."""
        figures = self.figures(old_logprobs)
        written = RunDirectory.read_config(directory.path)  # a new run's own recipe knows no versions and no commit
        directory.write_config(written.model_copy(update={"provenance": {**(written.provenance or {}), **figures}}))
        return figures

    def figures(self, old_logprobs: str | None) -> dict[str, Any]:
        """Return what metrics.jsonl and summary.json say of it."""
        kind = replay_kind(self._config, old_logprobs)
        return {} if kind is None else {"routing_replay": kind}
