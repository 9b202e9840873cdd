"""The loop: one iteration reads like the algorithm.

    sample a group of completions for each prompt with the weights as they are
    score them; advantages are relative to the group
    choose the groups to train on; refill their places if so asked
    prove (first step) or compute log pi_old at these weights
    for each mini-batch: one update by the objective
    log; every so often evaluate and write a checkpoint

All that a resume needs is in `RunState`, between any two of these lines: a run that is killed and resumed writes the
same metrics, weights and completions, bit for bit, as one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group
from sapo.diagnostics import task_panels
from sapo.diagnostics.measure import Diagnosis
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.policy import Policy
from sapo.rollout.collector import Collector
from sapo.rollout.engine import Engine
from sapo.rollout.registry import make_engine
from sapo.rollout.selection import Selection
from sapo.rollout.staleness import Staleness, sampler_weights
from sapo.run.collapse import (
    answer_collapse,
    kept_checkpoints,
    note_checkpoint,
    note_non_finite,
    note_step,
    rollback_record,
)
from sapo.run.directory import RunDirectory
from sapo.run.held_out import HeldOutEvaluations
from sapo.run.journal import Journal
from sapo.run.listener import Listener, Silent
from sapo.run.loggers.all import LoggerSet
from sapo.run.parity import ParityCheck
from sapo.run.preflight import TaskSet
from sapo.run.profiling import Profiler, phases
from sapo.run.records import token_gates
from sapo.run.routing_replay import RoutingReplay
from sapo.run.self_check import check_old_logprobs, check_sampled
from sapo.run.state import RolloutBatch, RunState
from sapo.run.trainers import make_packer, make_trainer, trainer_settings
from sapo.training.batch import split_minibatches
from sapo.training.checkpoint import Checkpoint, prune, save_checkpoint
from sapo.training.logprobs import GroupLogprobs
from sapo.training.optimizer import learning_rate_at
from sapo.training.ranks import Trainers
from sapo.utils.machine import give_back_freed_memory


@dataclass(frozen=True)
class StopReason:
    """Why a run ended before its last step, and where it goes on."""

    checkpoint: Checkpoint


class TrainingRun:
    """One run, from its present state to its last step.

    Args:
        config: checked.
        directory: open for writing.
        policy: at the weights of `state`.
        tasks: from `load_tasks`.
        state: a new run's, or a checkpoint's.
        should_stop: asked wherever work can be left without loss.
        reference: what a KL penalty keeps close to; None for the policy with its adapter switched off.
        engine: of the policy; None for the one that the recipe names.
        trainers: a training group, whose weights are those of the policy; None to train the policy in this process.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        policy: Policy,
        tasks: TaskSet,
        state: RunState | None = None,
        listener: Listener | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        reference: Policy | None = None,
        engine: Engine | None = None,
        trainers: Trainers | None = None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.policy = policy
        self.state = state or RunState()
        self.listener = listener or Silent()
        self.should_stop = should_stop
        self.tasks = tasks
        self.engine = engine or make_engine(policy, config.rollout)
        self.replay = RoutingReplay.of(config, policy)
        settings = trainer_settings(config)
        routers = None if self.replay is None else self.replay.routers
        self.trainer: Trainers = trainers or make_trainer(config, settings, policy, reference, routers)
        self.packer = make_packer(config, policy)
        self.logprobs = GroupLogprobs(self.trainer, self.packer, "adapter_off" if reference is None else "reference")
        self._staleness = Staleness(config.rollout.staleness, config.train.minibatches)
        self.diagnosis = Diagnosis(config, settings.objective)
        self._saved_at = self.state.step if state is not None and not self.state.update else -1
        names = [t.name for t in tasks.train]
        self.loggers = LoggerSet(
            config,
            directory.path,
            resumed_at=None if state is None else state.step,
            panels=task_panels(names) if names[1:] else None,
        )
        self.profiler = Profiler(config, directory.path, lambda: self.state.seconds)
        self._phase = self.profiler.phase
        self.journal = Journal(config, directory, self.loggers, self.listener, names, lambda: self.state)
        self._append, self._warn = self.journal.append, self.journal.warn
        self.collector = Collector(
            config, policy, self.engine, tasks.train, tasks.formats, tasks.curricula, self._phase, should_stop
        )
        self.parity = ParityCheck(config, policy, self.collector, self.logprobs, directory.path)
        self.held_out = HeldOutEvaluations(config, policy, self.engine, tasks, should_stop)

    def run(self) -> StopReason | None:
        """Train to the last step, or until asked to stop.

        Raises:
            NonFiniteError, CollapseError: with step, cause and the checkpoint to resume from.
        """
        self.loggers.open()
        self.listener.started(self.config)
        try:
            with self.profiler.run():
                while True:
                    if self._evaluation_due():
                        self.evaluate()
                    if self._checkpoint_due():
                        self.checkpoint()
                    if self.state.step >= self.config.train.steps:
                        break
                    with self.profiler.step(self.state.step + 1):
                        try:
                            self.step()
                        except NonFiniteError as error:
                            self._answer_non_finite(error)
        except Interrupted:
            return StopReason(self.checkpoint())
        self.directory.write_summary(self.summary())
        return None

    def step(self) -> None:
        """Sample one rollout batch and make its updates."""
        state = self.state
        if state.groups is None:
            self._begin()
        assert state.groups is not None
        uneven = self.config.rollout.zero_variance == "drop"
        minibatches = split_minibatches(state.groups, self.config.train.minibatches, uneven)
        while state.update < len(minibatches):
            self._sample_due()
            self.update(minibatches[state.update])
        self.journal.log_step(state.groups)
        state.step, state.update = state.step + 1, 0
        state.groups, state.dropped, state.step_updates, state.gates = None, [], [], {}
        note_step(state, self.config)
        if state.collapse is not None:
            self._answer_collapse()

    def _begin(self) -> None:
        """Take up the batch of this step; compute log pi_old at the current weights if the recipe asks for that."""
        self._sample_due()
        batch = self.state.take_next(self.config.train.minibatches)
        if self.state.old_logprobs == "current":
            with self._phase("old_logprobs"):
                self.state.groups = self.logprobs.attach_old(batch.groups, None, self._trainer_records())

    def _sample_due(self) -> None:
        """Sample the batches that are due: the step's own, or under staleness that of a later step."""
        state = self.state
        while state.num_sampled < self._staleness.num_due(state.step, state.update):
            state.ahead.append(self.rollout())

    def rollout(self) -> RolloutBatch:
        """Sample, score and choose groups and compute their advantages and log pi_old, all at the present weights."""
        state, sampled_at = self.state, self.trainer.updates
        self.trainer.send_weights(self.policy)
        weights = sampler_weights(self.policy.weights(), self.config.experiments, state.step)
        selected = self.collector.collect(
            state.num_sampled, state.position, weights, self._version, self._engine_records()
        )
        check_sampled([*selected.groups, *selected.dropped])
        self._check_parity(selected)
        groups = self._with_logprobs(selected, sampled_at)
        self._remember(selected)
        return RolloutBatch(groups, selected.dropped, self.collector.selector.figures(selected), self.engine.version)

    def _check_parity(self, selected: Selection) -> None:
        """Prove, where it is due, that an engine with a copy of the weights has the policy's."""
        state = self.state
        if self.parity.due(state.num_sampled):
            with self._phase("old_logprobs"):
                found = self.parity.check([*selected.groups, *selected.dropped], state.step, self._version)
            self._append({"kind": "parity", "step": state.step + 1, **found})

    @property
    def _version(self) -> int:
        """Count the updates made by the present weights, skipped ones too."""
        return self.state.step * self.config.train.minibatches + self.state.update

    def _with_logprobs(self, selected: Selection, sampled_at: int) -> list[Group]:
        """Return the groups to train on, with log pi_old and log pi_ref where the trainer computes these.

        Args:
            sampled_at: the trainer's `updates` when they were sampled.
        """
        state, groups = self.state, selected.groups
        with self._phase("old_logprobs"):
            if state.old_logprobs is None:
                state.old_logprobs = self._choose_old_logprobs([*groups, *selected.dropped])
            if state.old_logprobs == "trainer":
                groups = self.logprobs.attach_old(groups, sampled_at, self._trainer_records())
        if self.config.objective.kl is not None:
            with self._phase("reference"):
                groups = self.logprobs.attach_reference(groups)
        return groups

    def _engine_records(self) -> bool:
        return self.replay is not None and self.replay.engine_records(self.state.old_logprobs)

    def _trainer_records(self) -> bool:
        return self.replay is not None and self.replay.trainer_records(self.state.old_logprobs)

    def _remember(self, selected: Selection) -> None:
        """Put what a whole batch changed into the state: a stop before this leaves the state of the step's start."""
        state = self.state
        state.position = selected.position
        tokens = [sum(len(c) for g in groups for c in g.completions) for groups in (selected.groups, selected.dropped)]
        state.tokens["generated"] += sum(tokens)
        if self.config.rollout.zero_variance != "keep":
            state.tokens["dropped"] = state.tokens.get("dropped", 0) + tokens[1]
        if selected.unfilled and not state.unfilled:
            self._warn(
                "unfilled_groups",
                f"step {state.step + 1}: {selected.unfilled} of {len(selected.groups)} groups of the batch "
                f"have zero variance after {selected.refill_rounds} refills (rollout.max_refills); this warning is "
                "given once, groups/unfilled counts them",
            )
        state.unfilled += selected.unfilled

    def _choose_old_logprobs(self, groups: list[Group]) -> str:
        """Choose the source of log pi_old for this run, by the self-check of its first step."""
        step = self.state.step + 1
        full = self.collector.params.full_distribution and self.engine.capabilities.exact_logprobs
        rounded, both = not self.config.experiments.sampler_is_policy, self.config.objective.tis is not None
        wanted = self.config.old_logprobs
        check = check_old_logprobs(
            self.logprobs, groups, self.config.train, full, old_logprobs=wanted, rounded=rounded, both=both
        )
        replay = {} if self.replay is None else self.replay.record_choice(check.old_logprobs, self.directory)
        self._append({"kind": "self_check", "step": step, **check.to_json(), **replay})
        if check.warning is not None:
            self._warn("unequal_old_logprobs", check.warning)
        return check.old_logprobs

    def update(self, groups: tuple[Group, ...]) -> None:
        """Make one update from one mini-batch."""
        state, train = self.state, self.config.train
        learning_rate = state.learning_rate_scale * learning_rate_at(
            state.step,
            peak=train.learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=train.steps,
            schedule=train.schedule,
            minimum=train.min_learning_rate,
        )
        started = time.perf_counter()
        shares = self.packer.pack(groups)
        with self._phase("diagnose"):
            before = self.diagnosis.before(state.step + 1, self.trainer, shares, self.should_stop)
        with self._phase("update"):
            result = self.trainer.update(shares, learning_rate, self.should_stop)
        with self._phase("diagnose"):
            measured = self.diagnosis.after(state.step + 1, result, groups)
        figures = measured.figures | before
        # Nothing has moved the weights yet since the batch was sampled.
        on_policy = "rollout/age" not in state.selection and all(u["skipped"] for u in state.step_updates)
        record = {
            **{"kind": "update", "step": state.step + 1, "update": state.update},
            "learning_rate": learning_rate,
            "on_policy": on_policy,
            "skipped": result.skipped,
            **figures,
            "timing": {"seconds": time.perf_counter() - started},
        }
        self._append(record)
        if measured.distribution is not None:
            place = {k: record[k] for k in ("step", "update", "on_policy")}
            self._append({"kind": "distribution", **place, **measured.distribution})
        state.tokens["trained"] += result.log_ratio_M.numel()
        if self.journal.logs_rollouts:
            rollout = self.config.rollout
            samples = rollout.samples_per_prompt
            state.gates |= token_gates(result, state.update, train.minibatches, samples, on_policy)
        state.step_updates.append({"skipped": result.skipped, "on_policy": on_policy, **figures})
        state.update += 1

    def _answer_collapse(self) -> None:
        """Go on, stop, or roll back to the last healthy checkpoint, as the recipe says."""
        collapsed = self.state
        self.state = answer_collapse(self.config, self.directory, self.policy, self.trainer, collapsed)
        if self.state is not collapsed:
            self._append(rollback_record(collapsed, self.state))
            self.journal.roll_back()
            self.checkpoint()

    def _answer_non_finite(self, error: NonFiniteError) -> None:
        """Stop, or roll back as after a collapse, as the recipe says."""
        warning = note_non_finite(self.state, self.config, self.directory, error)
        self.directory.append_metrics(warning.to_json())
        self.listener.warning(warning.line)
        self._answer_collapse()

    def evaluate(self) -> None:
        """Evaluate every task on its held-out problems, then log them all: a stop in between leaves no half."""
        state = self.state
        with self._phase("evaluate"):
            self.trainer.send_weights(self.policy)
            give_back_freed_memory()
            evaluations = self.held_out.evaluate(self._version)
        for evaluation in evaluations:
            record = {"kind": "eval", "step": state.step, **evaluation.metrics()}
            self._append({**record, "correct": evaluation.correct, "timing": {"seconds": evaluation.seconds}})
            prefix = "eval/" if len(evaluations) == 1 else f"eval/{evaluation.task}/"
            self.loggers.log(state.step, {prefix + k: v for k, v in record.items() if isinstance(v, int | float)})
        figures = evaluations[0].metrics()
        if len(evaluations) > 1:
            figures["tasks"] = {e.task: e.metrics() for e in evaluations}
        state.start_evaluation = state.start_evaluation or figures
        state.last_evaluation = figures
        state.evaluated_at = state.step

    def checkpoint(self) -> Checkpoint:
        """Write a checkpoint of the present state."""
        state = self.state
        with self._phase("checkpoint"):
            note_checkpoint(state, self.config)
            self.trainer.send_weights(self.policy)
            state.metrics_bytes = self.directory.metrics_bytes()
            fields, batches = state.serialise()
            written = save_checkpoint(
                self.directory.checkpoints,
                state.step,
                state.update,
                policy=self.policy,
                save_optimizer=self.trainer.save_optimizer,
                state=fields,
                batches=batches,
            )
            prune(self.directory.checkpoints, self.config.checkpoint.keep, kept_checkpoints(state))
        self._saved_at = -1 if state.update else state.step
        self.listener.checkpoint(written)
        return written

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        state = self.state
        return {
            "objective": self.config.objective.model_dump(),
            "seed": self.config.seed,
            "steps": state.step,
            "old_logprobs": state.old_logprobs,
            **({} if self.replay is None else self.replay.figures(state.old_logprobs)),
            "start": state.start_evaluation,
            "final": state.last_evaluation,
            **({"rollbacks": state.rollbacks} if state.rollbacks else {}),
            "tokens": state.tokens,
            "seconds": {**state.seconds, "total": sum(phases(state.seconds).values())},
        }

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.eval.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        return due and self.state.update == 0 and self.state.groups is None and self.state.evaluated_at != step

    def _checkpoint_due(self) -> bool:
        step, every = self.state.step, self.config.checkpoint.every
        due = step == self.config.train.steps or (every > 0 and step > 0 and step % every == 0)
        due |= step == 0 and self.config.warnings.on_collapse == "rollback"  # to roll back to
        return due and self._saved_at != step
