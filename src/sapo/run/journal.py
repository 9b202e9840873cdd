"""Write down what a run measures: metrics.jsonl, rollouts/, the loggers and the listener."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group
from sapo.diagnostics import observe, rollout_metrics, step_update_metrics
from sapo.diagnostics.warnings import OF_THE_LOOP
from sapo.rollout.episodes.reply_times import ReplyTimes
from sapo.run.collapse import note_warning
from sapo.run.directory import RunDirectory
from sapo.run.listener import Listener, tell_samples
from sapo.run.loggers.all import LoggerSet
from sapo.run.profiling import phases
from sapo.run.records import rollout_records, sampled_completions
from sapo.run.routing_replay import RoutingReplay
from sapo.run.state import RunState

PHASES_OF_A_STEP = ("generate", "score", "wait", "old_logprobs", "reference", "update", "diagnose")


class Journal:
    """The records of one run.

    Args:
        tasks: names of the training tasks.
        environments: those among them that are played in episodes.
        show: spells token ids out, for the transcripts of episodes.
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
        environments: Collection[str] = (),
        times: ReplyTimes | None = None,
        show: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.loggers = loggers
        self.listener = listener
        self.tasks = tasks
        self.environments = environments
        self._times = times or ReplyTimes()
        self._show = show
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

    def warn(self, cause: str, text: str, step: int | None = None) -> None:
        """Write a warning of the present step, or another, that comes from the loop and not from a rule of early
        warning."""
        assert cause in OF_THE_LOOP, f"{cause} is no cause that comparisons know to predict no collapse"
        step = self._state().step + 1 if step is None else step
        self.directory.append_metrics({"kind": "warning", "step": step, "cause": cause, "text": text})
        self.listener.warning(text)

    @property
    def logs_rollouts(self) -> bool:
        """Return whether the present step's completions are written."""
        return _due(self._state().step + 1, self.config.log.rollouts_every)

    def log_step(self, groups: list[Group]) -> None:
        """Write the present step's own line, and its completions where they are asked for."""
        state = self._state()
        step = state.step + 1
        dropped = None if self.config.rollout.zero_variance == "keep" else state.dropped
        penalised = self.config.rollout.overlong == "penalty"
        figures: dict[str, Any] = rollout_metrics(
            *(groups, dropped), by_task=len(self.tasks) > 1, penalised=penalised, environments=self.environments
        )
        figures |= state.selection
        figures |= step_update_metrics(state.step_updates, self.tasks)
        timing = self._timing(figures["tokens/generated"])
        tis = self.config.objective.tis
        said = {"old_logprobs": state.old_logprobs, **({} if tis is None else {"tis": tis.mode})}
        self.append({"kind": "step", "step": step, **said, **figures, "timing": timing})
        self.loggers.log(step, {k if k.startswith("task/") else f"train/{k}": v for k, v in figures.items()})
        if _due(step, self.config.log.samples_every) and (samples := sampled_completions(groups, self._show)):
            self.loggers.log_samples(step, samples)
            tell_samples(self.listener, step, samples)
        if self.logs_rollouts:
            records = rollout_records(
                groups,
                state.gates,
                sampler_is_old=state.old_logprobs == "engine",
                dropped=state.dropped,
                show=self._show,
            )
            self.directory.write_rollouts(step, records)
            if self.config.log.keep_pictures:
                drawn = (*groups, *state.dropped)
                self.directory.keep_pictures(picture for group in drawn for picture in group.prompt.pictures)

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
        return {**timing, **self._times.take()}


def _due(step: int, every: int) -> bool:
    return every > 0 and (step == 1 or step % every == 0)


def summary_of(config: RunConfig, state: RunState, replay: RoutingReplay | None) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "objective": config.objective.model_dump(),
        "seed": config.seed,
        "steps": state.step,
        "old_logprobs": state.old_logprobs,
        **({} if replay is None else replay.figures(state.old_logprobs)),
        "start": state.start_evaluation,
        "final": state.last_evaluation,
        **({"rollbacks": state.rollbacks} if state.rollbacks else {}),
        "tokens": state.tokens,
        "seconds": {**state.seconds, "total": sum(phases(state.seconds).values())},
    }
