"""The rollout batches of a run whose schedule is free: a step takes up the first groups that are done.

A thread draws all the time (flow.py). The run's own thread gives it the weights after each update, takes groups up in
the order in which they were finished, and holds it while it needs the engine itself. What is trained on, and when,
depends on how fast each side was: two runs of a recipe are not equal. The bound on staleness holds in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sapo.errors import Interrupted
from sapo.rollout.selection import Position, Selection
from sapo.rollout.staleness import sampler_weights
from sapo.run.batches import LOOK_EVERY, BatchSource
from sapo.run.flow import Flow, Offer, Wave
from sapo.run.line import Room, oldest, staleness_figures, staleness_record


class FreeBatches(BatchSource):
    """Draws the groups of one run in a thread and makes batches of those that are done; see `BatchSource`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rollout, train = self.config.rollout, self.config.train
        self._room = Room(rollout.prompts_per_step, train.minibatches, self.config.max_staleness, train.steps)
        self._flow: Flow | None = None
        self._held_version: int | None = None
        """Of the weights that the engine holds for the drawing side; None while it sleeps."""

    def draw_due(self) -> None:
        """Give the drawing side the present weights, unless it has them; begin to draw if nobody does."""
        state, version = self.state, self.version
        if self._flow is None:
            rollout = self.config.rollout
            wave = max(1, min(rollout.prompts_per_step, rollout.max_rows // rollout.samples_per_prompt))
            # A batch that waits in the state has been taken from the line.
            self._flow = Flow(state.line, self._room, state.num_sampled, wave, self._draw_wave)
        if self._flow.version == version:
            self._flow.go_on()
            return
        self.trainer.send_weights(self.policy)
        weights = sampler_weights(self.policy.weights(), self.config.experiments, state.step)
        with self._phase("copy"):
            copies = [(name, tensor.clone()) for name, tensor in weights]
        self._flow.offer(Offer(lambda: iter(copies), version, self._engine_records()))

    def take_up(self) -> None:
        """See `BatchSource.take_up`."""
        if not self.state.ahead:
            self.begin()
        super().take_up()

    def begin(self) -> None:
        """Wait for the groups of the next batch, and put it into the state.

        Raises:
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        state = self.state
        self.draw_due()
        if self.parity.due(state.num_sampled):
            self._check_parity()
        assert self._flow is not None
        before, version = self._flow.line().discarded, self.version
        with self._phase("wait"):
            while (groups := self._flow.take(self._room.prompts, version, LOOK_EVERY)) is None:
                if self._should_stop():
                    raise Interrupted
        self._add_seconds()
        places = {task.name: place for place, task in enumerate(self.collector.selector.tasks)}
        groups.sort(key=lambda group: places[group.prompt.task])  # stable: each mini-batch gets every task's share
        flat = [g for g in groups if g.zero_variance] if self.config.rollout.zero_variance == "drop" else []
        kept = [g for g in groups if not any(g is other for other in flat)]
        selected = Selection(kept, flat, state.position, refill_rounds=0, unfilled=0, passed_over={})
        self._receive(selected, min(map(oldest, groups)))
        record = staleness_record(groups, version)
        line = self._flow.line()
        state.ahead[-1].figures.update(staleness_figures(record))
        state.ahead[-1].figures["rollout/discarded_stale"] = line.discarded - before
        self.journal.append({"kind": "staleness", "step": state.step + 1, **record})

    def settle(self) -> None:
        """Hold the drawing side, and free the engine for the run's own thread, until `draw_due`.

        Raises:
            Interrupted: when `should_stop` says so, and nothing is lost.
        """
        if self._flow is None:
            return
        self._flow.hold()
        with self._phase("wait"):
            while not self._flow.idle(LOOK_EVERY):
                if self._should_stop():
                    raise Interrupted
        self._rest()

    def prepare_checkpoint(self) -> None:
        """Put into the state where all prompts are. Drawing goes on."""
        if self._flow is not None:
            self.state.line = self._flow.line()

    def leave_if_repeatable(self) -> bool:
        """Leave what is being drawn, which can always be drawn again; return whether anything was."""
        drawing = self._flow is not None
        self.leave()
        return drawing

    def leave(self) -> None:
        """End the drawing side; its unfinished prompts stay in the state, and are drawn again."""
        if self._flow is not None:
            self.state.line = self._flow.leave()
            self._add_seconds()
            self._flow = None
            self._rest()

    def figures(self) -> dict[str, Any]:
        """See `BatchSource.figures`."""
        line = self.state.line
        return {
            "schedule": {
                "kind": "free",
                "max_staleness": self._room.bound,
                "reproducible": False,
                "discarded_stale": line.discarded,
                "redrawn_unfinished": line.redrawn,
            }
        }

    def _rest(self) -> None:
        """Have the engine sleep."""
        if self._held_version is not None:
            self._held_version = None
            self.collector.engine.sleep()

    def _check_parity(self) -> None:
        """Hold the engine's log-probabilities against the trainer's, at the present weights."""
        self.settle()
        with self._phase("old_logprobs"):
            prompts = self.collector.first_prompts(self.state.num_sampled, Position())
            self._note_parity(self.parity.check_prompts(prompts, self.state.step, self.version))
        self.draw_due()

    def _add_seconds(self) -> None:
        assert self._flow is not None
        seconds = self.state.seconds
        for name, value in self._flow.seconds().items():
            seconds[f"drawing/{name}"] = seconds.get(f"drawing/{name}", 0.0) + value

    def _draw_wave(self, numbers: Sequence[int], offer: Offer, should_stop: Callable[[], bool]) -> Wave:
        """Draw the groups of numbered prompts, in the drawing side's thread; the engine keeps its weights for more."""
        seconds: dict[str, float] = {}
        with self.profiler.beside(seconds) as recorder:
            collector = self._collector_beside(recorder.measure, should_stop)
            with recorder.measure("generate"):
                if self._held_version is None:
                    collector.engine.wake()
                if self._held_version != offer.version:
                    self._held_version = offer.version  # before: an engine that dies of it is put to sleep all the same
                    collector.engine.set_weights(offer.weights(), offer.version)
            batches = {n // self._room.prompts for n in numbers}
            prompts = {batch: collector.selector.first_prompts(batch, Position()) for batch in batches}
            asked = [prompts[n // self._room.prompts][n % self._room.prompts] for n in numbers]
            return collector.groups(asked, offer.record_experts), seconds
