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
from functools import partial
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group, Status
from sapo.diagnostics import task_panels
from sapo.diagnostics.measure import Diagnosis
from sapo.environments import is_environment
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.adapters import trained_sentence
from sapo.model.policy import Policy
from sapo.rollout.collector import Collector
from sapo.rollout.engine import Engine
from sapo.rollout.episodes.reply_times import ReplyTimes
from sapo.rollout.remote.start import start_engine
from sapo.run.batches import BatchSource
from sapo.run.collapse import (
    answer_collapse,
    kept_checkpoints,
    note_checkpoint,
    note_non_finite,
    note_step,
    rollback_record,
)
from sapo.run.directory import RunDirectory
from sapo.run.early_stop import judged_by, note_judged, reason_to_end
from sapo.run.free import FreeBatches
from sapo.run.held_out import HeldOutEvaluations
from sapo.run.journal import Journal, summary_of
from sapo.run.listener import Listener, Silent, note, tell_phase
from sapo.run.live import LiveFile
from sapo.run.loggers.all import LoggerSet
from sapo.run.parity import ParityCheck
from sapo.run.preflight import TaskSet
from sapo.run.profiling import Profiler
from sapo.run.records import token_gates
from sapo.run.routing_replay import RoutingReplay
from sapo.run.state import RolloutBatch, RunState
from sapo.run.trainers import make_packer, make_trainer, trainer_settings
from sapo.training.batch import split_minibatches
from sapo.training.checkpoint import Checkpoint, list_checkpoints, prune, save_checkpoint
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
        self.state = state or RunState(run=directory.run)
        self.listener = listener or Silent()
        self.should_stop = should_stop
        self.tasks = tasks
        self.engine = engine or start_engine(config, policy)
        self.replay = RoutingReplay.of(config, policy)
        settings = trainer_settings(config)
        routers = None if self.replay is None else self.replay.routers
        self.trainer: Trainers = trainers or make_trainer(config, settings, policy, reference, routers)
        self.packer = make_packer(config, policy)
        self.logprobs = GroupLogprobs(self.trainer, self.packer, "adapter_off" if reference is None else "reference")
        self.diagnosis = Diagnosis(config, settings.objective)
        begun = state is None or self.state.update or self.state.groups is not None or self._evaluation_due()
        self._saved_at = -1 if begun else self.state.step
        names = [t.name for t in tasks.train]
        self.loggers = LoggerSet(
            config,
            directory.path,
            resumed_at=None if state is None else state.step,
            panels=task_panels(names) if names[1:] else None,
        )
        self.live = LiveFile(directory.path, policy.show)
        self.profiler = Profiler(config, directory.path, lambda: self.state.seconds, self._begin_phase)
        self._phase = self.profiler.phase
        played = [t.name for t in tasks.train if is_environment(t)]
        times = ReplyTimes()
        self.journal = Journal(
            *(config, directory, self.loggers, self.listener, names, lambda: self.state, played, times, policy.show)
        )
        self._append = self.journal.append
        sides = (tasks.train, tasks.formats, tasks.curricula)
        make_collector = partial(Collector, config, policy, self.engine, *sides, times=times)
        self.collector = make_collector(self._phase, should_stop)
        self.batches = (FreeBatches if config.rollout.schedule == "free" else BatchSource)(
            config,
            policy,
            lambda: self.state,
            trainer=self.trainer,
            collector=self.collector,
            collector_beside=make_collector,
            logprobs=self.logprobs,
            parity=ParityCheck(config, policy, self.collector, self.logprobs, directory.path),
            replay=self.replay,
            journal=self.journal,
            profiler=self.profiler,
            directory=directory,
            should_stop=should_stop,
        )
        self.held_out = HeldOutEvaluations(config, policy, self.engine, tasks, should_stop)

    def _begin_phase(self, name: str) -> None:
        self.live.begin_phase(name)
        tell_phase(self.listener, self.state.step + 1, name)

    def run(self) -> StopReason | None:
        """Train to the last step, or until asked to stop.

        Raises:
            NonFiniteError, CollapseError: with step, cause and the checkpoint to resume from.
        """
        self.loggers.open()
        self.listener.started(self.config)
        if self.policy.adapter is not None:
            note(self.listener, trained_sentence(self.policy))
        try:
            with self.profiler.run():
                while True:
                    if self._evaluation_due():
                        self.evaluate()
                    if self._checkpoint_due():
                        self.checkpoint()
                    if self.state.step >= self.config.train.steps or self._early_end() is not None:
                        break
                    self.live.begin_step(self.state.step + 1)
                    with self.profiler.step(self.state.step + 1):
                        try:
                            self.step()
                        except NonFiniteError as error:
                            self._answer_non_finite(error)
        except Interrupted:
            self.batches.leave_if_repeatable()
            return StopReason(self._save_stopped())
        finally:
            self.batches.leave()
            self.live.remove()
        if self.state.step < self.config.train.steps and (reason := self._early_end()) is not None:
            note(self.listener, f"step {self.state.step}: the run ends early, as train.stop_when says: {reason}")
        self.directory.write_summary(self.summary())
        return None

    def step(self) -> None:
        """Sample one rollout batch and make its updates."""
        state = self.state
        if state.groups is None:
            self.batches.take_up()
        assert state.groups is not None
        self.live.show(state.groups)
        uneven = self.config.rollout.zero_variance == "drop"
        minibatches = split_minibatches(state.groups, self.config.train.minibatches, uneven)
        while state.update < len(minibatches):
            self.batches.draw_due()
            self.live.begin_update(state.update + 1, len(minibatches))
            self.update(minibatches[state.update])
        self.journal.log_step(state.groups)
        state.step, state.update = state.step + 1, 0
        state.groups, state.dropped, state.step_updates, state.gates = None, [], [], {}
        note_step(state, self.config)
        if state.collapse is not None:
            self._answer_collapse()

    def rollout(self) -> RolloutBatch:
        """Draw the next batch at the present weights, wait for it, and return it; it waits for its step."""
        self.batches.settle()
        self.batches.begin()
        self.batches.settle()
        return self.state.ahead[-1]

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
            assert state.groups is not None
            samples = [len(g.completions) for g in state.groups]
            state.gates |= token_gates(result, state.update, train.minibatches, samples, on_policy)
        state.step_updates.append({"skipped": result.skipped, "on_policy": on_policy, **figures})
        state.update += 1

    def _answer_collapse(self) -> None:
        """Go on, stop, or roll back to the last healthy checkpoint, as the recipe says."""
        collapsed = self.state
        if self.config.warnings.on_collapse == "rollback":
            self.batches.leave()
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
        self.batches.settle()
        with self._phase("evaluate"):
            self.trainer.send_weights(self.policy)
            give_back_freed_memory()
            evaluations = self.held_out.evaluate(self.batches.version)
        for evaluation in evaluations:
            record = {"kind": "eval", "step": state.step, **evaluation.metrics()}
            judged = {"judged": evaluation.judged} if min(evaluation.judged) < evaluation.samples else {}
            rewards = {} if evaluation.binary else {"rewards": evaluation.rewards}
            seconds = {"seconds": evaluation.seconds}
            self._append({**record, "correct": evaluation.correct, **judged, **rewards, "timing": seconds})
            if (failures := evaluation.failure(self.config.rollout.turns.max_environment_errors)) is not None:
                played = Status.ENVIRONMENT_ERROR.value in evaluation.statuses
                self.journal.warn("environment_failed" if played else "verifier_failed", failures, step=state.step)
            prefix = "eval/" if len(evaluations) == 1 else f"eval/{evaluation.task}/"
            self.loggers.log(state.step, {prefix + k: v for k, v in record.items() if isinstance(v, int | float)})
        figures = evaluations[0].metrics()
        if len(evaluations) > 1:
            figures["tasks"] = {e.task: e.metrics() for e in evaluations}
        state.start_evaluation = state.start_evaluation or figures
        state.last_evaluation = figures
        state.evaluated_at = state.step
        first = evaluations[0]
        if first.failure(self.config.rollout.turns.max_environment_errors) is None:  # failures are no reason to end
            note_judged(self.config, state, figures, some_failed=first.failed > 0)

    def _save_stopped(self) -> Checkpoint:
        """Return where a stopped run goes on: the scheduled checkpoint of the step's start, else a new one.

        A step finds all before its first update again, bit for bit. A rollback may need the scheduled one as it is.
        """
        state = self.state
        if self._saved_at == state.step and not state.update:
            found = list_checkpoints(self.directory.checkpoints)
            return next(c for c in found if (c.step, c.update) == (state.step, 0))
        return self.checkpoint(scheduled=False)

    def checkpoint(self, *, scheduled: bool = True) -> Checkpoint:
        """Write a checkpoint of the present state, with the batch that is being drawn, for which it waits.

        In the free schedule it waits for nothing: what is being drawn is drawn again after a resume.

        Args:
            scheduled: it may turn out to be healthy; one that a stop writes may not.

        Raises:
            Interrupted: when `should_stop` says so before that, and nothing is lost.
        """
        state = self.state
        self.batches.prepare_checkpoint()
        with self._phase("checkpoint"):
            if scheduled:
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
        early = {} if (reason := self._early_end()) is None else {"ended_early": reason}
        return summary_of(self.config, self.state, self.replay) | early | self.batches.figures()

    def _early_end(self) -> str | None:
        """Say why the run ends before its last step, None where it goes on."""
        stop = self.config.train.stop_when
        return None if stop is None else reason_to_end(stop, judged_by(stop, self.state))

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.eval.every
        due = step in (0, self.config.train.steps) or (every > 0 and step % every == 0)
        return due and self.state.update == 0 and self.state.groups is None and self.state.evaluated_at != step

    def _checkpoint_due(self) -> bool:
        step, every = self.state.step, self.config.checkpoint.every
        last = step == self.config.train.steps or self._early_end() is not None
        due = last or (every > 0 and step > 0 and step % every == 0)
        due |= step == 0 and self.config.warnings.on_collapse == "rollback"  # to roll back to
        return due and self._saved_at != step
