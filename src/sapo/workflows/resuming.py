"""Take up a run again: its newest whole checkpoint, and what must not have changed since it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sapo.config import RunConfig
from sapo.config.recipes import override_run, parse_override
from sapo.errors import CheckpointError, ConfigError, PictureError
from sapo.model.policy import Policy
from sapo.run.directory import RunDirectory
from sapo.run.inputs import (
    CHECKPOINT_KEY,
    InputRecord,
    accepted_record,
    check_unchanged,
    inputs_of,
    needs_start,
    refusal,
    shapes_of,
)
from sapo.run.listener import Listener
from sapo.run.state import RunState
from sapo.tasks import Task
from sapo.training.checkpoint import Checkpoint, newest_whole
from sapo.training.optimizer import learning_rate_at
from sapo.workflows.coldstart import coldstart_path


def _state_of(checkpoint: Checkpoint) -> RunState:
    """Read the state that a checkpoint holds, which is to be of the step that its name says."""
    try:
        state = RunState.deserialise(checkpoint.state(), checkpoint.batches())
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    if not checkpoint.proves_optimizer:
        raise CheckpointError(f"the manifest of {checkpoint.path} must name the optimizer's state; it names none")
    if (state.step, state.update) != (checkpoint.step, checkpoint.update):
        raise CheckpointError(
            f"{checkpoint.path} must hold the state of {checkpoint.label}; got step {state.step}, update {state.update}"
        )
    return state


def coldstart_directory(config: RunConfig) -> Path | None:
    """Return where the cold start of a recipe is kept; None where it has none."""
    return None if config.model.coldstart is None else coldstart_path(config)


class Resuming:
    """What a resume was asked for, and what it finds.

    Args:
        run: the directory as it was named.
        config: as config.yaml has it.
        overrides: `key=value` of RESUMABLE_KEYS.
        accepted: keys whose changes are accepted.
    """

    def __init__(
        self,
        run: str,
        directory: RunDirectory,
        config: RunConfig,
        overrides: Sequence[str],
        accepted: Sequence[str],
        listener: Listener,
    ) -> None:
        self.run = run
        self.directory = directory
        self.config = config.model_copy(update={"run_dir": run})
        self.overrides = list(overrides)
        self.accepted = list(accepted)
        self.listener = listener
        self.record = InputRecord.read(directory.path)
        directory.run = None if self.record is None else self.record.run
        self._inputs: dict[str, dict[str, str]] = {}

    def overridden(self) -> RunConfig:
        """Return the recipe with the settings that this resume changes."""
        return override_run(self.config, self.overrides)

    def newest_checkpoint(self, config: RunConfig) -> tuple[Checkpoint | None, RunState | None]:
        """Return the newest whole checkpoint with its state; warn of newer ones that are broken.

        Raises:
            ConfigError: the recipe now has fewer steps than the checkpoint has done, or no checkpoint is whole.
        """
        states: list[RunState] = []
        broken: list[CheckpointError] = []
        checkpoint = newest_whole(
            self.directory.checkpoints, on_broken=broken.append, check=lambda found: states.append(_state_of(found))
        )
        if checkpoint is None and broken and CHECKPOINT_KEY not in self.accepted:
            raise ConfigError(
                f"a run must be resumed from a checkpoint that is whole; got {len(broken)} that are not, the newest of "
                f"them: {broken[0]}; put one back, or `sapo resume {self.run} --accept-changes {CHECKPOINT_KEY}` "
                "begins at step 1 again, and drops the metrics and completions so far"
            )
        for error in broken:
            self.listener.warning(f"checkpoint not used: {error}")
        if checkpoint is None:
            return None, None
        (state,) = states
        begun = state.step + (state.update > 0 or state.groups is not None)
        if config.train.steps < begun:
            raise ConfigError(
                f"train.steps must not be below the steps that a run has begun; got {config.train.steps} where the "
                f"newest checkpoint of {self.run} is at {checkpoint.label}; `sapo export {checkpoint.path}` takes that "
                f"model, train.steps={begun} or more goes on"
            )
        self._say_schedule(config, state)
        return checkpoint, state

    def check_inputs(self, config: RunConfig, tasks: list[Task], checkpoint: Checkpoint | None) -> None:
        """Refuse rows, models, modules and settings that are not those the run began with.

        Args:
            config: with the overrides of this resume.
            tasks: made of it.

        Raises:
            ConfigError: naming what changed.
        """
        start = needs_start(config, checkpoint is not None)
        self._inputs = inputs_of(config, tasks, start=start, coldstart=coldstart_directory(config) if start else None)
        if self.record is None:
            self.listener.warning(
                f"{self.run} has no inputs.json, as runs of earlier versions: whether its rows, models and settings "
                "are those it began with is not known"
            )
            return
        check_unchanged(
            self.record,
            self.config,
            self._inputs,
            overridden=[parse_override(override)[0] for override in self.overrides],
            accepted=self.accepted,
            warn=self.listener.warning,
        )

    def check_pictures(self, checkpoint: Checkpoint | None, state: RunState | None) -> None:
        """Refuse a checkpoint with groups that were sampled with pictures which have changed: it does not hold these.

        Raises:
            ConfigError: it is one.
        """
        if checkpoint is None or state is None:
            return
        shown = {(p.path, p.sha256): p for group in state.waiting() for p in group.prompt.pictures}
        for picture in shown.values():
            try:
                picture.read()
            except PictureError as error:
                raise ConfigError(
                    f"{checkpoint.path} holds a batch that was sampled and is still to be trained on; {error} until it "
                    f"is, or delete {checkpoint.path} to go on from the checkpoint before"
                ) from error

    def check_model(self, policy: Policy, checkpoint: Checkpoint | None, state: RunState | None) -> None:
        """Refuse a checkpoint of another model or run.

        Raises:
            ConfigError: it is one.
        """
        if self.record is None or checkpoint is None or state is None:
            return
        what = None
        if shapes_of(policy) != self.record.model:
            what = f"{checkpoint.path} holds a model of other weights, by name or shape, than the run trains"
            raise ConfigError(
                f"{what}; put the run's own checkpoint back, or delete this one to go on from the one before"
            )
        if state.run is not None and state.run != self.record.run and CHECKPOINT_KEY not in self.accepted:
            raise ConfigError(refusal({CHECKPOINT_KEY: f"{checkpoint.path} was written by another run"}, self.run))
        state.run = self.record.run

    def write(self, config: RunConfig) -> None:
        """Write down the settings and inputs to go on with, where they are others than before.

        A kill between the files leaves settings that the record knows as those before.
        """
        if not self.overrides and not self.accepted:
            return
        if self.record is None:
            self.directory.write_config(config)
            return
        record = accepted_record(self.record, config, self._inputs, self.accepted)
        record.write(self.directory.path)
        self.directory.write_config(config)
        replace(record, settings_before=None).write(self.directory.path)

    def _say_schedule(self, config: RunConfig, state: RunState) -> None:
        """Warn where another number of steps moves the learning rate of a decaying schedule."""
        rates = [
            state.learning_rate_scale
            * learning_rate_at(
                state.step,
                peak=train.learning_rate,
                warmup_steps=train.warmup_steps,
                total_steps=train.steps,
                schedule=train.schedule,
                minimum=train.min_learning_rate,
            )
            for train in (self.config.train, config.train)
        ]
        if self.config.train.steps != config.train.steps and rates[0] != rates[1]:
            self.listener.warning(
                f"train.steps: {self.config.train.steps} -> {config.train.steps} stretches the {config.train.schedule} "
                f"schedule: the learning rate of step {state.step + 1} is {rates[1]:.3g}, where it would have been "
                f"{rates[0]:.3g}; the schedule constant, in a new run, would not move it"
            )
