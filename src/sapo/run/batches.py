"""The rollout batches of a run: drawn when they are due, and ready when a step takes them up.

Batch s is drawn from the weights of one version, which `Staleness` says. In this process it is drawn at once. In a
thread or another process (`rollout.run_in`) it is drawn from a copy of the weights while the run goes on, and waited
for when it is taken up, and before whatever needs the engine or the whole state: the next draw, an evaluation, a
checkpoint. What the run writes down about a batch it writes when a step takes it up, so that its files tell nothing of
when a thread was done: they are equal bit for bit wherever the engine draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.config import RunConfig
from sapo.data import Group
from sapo.errors import Interrupted, SelfCheckError
from sapo.model.policy import Policy
from sapo.rollout.collector import Collector
from sapo.rollout.engine import Weights
from sapo.rollout.selection import Selection
from sapo.rollout.staleness import Staleness, sampler_weights
from sapo.run.background import BackgroundWork
from sapo.run.directory import RunDirectory
from sapo.run.journal import Journal
from sapo.run.parity import ParityCheck
from sapo.run.preflight import check_episodes, check_rewards
from sapo.run.profiling import Profiler
from sapo.run.routing_replay import RoutingReplay
from sapo.run.self_check import check_old_logprobs, check_sampled
from sapo.run.state import RolloutBatch, RunState
from sapo.training.logprobs import GroupLogprobs
from sapo.training.ranks import Trainers

LOOK_EVERY = 0.05
"""Seconds between two looks for a request to stop while a batch is waited for."""

Drawn = tuple[Selection, dict[str, float]]
"""A batch, and the seconds that drawing it took, by phase."""


@dataclass(frozen=True)
class _Draw:
    """A batch that is being drawn."""

    work: BackgroundWork[Drawn]
    version: int
    """Updates made by the weights that it is drawn from, skipped ones counted."""


class BatchSource:
    """Draws the batches of one run.

    Args:
        state: gives the run's present state; a rollback replaces it.
        collector: draws in the foreground.
        collector_beside: makes a collector for another thread, given what times its phases and what says to stop.
        should_stop: asked while a batch is waited for.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        state: Callable[[], RunState],
        *,
        trainer: Trainers,
        collector: Collector,
        collector_beside: Callable[..., Collector],
        logprobs: GroupLogprobs,
        parity: ParityCheck,
        replay: RoutingReplay | None,
        journal: Journal,
        profiler: Profiler,
        directory: RunDirectory,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config = config
        self.policy = policy
        self._state = state
        self.trainer = trainer
        self.collector = collector
        self._collector_beside = collector_beside
        self.logprobs = logprobs
        self.parity = parity
        self.replay = replay
        self.journal = journal
        self.profiler = profiler
        self.directory = directory
        self._should_stop = should_stop
        self._phase = profiler.phase
        self._staleness = Staleness(config.rollout.staleness, config.train.minibatches)
        self._draw: _Draw | None = None

    @property
    def state(self) -> RunState:
        """Return the run's present state."""
        return self._state()

    @property
    def version(self) -> int:
        """Count the updates made by the present weights, skipped ones too."""
        return self.state.step * self.config.train.minibatches + self.state.update

    def draw_due(self) -> None:
        """Draw the batches that are due, or begin to: the step's own, or under staleness that of a later step.

        Raises:
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        state = self.state
        while state.num_sampled + (self._draw is not None) < self._staleness.num_due(state.step, state.update):
            self.settle()
            self.begin()

    def begin(self) -> None:
        """Draw the next batch at the present weights; in a thread or another process, begin to."""
        state, version = self.state, self.version
        self.trainer.send_weights(self.policy)
        weights = sampler_weights(self.policy.weights(), self.config.experiments, state.step)
        if self.parity.ahead and self.parity.due(state.num_sampled):
            with self._phase("old_logprobs"):
                prompts = self.collector.first_prompts(state.num_sampled, state.position)
                self._note_parity(self.parity.check_prompts(prompts, state.step, version))
        if self.config.rollout.run_in == "driver":
            args = (state.num_sampled, state.position, weights, version, self._engine_records())
            self._receive(self.collector.collect(*args), version)
        else:
            self._draw = self._begin_beside(weights, version)

    def _begin_beside(self, weights: Weights, version: int) -> _Draw:
        """Begin to draw from a copy of the weights as they are now."""
        state, records = self.state, self._engine_records()
        batch, position = state.num_sampled, state.position
        with self._phase("copy"):
            copies = [(name, tensor.clone()) for name, tensor in weights]

        def work(should_stop: Callable[[], bool]) -> Drawn:
            seconds: dict[str, float] = {}
            with self.profiler.beside(seconds) as recorder:
                collector = self._collector_beside(recorder.measure, should_stop)
                return collector.collect(batch, position, iter(copies), version, records), seconds

        return _Draw(BackgroundWork(work), version)

    def settle(self) -> None:
        """Wait for the batch that is being drawn, if there is one.

        A request to stop is honoured while nothing has changed the weights since: the batch is left, and drawn again
        after a resume. Otherwise they are gone, and the batch is waited for.

        Raises:
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        draw = self._draw
        if draw is None:
            return
        with self._phase("wait"):
            while not draw.work.wait(LOOK_EVERY):
                if self._should_stop() and self.leave_if_repeatable():
                    raise Interrupted
        self._draw = None
        selected, seconds = draw.work.result()
        for name, value in seconds.items():
            name = f"drawing/{name}"
            self.state.seconds[name] = self.state.seconds.get(name, 0.0) + value
        self._receive(selected, draw.version)

    def prepare_checkpoint(self) -> None:
        """Bring all that a checkpoint needs into the state: wait for the batch that is being drawn.

        Raises:
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        self.settle()

    def figures(self) -> dict[str, Any]:
        """Return what summary.json says of the schedule."""
        return {}

    def leave_if_repeatable(self) -> bool:
        """Leave the batch that is being drawn if the present weights can draw it again; return whether it was left."""
        if self._draw is None or self._draw.version != self.version:
            return False
        self.leave()
        return True

    def leave(self) -> None:
        """Leave the batch that is being drawn, for good."""
        if self._draw is not None:
            draw, self._draw = self._draw, None
            draw.work.leave()

    def _receive(self, selected: Selection, version: int) -> None:
        """Put a batch that was drawn into the state: a stop before this leaves the state as if nothing were drawn."""
        state = self.state
        if not self.parity.ahead and self.parity.due(state.num_sampled):
            check_sampled([*selected.groups, *selected.dropped])
            with self._phase("old_logprobs"):
                groups = [*selected.groups, *selected.dropped]
                self._note_parity(self.parity.check(groups, state.step, version))
        groups = self._with_old_logprobs(selected)
        state.position = selected.position
        figures = self.collector.selector.figures(selected)
        state.ahead.append(RolloutBatch(groups, selected.dropped, figures, version))

    def _with_old_logprobs(self, selected: Selection) -> list[Group]:
        """Return the groups to train on, with log pi_old where the trainer computes it at the weights that sampled."""
        state, groups = self.state, selected.groups
        with self._phase("old_logprobs"):
            if state.old_logprobs is None:
                # The run's first batch, which its first step has waited for: the weights have not moved yet.
                check_sampled([*groups, *selected.dropped])
                self._check_episodes([*groups, *selected.dropped])  # warned of once, when the step takes it up
                state.old_logprobs = self._choose_old_logprobs([*groups, *selected.dropped])
            if state.old_logprobs == "trainer":
                groups = self.logprobs.attach_old(groups, self.trainer.updates, self._trainer_records())
        return groups

    def take_up(self) -> None:
        """Make the next batch the present step's: wait for it, count it, and complete its log-probabilities.

        Raises:
            NonFiniteError: the sampler's weights are ruined.
            RewardError: the verifier failed on every completion of the batch, or environments failed too often.
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        state = self.state
        self.draw_due()
        if not state.ahead:
            self.settle()
        sampled = [*state.ahead[0].groups, *state.ahead[0].dropped]
        check_sampled(sampled)
        check_rewards(sampled, state.step + 1, self.journal.warn)
        if (failures := self._check_episodes(sampled)) is not None:
            self.journal.warn("environment_failed", failures)
        batch = state.take_next(self.config.train.minibatches)
        groups = batch.groups
        if state.old_logprobs == "current":
            with self._phase("old_logprobs"):
                groups = self.logprobs.attach_old(groups, None, self._trainer_records())
        if self.config.objective.kl is not None:
            with self._phase("reference"):
                groups = self.logprobs.attach_reference(groups)
        state.groups = groups
        self._count(batch)

    def _check_episodes(self, sampled: Sequence[Group]) -> str | None:
        most = self.config.rollout.turns.max_environment_errors
        return check_episodes(sampled, self.state.step + 1, most, self.journal.environments)

    def _count(self, batch: RolloutBatch) -> None:
        """Count what a batch has cost, and warn once where refilling has left groups without variance."""
        state, figures = self.state, batch.figures
        tokens = [sum(len(c) for g in groups for c in g.completions) for groups in (batch.groups, batch.dropped)]
        state.tokens["generated"] += sum(tokens)
        if self.config.rollout.zero_variance != "keep":
            state.tokens["dropped"] = state.tokens.get("dropped", 0) + tokens[1]
        unfilled = int(figures.get("groups/unfilled", 0))
        if unfilled and not state.unfilled:
            self.journal.warn(
                "unfilled_groups",
                f"step {state.step + 1}: {unfilled} of {len(batch.groups)} groups of the batch "
                f"have zero variance after {figures['groups/refill_rounds']} refills (rollout.max_refills); this "
                "warning is given once, groups/unfilled counts them",
            )
        state.unfilled += unfilled

    def _note_parity(self, found: dict[str, float]) -> None:
        self.journal.append({"kind": "parity", "step": self.state.step + 1, **found})

    def _engine_records(self) -> bool:
        return self.replay is not None and self.replay.engine_records(self.state.old_logprobs)

    def _trainer_records(self) -> bool:
        return self.replay is not None and self.replay.trainer_records(self.state.old_logprobs)

    def _choose_old_logprobs(self, groups: list[Group]) -> str:
        """Choose the source of log pi_old for this run, by the self-check of its first step.

        Raises:
            SelfCheckError: the trainer's, which batches that are drawn beside the updates cannot have.
        """
        config = self.config
        full = self.collector.params.full_distribution and self.collector.engine.capabilities.exact_logprobs
        check = check_old_logprobs(
            self.logprobs,
            groups,
            config.train,
            full,
            old_logprobs=config.old_logprobs,
            rounded=not config.experiments.sampler_is_policy,
            both=config.objective.tis is not None,
        )
        replay = {} if self.replay is None else self.replay.record_choice(check.old_logprobs, self.directory)
        self.journal.append({"kind": "self_check", "step": self.state.step + 1, **check.to_json(), **replay})
        if check.warning is not None:
            self.journal.warn("unequal_old_logprobs", check.warning)
        if (mismatch := check.mismatch(config.model.dtype)) is not None:
            self.journal.warn("engine_mismatch", mismatch)
        if check.old_logprobs == "trainer" and config.rollout.overlaps:
            raise SelfCheckError(
                f"the self-check finds that the engine's log-probabilities differ from the trainer's by up to "
                f"{check.log_ratio_max_abs:.3g} (train.self_check_tolerance allows "
                f"{config.train.self_check_tolerance:g}), so log pi_old has to be the trainer's, which a batch that is "
                f"drawn beside the updates cannot have; start again with rollout.run_in=driver"
                f"{' and schedule=fixed' * (config.rollout.schedule == 'free')}, "
                "experiments.old_logprobs=current, or train.old_logprobs=engine"
            )
        return check.old_logprobs
