"""Write down what a run measures: metrics.jsonl, rollouts/, the loggers and the listener."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group
from sapo.diagnostics import observe, rollout_metrics, step_update_metrics
from sapo.run.collapse import note_warning
from sapo.run.directory import RunDirectory
from sapo.run.listener import Listener
from sapo.run.loggers.all import LoggerSet
from sapo.run.records import rollout_records
from sapo.run.state import RunState

PHASES_OF_A_STEP = ("generate", "score", "old_logprobs", "reference", "update", "diagnose")


class Journal:
    """The records of one run.

    Args:
        tasks: names of the training tasks.
        state: gives the run's present state; a rollback replaces it.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        loggers: LoggerSet,
        listener: Listener,
        tasks: Sequence[str],
        state: Callable[[], RunState],
    ) -> None:
        self.config = config
        self.directory = directory
        self.loggers = loggers
        self.listener = listener
        self.tasks = tasks
        self._state = state
        self._seconds_before = dict(state().seconds)

    def append(self, record: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and hold the rules of early warning against it."""
        state = self._state()
        self.directory.append_metrics(record)
        self.listener.record(record)
        state.health, warnings = observe(state.health, record, self.config.warnings)
        for warning in warnings:
            note_warning(state, warning)
            self.directory.append_metrics(warning.to_json())
            self.listener.warning(warning.line)

    def warn(self, cause: str, text: str) -> None:
        """Write a warning of the present step that comes from the loop and not from a rule of early warning."""
        step = self._state().step + 1
        self.directory.append_metrics({"kind": "warning", "step": step, "cause": cause, "text": text})
        self.listener.warning(text)

    @property
    def logs_rollouts(self) -> bool:
        """Return whether the present step's completions are written."""
        step, every = self._state().step + 1, self.config.log.rollouts_every
        return every > 0 and (step == 1 or step % every == 0)

    def log_step(self, groups: list[Group]) -> None:
        """Write the present step's own line, and its completions where they are asked for."""
        state = self._state()
        step = state.step + 1
        dropped = None if self.config.rollout.zero_variance == "keep" else state.dropped
        penalised = self.config.rollout.overlong == "penalty"
        figures: dict[str, Any] = rollout_metrics(groups, dropped, by_task=len(self.tasks) > 1, penalised=penalised)
        figures |= state.selection
        figures |= step_update_metrics(state.step_updates, self.tasks)
        timing = self._timing(figures["tokens/generated"])
        self.append({"kind": "step", "step": step, "old_logprobs": state.old_logprobs, **figures, "timing": timing})
        self.loggers.log(step, {k if k.startswith("task/") else f"train/{k}": v for k, v in figures.items()})
        if self.logs_rollouts:
            records = rollout_records(
                groups, state.gates, sampler_is_old=state.old_logprobs == "engine", dropped=state.dropped
            )
            self.directory.write_rollouts(step, records)

    def roll_back(self) -> None:
        """Go on from the state of an earlier step."""
        self._seconds_before = dict(self._state().seconds)
        self.loggers.go_back(self._state().step)

    def _timing(self, tokens: float) -> dict[str, float]:
        """Return the seconds of the step by phase, since the last step's line."""
        now = dict(self._state().seconds)
        seconds = {k: v - self._seconds_before.get(k, 0.0) for k, v in now.items()}
        self._seconds_before = now
        work = sum(seconds.get(k, 0.0) for k in PHASES_OF_A_STEP)
        timing = {"seconds": work, **seconds}
        if work > 0:
            timing["tokens_per_second"] = tokens / work
        return timing
